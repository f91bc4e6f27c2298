"""What `examples/train_mcm_distill.py` says of a flag or a path that is wrong."""

import runpy
import shutil
from pathlib import Path

import pytest

from diffusers_mcm.data.faults import MachineError
from diffusers_mcm.training.loop import Trainer

from .world import flags_of, tiny_config

SCRIPT = Path(__file__).parents[2] / "examples" / "train_mcm_distill.py"


@pytest.fixture
def say(world, tmp_path, monkeypatch, capsys):
    """Run the script with other flags than those of a whole world; what it says, and how it ends. It loads nothing."""
    monkeypatch.setattr("diffusers_mcm.training.run.build_networks", lambda *_: pytest.fail("a network was loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*flags, **values):
        given = [*flags_of(tiny_config(world, **{"output_dir": tmp_path / "out", **values})), *flags]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *given])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT))["main"]()
        said = capsys.readouterr().err.splitlines()
        assert len(said) <= 2 and ended.value.code in (1, 2), said
        return "\n".join(said)

    return run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(video_data="/none/videos"), "/none/videos"),
        (dict(image_data="/none/images"), "/none/images"),
        (dict(pretrained_teacher_model="/none/base"), "'/none/base' is not a file or folder here"),
        (dict(discriminator_features="/none/dino"), "--discriminator_features /none/dino: '/none/dino' is not a file"),
        (dict(discriminator_text="/none/clip"), "--discriminator_text /none/clip: '/none/clip' is not a file"),
        (dict(pretrained_lora="/none/lora"), "'/none/lora' is not a file"),
        (dict(resume_from_checkpoint="checkpoint-4"), "'checkpoint-4' is not a checkpoint"),
        (dict(caption_column="words"), "words"),
        (dict(output_dir=f"{SCRIPT}/out"), "train_mcm_distill.py is a file; name another folder"),
        (dict(num_frames=9), "it has 8 frames, fewer than the 9 asked for"),
        (dict(shift=3.0), "--shift 3 has no effect on a modelscope"),
        (dict(mixed_precision="fp16"), "--mixed_precision fp16 needs a GPU"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_before_a_network_is_loaded(say, values, message):
    assert message in say(**values)


def test_so_is_a_network_of_another_kind(say, tmp_path, world):
    folder = tmp_path / "weights only"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    assert "is not a network: there is no config.json" in say(discriminator_text=str(folder))
    base = shutil.copytree(world["pretrained_teacher_model"], tmp_path / "base")
    (base / "unet" / "config.json").unlink()
    assert "it has no unet/config.json" in say("--height", "32", pretrained_teacher_model=str(base), width=None)


def test_a_warning_beside_it_is_a_line_too(say):
    with pytest.warns(UserWarning, match="not read"):  # of the configuration that the flags are of
        said = say(lambda_adv=0.0, video_data="/none/videos").splitlines()
    assert said[0].startswith("diffusers-mcm: warning: --image_data is not read") and "/none/videos" in said[1]


def test_so_is_a_wrong_flag(say):
    assert "unrecognized arguments: --learning_rat 1. Did you mean --learning_rate? See --help." in say(
        "--learning_rat", "1"
    )
    assert "--seed: invalid int value: 'x'. See --help." in say("--seed", "x")
    assert "--lora_rank must be greater than 0, not 0." in say("--lora_rank", "0")


def test_of_several_processes_one_speaks_first(say, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert say("--seed", "x").startswith("process 1: error: argument --seed") and waited == [10]


def test_a_run_that_cannot_read_its_data_any_more_ends_with_a_line(world, tmp_path, monkeypatch, capsys):
    """Not with the tracebacks of two processes: a process that loads data has died, or a disk is gone."""
    told = iter([RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), MachineError("a.mp4: gone")])
    config = tiny_config(world, tmp_path / "out", lambda_adv=0.0, image_data=None, max_train_steps=3)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *flags_of(config), "--resume_from_checkpoint", "latest"])
    update = Trainer.update

    def fail(trainer):
        if trainer.step == trainer.keeper.kept_step + 1:
            raise next(told)
        return update(trainer)

    monkeypatch.setattr(Trainer, "update", fail)
    for step, line in enumerate(["error: A process that loads data has died (", "error: a.mp4: gone"], 1):
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT))["main"]()
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1 and said[-1].startswith(line), said
        assert (tmp_path / "out" / f"checkpoint-{step}").is_dir() and "Traceback" not in "".join(said)
