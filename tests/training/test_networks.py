import re
import shlex

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.consistency import boundary_scalings
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.networks import build_scheduler, find_base_model
from tests.tiny import SCHEDULER


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_sampling_has_the_boundary_of_training(sigma_data):
    config = TrainingConfig(pretrained_teacher_model="teacher", video_data="videos", sigma_data=sigma_data)
    scheduler = build_scheduler(get_base_model("modelscope"), SCHEDULER, config)
    t = torch.arange(0, 1000, 37)
    expected = boundary_scalings(t, config.timestep_scaling, config.sigma_data)
    torch.testing.assert_close(scheduler.get_scalings_for_boundary_condition_discrete(t), expected)
    assert scheduler.config.original_inference_steps == config.num_solver_steps


@pytest.mark.parametrize("base_model", [None, "animatediff"])
def test_a_teacher_in_one_file_is_refused_with_the_way_out(tmp_path, base_model, monkeypatch):
    def refusal(name, key="model.diffusion_model.input_blocks.0.0.weight"):
        file = tmp_path / name
        save_file({key: torch.zeros(1)}, file)
        config = dict(pretrained_teacher_model=str(file), video_data="videos", base_model=base_model)
        with pytest.raises(ValueError, match="--pretrained_teacher_model takes a folder or a repository; ") as error:
            find_base_model(TrainingConfig(**config))
        return str(error.value)

    told = refusal("my style.safetensors")
    command, folder = re.search("Make a folder of it, (.*), and give --pretrained_teacher_model (.*)", told).groups()
    assert shlex.split(folder) == [str(tmp_path / "my style")]
    _, _, code, *arguments = shlex.split(command)
    assert arguments == [str(tmp_path / "my style.safetensors"), str(tmp_path / "my style")]
    read = []
    monkeypatch.setattr(
        "diffusers.StableDiffusionPipeline.from_single_file", lambda file: read.append(file) or Saved()
    )
    monkeypatch.setattr("sys.argv", ["-c", *arguments])
    exec(code, {})
    assert read == arguments[:1] and Saved.folders == arguments[1:]
    assert "pickled weights are not read" in refusal("model.ckpt") and "torch.load" in refusal("model.ckpt")
    assert "no checkpoint of a whole model: a LoRA to start from would be --pretrained_lora" in refusal("a", "lora_A")


class Saved:
    folders: list[str] = []

    def save_pretrained(self, folder):
        self.folders[:] = [folder]
