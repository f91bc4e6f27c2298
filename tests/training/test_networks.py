import re
import shlex

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.consistency import boundary_scalings
from diffusers_mcm.lora import lora_layers
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.networks import components_elsewhere, load_teacher
from tests.tiny import SCHEDULER, save_tiny_lora

from .world import tiny_config


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_sampling_has_the_boundary_of_training(sigma_data):
    config = TrainingConfig(pretrained_teacher_model="teacher", video_data="videos", sigma_data=sigma_data)
    scheduler = get_base_model("modelscope").student_scheduler(
        SCHEDULER,
        num_solver_steps=config.method.num_solver_steps,
        timestep_scaling=config.timestep_scaling,
        sigma_data=config.sigma_data,
    )
    t = torch.arange(0, 1000, 37)
    expected = boundary_scalings(t, config.timestep_scaling, config.sigma_data)
    torch.testing.assert_close(scheduler.get_scalings_for_boundary_condition_discrete(t), expected)
    assert scheduler.config.original_inference_steps == config.method.num_solver_steps == 50


def test_the_teacher_is_the_base_model_of_a_saved_pipeline(world, tmp_path):
    lora = save_tiny_lora(tmp_path / "lora", world["pretrained_teacher_model"])
    pipeline = MCMPipeline.from_pretrained(lora)
    pipeline.fuse_lora()
    pipeline.save_pretrained(tmp_path / "saved")
    saved, _ = load_teacher(tiny_config(world | dict(pretrained_teacher_model=str(tmp_path / "saved")), tmp_path))
    base, elsewhere = load_teacher(tiny_config(world, tmp_path))
    assert not lora_layers(saved.unet) and elsewhere == {}
    weights = base.unet.state_dict()
    assert saved.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in saved.unet.state_dict().items())


def test_a_base_model_that_the_files_are_not_of(world, tmp_path):
    with pytest.raises(ValueError, match="--base_model is animatediff, but .* holds a modelscope"):
        load_teacher(tiny_config(world, tmp_path, base_model="animatediff"))
    with pytest.raises(ValueError, match="Unknown base model 'ltx'"):
        load_teacher(tiny_config(world, tmp_path, base_model="ltx"))


def test_where_components_lie(animatediff, tmp_path):
    """As given, or the base model's own place; in a saved pipeline there is nothing to look for."""
    model = get_base_model("animatediff")
    image = {"unet": ["diffusers", "UNet2DConditionModel"]}
    assert model.components_elsewhere(image) == model.extra_repositories
    assert model.components_elsewhere(image | {"motion_adapter": ["diffusers", "MotionAdapter"]}) == {}
    assert model.components_elsewhere({"unet": ["diffusers", "UNetMotionModel"], "motion_adapter": [None, None]}) == {}
    _, elsewhere = load_teacher(tiny_config(animatediff, tmp_path))
    assert elsewhere == {"motion_adapter": animatediff["extra_repositories"][0].partition("=")[2]}


@pytest.mark.parametrize("base_model", [None, "animatediff"])
def test_a_teacher_in_one_file_is_refused_with_the_way_out(tmp_path, base_model, monkeypatch):
    def refusal(name, key="model.diffusion_model.input_blocks.0.0.weight"):
        file = tmp_path / name
        save_file({key: torch.zeros(1)}, file)
        config = dict(pretrained_teacher_model=str(file), video_data="videos", base_model=base_model)
        with pytest.raises(ValueError, match="--pretrained_teacher_model takes a folder or a repository; ") as error:
            components_elsewhere(TrainingConfig(**config))
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
