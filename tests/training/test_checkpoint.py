import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_mcm.files import DiskFullError, atomic_files
from diffusers_mcm.training.checkpoint import (
    STATE_FILE,
    checkpoints,
    clear_up,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)


def save(folder, step):
    return save_checkpoint(folder, step, {"step": step}, lambda path: (path / "more").write_text("x"))


def test_checkpoints_are_found_oldest_first(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert load_checkpoint(tmp_path / "checkpoint-10") == {"step": 10}
    assert (tmp_path / "checkpoint-10" / "more").is_file()
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_full_disk_leaves_the_checkpoints_that_there_were(tmp_path, monkeypatch):
    save(tmp_path, 1)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=5_000))

    def half(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusers_mcm.training.checkpoint.save_state", half)
    said = r"for the checkpoint of step 2: it takes about 8 kB, and 5 kB are free.*--checkpoints_total_limit"
    for step in (1, 2):
        with pytest.raises(DiskFullError, match=said.replace("step 2", f"step {step}")):
            save_checkpoint(tmp_path, step, {"weights": torch.zeros(2000)}, lambda path: None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path / "checkpoint-1") == {"step": 1}


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    def fail(path):
        (path / "half").write_text("x")
        raise OSError("disk full")

    save(tmp_path, 1)
    for step in (1, 2):
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, step, {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path / "checkpoint-1") == {"step": 1}
    (tmp_path / ".checkpoint-1.old").mkdir()  # what a run left that was killed while it replaced a checkpoint
    (tmp_path / ".checkpoint-1.old" / "half").write_text("x")
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (tmp_path / "checkpoint-7").mkdir()  # what another program left; no state in it
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zero_the_end(file):
    """As a loss of power leaves it whose blocks were not written yet."""
    content = file.read_bytes()
    file.write_bytes(content[:-4096] + bytes(4096))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"not a state"), flip_a_bit, zero_the_end])
def test_a_damaged_state_says_so_and_latest_is_the_one_before_it(tmp_path, caplog, damage):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.ones(3000)}, lambda path: None)
    damage(tmp_path / "checkpoint-3" / STATE_FILE)
    with pytest.raises(ValueError, match="checkpoint-3 cannot be read"):
        load_checkpoint(tmp_path / "checkpoint-3")
    folder, state = open_checkpoint(tmp_path, "latest")
    assert (folder.name, state["step"]) == ("checkpoint-2", 2)
    assert "checkpoint-3 cannot be read" in caplog.text and "The one before it is gone on from" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-3 cannot be read"):  # what is named is meant
        open_checkpoint(tmp_path, "checkpoint-3")
    for step in (1, 2):
        damage(tmp_path / f"checkpoint-{step}" / STATE_FILE)
    with pytest.raises(ValueError, match="checkpoint-1 cannot be read"):
        open_checkpoint(tmp_path, "latest")


def test_files_are_on_the_disk_before_they_take_the_place_of_others(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    names = lambda opened: Path(os.readlink(f"/proc/self/fd/{opened}")).name  # noqa: E731
    monkeypatch.setattr("os.fsync", lambda opened: (done.append(names(opened)), fsync(opened)))
    monkeypatch.setattr("os.replace", lambda old, new: (done.append(f"-> {new.name}"), replace(old, new)))
    save(tmp_path, 7)
    assert sorted(done[:2]) == ["more", STATE_FILE]
    assert done[2:] == [".checkpoint-7.tmp", "-> checkpoint-7", tmp_path.name]


def test_what_a_killed_run_left_goes_and_what_it_was_replacing_comes_back(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.old")  # killed between two moves
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.old")  # killed after them
    (tmp_path / ".checkpoint-3.tmp").mkdir()
    clear_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert load_checkpoint(tmp_path / "checkpoint-1") == {"step": 1}
    clear_up(tmp_path / "nowhere")


def test_output_files_arrive_together_and_leave_the_rest_alone(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train_log.jsonl").write_text("kept")
    (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_files(folder, last="weights") as temporary:
        (temporary / "weights").write_text("half")
        raise RuntimeError
    assert (folder / "weights").read_text() == "old"
    with atomic_files(folder, last="weights") as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "scheduler").mkdir()
        (temporary / "scheduler" / "config").write_text("new")
        assert temporary.parent == folder  # moving them never crosses file systems
    assert sorted(path.name for path in folder.iterdir()) == ["scheduler", "train_log.jsonl", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (folder / "weights").read_text() == (folder / "scheduler" / "config").read_text() == "new"
    assert (folder / "train_log.jsonl").read_text() == "kept"


def test_state_holds_tensors_bit_for_bit(tmp_path):
    state = {"weights": {"a": torch.randn(3)}, "step": 1}
    folder = save_checkpoint(tmp_path, 1, state, lambda path: None)
    assert torch.equal(load_checkpoint(folder)["weights"]["a"], state["weights"]["a"])
