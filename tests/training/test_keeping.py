import errno
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_mcm.files import DiskFullError
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.disk import size_of
from diffusers_mcm.training.keeping import Keeper, check_room
from diffusers_mcm.training.loop import Trainer, train

from .test_loop import read_log, run
from .world import tiny_config

PLAIN = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, max_train_steps=2)
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """A disk without room for the folders in this list; nothing else is written differently."""
    folders = []
    from diffusers_mcm import files

    emptied = files._emptied

    def fill(temporary):
        if any(folder == temporary or folder in temporary.parents for folder in folders):
            raise FULL
        return emptied(temporary)

    monkeypatch.setattr(files, "_emptied", fill)
    return folders


def test_a_checkpoint_that_cannot_be_written_ends_no_run(world, tmp_path, full, caplog):
    """Nor do a log and pictures without room; it makes the same LoRA."""
    whole = run(tiny_config(world, tmp_path / "whole", **PLAIN))
    out = tmp_path / "out"
    full += [out / ".checkpoint-1.tmp", out / ".checkpoint-2.tmp", out / "validation"]
    options = PLAIN | dict(checkpointing_steps=1, validation_prompts=("a circle",), validation_steps=1)
    found = run(tiny_config(world, out, **options))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert [row["step"] for row in read_log(out)] == [1, 2] and (out / "README.md").is_file()
    for step in (1, 2):
        assert f"No checkpoint of step {step} was written: [Errno 28] No space left on the disk" in caplog.text
    assert caplog.text.count("The training goes on, but the validation clips could not be written") == 1


def test_a_final_write_that_fails_keeps_the_state_and_is_made_up_for(world, tmp_path, full):
    out = tmp_path / "out"
    full.append(out / ".unfinished")
    with pytest.raises(
        DiskFullError, match=r"The state of step 2 is in .*out/checkpoint-2. Go on from there"
    ) as error:
        train(tiny_config(world, out, **PLAIN))
    assert "No space left on the disk for the LoRA" in str(error.value)
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    full.clear()
    train(tiny_config(world, out, **PLAIN, resume_from_checkpoint="latest"))
    train(tiny_config(world, tmp_path / "whole", **PLAIN))
    name = "pytorch_lora_weights.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_where_there_is_no_room_at_all_the_state_is_kept_elsewhere(world, tmp_path, full, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    full.append(out)
    with pytest.raises(DiskFullError, match="The state of step 2 is in .*other/mcm-.*/checkpoint-2, as it could not"):
        train(tiny_config(world, out, **PLAIN))
    (kept,) = other.glob("mcm-*/checkpoint-2")
    full.clear()
    resumed = Trainer(tiny_config(world, out, **PLAIN, resume_from_checkpoint=str(kept)))
    assert resumed.step == 2 and resumed.keeper.to_resume == str(kept)


def test_a_run_knows_its_checkpoint_at_whatever_moment_it_is_killed(tmp_path, monkeypatch):
    """Between the checkpoint's arrival and the record's there is none at which 'latest' would not find it."""
    from diffusers_mcm.training.checkpoint import find_checkpoints

    config = TrainingConfig(pretrained_teacher_model="x", video_data="x", output_dir=str(tmp_path))
    keeper = Keeper(config, lambda: {"step": 1}, lambda folder: None)
    keeper.run.write()
    monkeypatch.setattr("diffusers_mcm.files.os.replace", kill_after(tmp_path / "checkpoint-1"))
    with pytest.raises(KeyboardInterrupt):
        keeper.save(1)
    assert find_checkpoints(tmp_path, "latest") == [tmp_path / "checkpoint-1"]


def kill_after(folder):
    from os import replace

    def killed(old, new):
        replace(old, new)
        if Path(new) == folder:
            raise KeyboardInterrupt

    return killed


def test_the_room_is_looked_at_before_the_start_and_told(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=7_000_000_000))

    def ask(**flags):
        config = TrainingConfig(
            pretrained_teacher_model="x", video_data="x", output_dir=str(tmp_path / "out"), **flags
        )
        return check_room(config, 1_600_000_000, 400_000_000, config.max_train_steps)

    assert "4 checkpoints of 1.6 GB each and the LoRA take up to 6.8 GB" in ask()  # three of them, and one that comes
    assert "2 checkpoints of 1.6 GB each" in ask(checkpoints_total_limit=1)
    assert "1 checkpoints of 1.6 GB each" in ask(checkpointing_steps=0)
    with pytest.raises(ValueError, match="61 checkpoints .* up to 98 GB in .*out, where 7 GB are free: .*total_limit"):
        ask(checkpoints_total_limit=0)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)  # what a run that goes on will replace
    with (tmp_path / "out" / "checkpoint-1" / "state").open("wb") as file:
        file.truncate(100_000_000_000)
    assert "of 107 GB that there are" in ask(checkpoints_total_limit=0)


def test_the_room_is_reckoned_with_the_moments_that_come_with_the_first_step(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, **PLAIN, checkpointing_steps=2))
    trainer.train()
    state, told = trainer.state(), trainer.told_room.split("checkpoints of ")[1].split(" kB")[0]
    assert float(told) * 1000 == pytest.approx(size_of(state) + size_of(state["lora"]), rel=0.02)
