import pytest
import torch

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.consistency import boundary_scalings
from diffusers_mcm.training.config import TrainingConfig
from tests.tiny import SCHEDULER


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_sampling_has_the_boundary_of_training(sigma_data):
    config = TrainingConfig(pretrained_teacher_model="teacher", video_data="videos", sigma_data=sigma_data)
    scheduler = get_base_model("modelscope").student_scheduler(
        SCHEDULER,
        num_solver_steps=config.num_solver_steps,
        timestep_scaling=config.timestep_scaling,
        sigma_data=config.sigma_data,
    )
    t = torch.arange(0, 1000, 37)
    expected = boundary_scalings(t, config.timestep_scaling, config.sigma_data)
    torch.testing.assert_close(scheduler.get_scalings_for_boundary_condition_discrete(t), expected)
    assert scheduler.config.original_inference_steps == config.num_solver_steps
