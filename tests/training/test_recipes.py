"""The recipes of `examples/recipes` and the README, read by the parsers that read them in earnest."""

import os
import subprocess

import pytest
from accelerate import Accelerator
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from diffusers_mcm.base_models import BASE_MODELS
from diffusers_mcm.training.acceleration import with_accelerate_settings
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.config import MIXED_PRECISION, TrainingConfig
from diffusers_mcm.training.trained_module import TrainedModule, slow_learning
from tests.documents import ROOT, blocks, commands, launches

RECIPE = str(ROOT / "examples/recipes/distil.sh")


def check(arguments: list[str], papers: bool = True) -> None:
    """`accelerate launch` with these arguments trains in half precision, with the `papers` batch and rates or those
    of a Wan."""
    launch = launch_command_parser().parse_args(arguments)
    machine = load_config_from_file(launch.config_file)
    config = parse_config(launch.training_script_args)
    assert machine.mixed_precision in MIXED_PRECISION[1:] and config.mixed_precision is None
    processes = launch.num_processes or machine.num_processes
    assert (machine.distributed_type.value == "MULTI_GPU") == (processes > 1)
    total = config.train_batch_size * config.gradient_accumulation_steps * processes
    assert (total, config.learning_rates(total)) == ((128, (5e-6, 1e-4)) if papers else (64, (5e-5, 1e-4)))
    assert config.max_train_steps == (30_000 if papers else 1000) and config.offload_text_encoder != papers
    assert config.dataloader_num_workers > 0 and config.gradient_checkpointing
    assert config.lr_warmup_steps <= config.max_train_steps / 20
    student = TrainedModule("student", nn.Linear(1, 1), config.learning_rates(total)[0], config, Accelerator(cpu=True))
    assert slow_learning(student, config, total) is None


@pytest.mark.parametrize("gpus", ["1", "8"])
@pytest.mark.parametrize("name", BASE_MODELS)
def test_each_base_model_has_a_whole_recipe(name, gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (call,) = launches(["sh", RECIPE, name, "my videos", "images", "out"], GPUS=gpus, BATCH="2")
    check(call[1:], papers=not name.startswith("wan"))
    config = parse_config(call[next(n for n, word in enumerate(call) if word.endswith(".py")) + 1 :])
    assert config.pretrained_teacher_model == BASE_MODELS[name].default_repository
    assert (config.video_data, config.resume_from_checkpoint) == ("my videos", "latest")


@pytest.mark.parametrize(
    ("environment", "expert"),
    [({}, "high_noise"), (dict(EXPERT="high_noise"), "high_noise"), (dict(EXPERT="low_noise"), "low_noise")],
)
def test_the_recipe_of_two_experts_is_one_for_each(environment, expert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (call,) = launches(["sh", RECIPE, "wan-a14b", "v", "i", "out", "--shift", "8"], **environment)
    config = parse_config(call[next(n for n, word in enumerate(call) if word.endswith(".py")) + 1 :])
    assert (config.expert, config.shift) == (expert, 8.0) and bool(config.validation_prompts) == (
        expert == "high_noise"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples/accelerate").iterdir()), ids=lambda path: path.stem)
def test_each_machine_is_one_that_accelerate_can_be_told_of(path, monkeypatch):
    """As many processes as its name says, of which FSDP's split the frozen weights."""
    launch = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    machine = load_config_from_file(launch.config_file)
    launch, *_ = _validate_launch_command(launch)
    monkeypatch.setattr("os.environ", {})
    os.environ.update(prepare_multi_gpu_env(launch) if machine.num_processes > 1 else {})
    config = TrainingConfig(pretrained_teacher_model="x", video_data="x")
    assert with_accelerate_settings(config).fsdp == (path.stem == "fsdp2")
    expected = {"one_gpu": (1, 1), "eight_gpus": (1, 8), "two_nodes": (2, 16), "fsdp2": (1, 8)}[path.stem]
    assert (launch.num_machines, launch.num_processes) == expected
    assert launch.mixed_precision == "bf16" and path.name in path.read_text()


def test_a_batch_that_cannot_be_made_is_refused(tmp_path):
    for words, message in (
        (["modelscope"], "GPUS × BATCH must divide"),
        (["ltx"], "must be modelscope, animatediff, wan, wan-ti2v or wan-a14b, not ltx"),
    ):
        environment = {"PATH": "/usr/bin:/bin"} | ({"GPUS": "3"} if words == ["modelscope"] else {})
        done = subprocess.run(["sh", RECIPE, *words, "v", "i", "o"], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr


def test_the_readmes_command_learns(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [
        words
        for language, text in blocks("README.md")
        if language == "bash"
        for words in commands(text)
        if words[:2] == ["accelerate", "launch"]
    ]
    assert found
    for words in found:
        check(words[2:])
