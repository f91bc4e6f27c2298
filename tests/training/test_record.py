import json
import shutil

import pytest

from diffusers_mcm.training.checkpoint import (
    RECORD_NAME,
    RunRecord,
    checkpoints,
    find_checkpoints,
    go_on,
    save_checkpoint,
)


def save(folder, step):
    return save_checkpoint(folder, step, {"step": step}, lambda path: None)


def make_run(folder, *steps):
    """A folder with a run's checkpoints, as a run leaves it."""
    run = RunRecord(folder)
    for step in steps:
        run.add(save(folder, step))
    return run


def find(folder, wanted):
    """The checkpoint that is tried first."""
    return next(iter(find_checkpoints(folder, wanted)), None)


def names(folder):
    return [path.name for path in checkpoints(folder)]


def test_latest_is_the_newest_of_the_run(tmp_path):
    assert find(tmp_path / "nowhere", "latest") is None and find(tmp_path, None) is None
    make_run(tmp_path, 2, 9, 10)
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-9"


def test_after_going_back_latest_follows_the_new_branch(tmp_path):
    first = make_run(tmp_path, 1, 2, 3)
    back = go_on(tmp_path, tmp_path / "checkpoint-1", first.id)
    assert back.id == first.id and [path.name for path in back.others] == ["checkpoint-2", "checkpoint-3"]
    back.write()
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-1"
    back.add(save(tmp_path, 2))
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert go_on(tmp_path, tmp_path / "checkpoint-2", first.id).line == ["checkpoint-1", "checkpoint-2"]
    left = go_on(tmp_path, tmp_path / "checkpoint-3", first.id)  # the branch that was left, gone back to by its name
    assert left.line == ["checkpoint-3"] and [path.name for path in left.others] == ["checkpoint-1", "checkpoint-2"]


def test_the_limit_counts_and_drops_the_branchs_own_only(tmp_path):
    first = make_run(tmp_path, 1, 2, 7, 8)
    back = go_on(tmp_path, tmp_path / "checkpoint-2", first.id)
    back.add(save(tmp_path, 3))
    back.drop_beyond(2)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (2, 3, 7, 8)]
    back.drop_beyond(1)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (3, 7, 8)]
    back.drop_beyond(5)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (3, 7, 8)]


def test_a_new_run_does_not_write_among_anothers_checkpoints(tmp_path):
    make_run(tmp_path, 1, 2)
    said = r"holds checkpoints of another run \(checkpoint-1, checkpoint-2\).*--resume_from_checkpoint latest"
    with pytest.raises(ValueError, match=said):
        find(tmp_path, None)
    (tmp_path / RECORD_NAME).unlink()  # nor among those of a time before runs were recorded
    with pytest.raises(ValueError, match=said):
        find(tmp_path, None)


def test_a_new_run_does_not_write_among_other_files(tmp_path):
    (tmp_path / ".hidden").touch()
    (tmp_path / "lost+found").mkdir()
    assert find_checkpoints(tmp_path, None) == []
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    said = (
        r"is not empty \(pytorch_lora_weights.safetensors\). Name another folder, or .*--resume_from_checkpoint latest"
    )
    with pytest.raises(ValueError, match=said):
        find_checkpoints(tmp_path, None)
    assert find_checkpoints(tmp_path, "latest") == []


def test_nor_does_one_that_comes_from_elsewhere(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    make_run(here, 1, 2)
    other = make_run(there, 5)
    said = r"holds checkpoints of another run \(checkpoint-1, checkpoint-2\) than .*checkpoint-5"
    for run in (other.id, None):
        with pytest.raises(ValueError, match=said):
            go_on(here, there / "checkpoint-5", run)
    shutil.copytree(there / "checkpoint-5", here / "checkpoint-5")  # nor by being copied there
    with pytest.raises(ValueError, match=said):
        go_on(here, here / "checkpoint-5", other.id)


def test_a_run_may_be_gone_on_with_in_another_folder(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run = make_run(there, 5)
    moved = go_on(here, there / "checkpoint-5", run.id)
    here.mkdir()
    moved.write()
    assert moved.id == run.id and find(here, "latest").resolve() == there / "checkpoint-5"
    moved.add(save(here, 6))
    assert find(here, "latest") == here / "checkpoint-6"
    moved.drop_beyond(1)  # what lies elsewhere is not this folder's to delete
    assert names(there) == ["checkpoint-5"] and names(here) == ["checkpoint-6"]
    shutil.move(there / "checkpoint-5", here / "kept")  # a copy of the same run's that was put aside
    assert go_on(here, here / "kept", run.id).id == run.id


def test_latest_finds_another_folders_checkpoint_through_a_link(tmp_path):
    """As where the outputs of all runs are linked to a larger disk: `..` leads out of the disk's folder."""
    (tmp_path / "disk" / "of" / "many").mkdir(parents=True)
    (tmp_path / "outputs").symlink_to(tmp_path / "disk" / "of" / "many")
    run, here = make_run(tmp_path / "there", 5), tmp_path / "outputs" / "here"
    here.mkdir()
    go_on(here, tmp_path / "there" / "checkpoint-5", run.id).write()
    assert find(here, "latest").resolve() == tmp_path / "there" / "checkpoint-5"


def test_checkpoints_from_before_runs_were_recorded_are_one_runs(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path, step)
    assert find(tmp_path, "latest").name == "checkpoint-10"
    run = go_on(tmp_path, tmp_path / "checkpoint-9", None)
    assert run.line == ["checkpoint-2", "checkpoint-9"] and run.id
    run.write()
    assert find(tmp_path, "latest").name == "checkpoint-9"
    assert go_on(tmp_path, tmp_path / "checkpoint-2", None).id == run.id


def test_what_cannot_be_resumed_says_so(tmp_path):
    make_run(tmp_path, 3)
    with pytest.raises(ValueError, match=r"'checkpoint-4' is not a checkpoint .* Checkpoints in .*: checkpoint-3\."):
        find(tmp_path, "checkpoint-4")
    RunRecord(tmp_path).write()  # a run that made none yet
    with pytest.raises(
        ValueError, match=r"latest: the run .* has no checkpoint there; .*\(checkpoint-3\) are of another"
    ):
        find(tmp_path, "latest")
    for damaged in ("{", "[]", json.dumps({"run": "x"})):
        (tmp_path / RECORD_NAME).write_text(damaged)
        with pytest.raises(ValueError, match=f"{RECORD_NAME} cannot be read .* with the most steps"):
            find(tmp_path, "latest")
