import errno
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from diffusers_mcm import MCMPipeline
from diffusers_mcm.files import (
    DiskFullError,
    atomic_file,
    atomic_files,
    atomic_folder,
    check_takes_files,
    fingerprint,
    is_disk_full,
    write_text,
)
from diffusers_mcm.formats import convert
from diffusers_mcm.lora import WEIGHTS_NAME
from diffusers_mcm.publish import record_sample, stage_lora
from diffusers_mcm.shapes.build import build
from diffusers_mcm.video_io import WRITERS, write_video
from tests.tiny import save_tiny_base, save_tiny_lora


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert path.read_text() == "old"


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path):
    path = tmp_path / "new" / "kept"
    for text in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / f"{text}.txt").write_text(text)
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(path) as temporary:
        (temporary / "more.txt").write_text("mo")
        raise RuntimeError("half way")
    assert [p.name for p in path.parent.iterdir()] == ["kept"]
    assert [p.name for p in path.iterdir()] == ["new.txt"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.mkdir()
    (path / "old.txt").write_text("old")
    replace = os.replace

    def interrupted(source, target):
        if target == path and source.name.endswith(".tmp"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["kept", "kept/old.txt"]


# --- a full disk -----------------------------------------------------------------------------------------------------
@contextmanager
def no_room(size=0):
    """No file may grow beyond so many bytes: the system refuses the rest of a write, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base model, and a LoRA folder with a sample clip."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_base(root / "base")
    save_tiny_lora(root / "lora", base=root / "base")
    record_sample(root / "lora", np.zeros((4, 16, 16, 3), np.uint8), "a red circle", fps=8)
    return root


@pytest.fixture(scope="module")
def pipe(world):
    return MCMPipeline.from_pretrained(world / "lora")


VIDEO = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
WRITE = {
    **{f"v{suffix}": lambda path, *_: write_video(path, VIDEO) for suffix in WRITERS},
    "frames": lambda path, *_: write_video(path, VIDEO, metadata={"seed": 1}),
    "lora": lambda path, _, pipe: pipe.save_mcm_lora(path),
    "pipeline": lambda path, _, pipe: pipe.save_pretrained(path),
    "converted": lambda path, world, _: convert(world / "lora", path, "peft", overwrite=True),
    "one.safetensors": lambda path, world, _: convert(world / "lora", path, "diffusers", overwrite=True),
    "table.md": lambda path, *_: write_text(path, "a line\n" * 200),
}


@pytest.mark.parametrize("room", [0, 700])
@pytest.mark.parametrize("name", WRITE)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, world, pipe, name, room):
    path = tmp_path / "new" / name
    with no_room(room), pytest.raises(DiskFullError, match=f"The disk is full: there was no room to write .*{name}"):
        WRITE[name](path, world, pipe)
    assert list(tmp_path.iterdir()) == []  # nor the folders that were made for it


@pytest.mark.parametrize("name", WRITE)
def test_a_full_disk_leaves_what_was_there(tmp_path, world, pipe, name):
    WRITE[name](tmp_path / name, world, pipe)
    before = contents(tmp_path)
    with no_room(), pytest.raises(DiskFullError, match="MB are free there"):
        WRITE[name](tmp_path / name, world, pipe)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_a_lora_folder_as_it_was(tmp_path, world):
    folder = save_tiny_lora(tmp_path / "lora", base=world / "base")
    before = contents(tmp_path)
    with no_room(1500), pytest.raises(DiskFullError, match="no room to write .*lora"):
        record_sample(folder, VIDEO, "a red circle", fps=8)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("format", ["folder", "tars"])
def test_a_full_disk_leaves_no_half_of_a_world(tmp_path, format):
    with no_room(100), pytest.raises(DiskFullError, match="no room to write .*world"):
        build(tmp_path / "new" / "world", num_videos=1, num_images=1, size=32, num_frames=2, format=format)
    assert list(tmp_path.iterdir()) == []


def test_what_is_staged_on_a_full_disk_is_told(tmp_path, world):
    (tmp_path / "staged").mkdir()
    with no_room(700), pytest.raises(DiskFullError, match="The disk is full"):
        stage_lora(world / "lora", tmp_path / "staged", "me/mcm", base_model="owner/base")
    assert list((tmp_path / "staged").iterdir()) == []


def test_full_disks_are_known_by_number_and_by_what_libraries_say():
    assert is_disk_full(OSError(errno.ENOSPC, "x")) and is_disk_full(OSError(errno.EDQUOT, "x"))
    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied")) and not is_disk_full(ValueError("space"))


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError, match="not yours"), atomic_file(tmp_path / "a" / "b.txt"):
        raise PermissionError(errno.EACCES, "not yours")
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_files_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old/part.txt", "notes.txt", "last.txt"):
        (tmp_path / name).write_text("old")
    with atomic_files(tmp_path, "last.txt", stale=["old", "never"]) as temporary:
        write_text(temporary / "new" / "part.txt", "new")
        write_text(temporary / "last.txt", "new")
        assert (tmp_path / "old" / "part.txt").is_file()  # up to the end
    assert {name.as_posix(): text for name, text in contents(tmp_path).items()} == {
        "notes.txt": b"old",
        "new/part.txt": b"new",
        "last.txt": b"new",
    }


def test_a_saved_lora_is_the_same_as_before(tmp_path, pipe, world):
    pipe.save_mcm_lora(tmp_path / "lora")
    names = {path.as_posix() for path in contents(tmp_path / "lora")}
    assert names == {WEIGHTS_NAME, "mcm_config.json", "scheduler/scheduler_config.json"}
    again = MCMPipeline.from_pretrained(tmp_path / "lora")
    ours, theirs = (p.denoiser.state_dict() for p in (again, pipe))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_output_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    check_takes_files(tmp_path / "new" / "folder", "--output")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=f"^--output {folder}: {tmp_path}/file is a file; name another folder"):
            check_takes_files(folder, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # for root there is hardly such a folder
    with pytest.raises(ValueError, match=rf"nothing can be written to {tmp_path} \(Permission denied\); name another"):
        check_takes_files(tmp_path / "out", "--output")


def test_a_fingerprint_tells_models_apart_and_nothing_else(tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    weights, config = model / "unet" / "weights.safetensors", model / "unet" / "config.json"
    config.write_text("{}")
    weights.write_bytes(bytes(range(256)) * 4096 * 70)  # 70 MiB, of which blocks are read
    before = fingerprint(model)
    (model / "metadata.json").write_text("of a video")
    (model / "sample.mp4").touch()
    os.utime(weights, (0, 0))
    assert before == fingerprint(model) == fingerprint(model.rename(tmp_path / "moved"))
    weights, config = (tmp_path / "moved" / "unet" / path.name for path in (weights, config))
    config.write_text('{"a": 1}')
    assert fingerprint(tmp_path / "moved") != before
    config.write_text("{}")
    content = weights.read_bytes()
    for changed in (content[:-1] + b"x", b"x" + content[1:], content[:-1]):
        weights.write_bytes(changed)
        assert fingerprint(tmp_path / "moved") != before
    assert fingerprint(weights) != fingerprint(config)
