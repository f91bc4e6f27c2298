import pytest
import torch

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.consistency import boundary_scalings
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.networks import build_scheduler
from tests.tiny import SCHEDULER


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_sampling_has_the_boundary_of_training(sigma_data):
    config = TrainingConfig(pretrained_teacher_model="teacher", video_data="videos", sigma_data=sigma_data)
    scheduler = build_scheduler(get_base_model("modelscope"), SCHEDULER, config)
    t = torch.arange(0, 1000, 37)
    expected = boundary_scalings(t, config.timestep_scaling, config.sigma_data)
    torch.testing.assert_close(scheduler.get_scalings_for_boundary_condition_discrete(t), expected)
    assert scheduler.config.original_inference_steps == config.num_solver_steps
