import errno
import shutil

import pytest
import torch

from diffusers_mcm.files import DiskFullError, atomic_files
from diffusers_mcm.training.checkpoint import STATE_FILE, checkpoints, load_checkpoint, save_checkpoint


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


def test_a_damaged_state_says_so(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(ValueError, match="checkpoint-3 cannot be read"):
        load_checkpoint(tmp_path / "checkpoint-3")


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
