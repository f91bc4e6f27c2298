"""The machine's errors stop the run and name the file; only what is wrong with a file itself is passed over."""

import errno
import os
import resource
import tarfile
from contextlib import contextmanager

import av
import pytest

from diffusers_mcm.data import ImageDataset, VideoDataset
from diffusers_mcm.data import faults as module
from diffusers_mcm.data.faults import MachineError, UnusableItem, check_own_fault, unusable
from diffusers_mcm.data.loading import StepLoader, StepSampler

from .conftest import encode_mp4, flat_frames, image_bytes, write_tar


@contextmanager
def no_more_open_files():
    """This process may open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    held = []
    try:
        while True:  # numbers below the limit may be free too
            held.append(os.open("/", os.O_RDONLY))
    except OSError:
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


def _folder_of_videos(folder, clip):
    (folder / "a.mp4").write_bytes(clip)
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,x\n")
    return VideoDataset(folder, num_frames=2, height=8, width=8)


def _folder_of_images(folder, clip):
    (folder / "a.png").write_bytes(image_bytes(9))
    return ImageDataset(folder, size=8)


def _tar_of_videos(folder, clip):
    write_tar(folder / "0.tar", {"a.mp4": clip, "a.json": {"caption": "x"}})
    return VideoDataset(folder, num_frames=2, height=8, width=8)


SETS = {"a.mp4": _folder_of_videos, "a.png": _folder_of_images, "0.tar": _tar_of_videos}


@pytest.mark.parametrize("name", SETS)
def test_too_many_open_files_is_no_reason_to_skip_an_item(tmp_path, clip, name):
    dataset = SETS[name](tmp_path, clip)
    dataset[0]
    with no_more_open_files(), pytest.raises(MachineError, match=rf"{name}.*cannot be read, .*ulimit -n") as caught:
        dataset[0]
    assert caught.value.errno == errno.EMFILE and not dataset.skipped
    dataset[0]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ENFILE", "ENOMEM", "ENOSPC"])
def test_what_opening_a_file_says_of_the_machine_stops_everything(tmp_path, clip, name, number, monkeypatch):
    dataset = SETS[name](tmp_path, clip)
    number = getattr(errno, number)

    def fail(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("av.open", fail)
    with pytest.raises(MachineError, match=rf"{name}.* cannot be read, and not by its own fault"):
        dataset[0]


def test_a_shard_that_cannot_be_opened_now_is_not_left_out(tmp_path, clip, monkeypatch):
    _tar_of_videos(tmp_path, clip)
    write_tar(tmp_path / "1.tar", {"b.mp4": clip, "b.json": {"caption": "y"}})
    real = tarfile.open

    def failing_open(path, *args, **kwargs):
        if path.endswith("1.tar"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(tarfile, "open", failing_open)
    with pytest.raises(MachineError, match=r"1\.tar cannot be read, and not by its own fault: OSError: .*Stale"):
        VideoDataset(tmp_path, num_frames=2, height=8, width=8)


def test_a_file_that_cannot_be_looked_up_is_not_called_missing(tmp_path, clip, monkeypatch):
    (tmp_path / "metadata.csv").write_text("file_name,text\nlinks/../a.mp4,x\n/elsewhere/b.mp4,y\n")
    (tmp_path / "a.mp4").write_bytes(clip)
    real = os.stat

    def stat(path, *args, **kwargs):
        if str(path).endswith("b.mp4"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(MachineError, match=r"/elsewhere/b\.mp4 cannot be read"):
        VideoDataset(tmp_path, num_frames=2, height=8, width=8)


def test_memory_that_runs_out_names_the_item(tmp_path, clip, monkeypatch):
    dataset = _tar_of_videos(tmp_path, clip)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(dataset, "read_pixels", fail)
    with pytest.raises(MachineError, match=r"0\.tar/a\.mp4 cannot be read.*MemoryError.*dataloader_num_workers"):
        dataset[0]


def test_a_worker_tells_it_as_well(tmp_path, clip, monkeypatch):
    dataset = _folder_of_videos(tmp_path, clip)

    def fail(*args, **kwargs):
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    monkeypatch.setattr("av.open", fail)
    with pytest.raises(MachineError, match=r"a\.mp4 cannot be read"):
        next(iter(StepLoader(dataset, StepSampler(1), num_workers=1)))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("broken data stream"),
        av.error.InvalidDataError(av.error.InvalidDataError, "Invalid data"),
        av.error.OSError(errno.EIO, "Input/output error"),  # a file that breaks off: the system can read it
    ],
)
def test_a_fault_of_the_file_makes_it_unusable(tmp_path, error):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    assert isinstance(unusable(error, str(path), "the video"), UnusableItem)


def test_ffmpegs_input_output_error_is_the_machines_where_the_system_says_so_too(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", fail)
    error = av.error.OSError(errno.EIO, "Input/output error")
    with pytest.raises(MachineError, match="a.mp4 cannot be read"):
        check_own_fault(error, "a.mp4")
    check_own_fault(error, None)  # bytes in memory need no disk


def test_ffmpegs_want_of_memory_is_the_machines_where_there_is_little(monkeypatch):
    error = av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")
    check_own_fault(error, "a.mp4")  # a header that asks for gigabytes
    monkeypatch.setattr(module, "_LITTLE_MEMORY", 1 << 60)
    with pytest.raises(MachineError, match="a machine with more memory"):
        check_own_fault(error, "a.mp4")


@pytest.mark.parametrize(("status", "stops"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_server_that_is_busy_is_not_the_files_fault(status, stops):
    class HTTPError(OSError):
        response = type("Response", (), {"status_code": status})

    if stops:
        with pytest.raises(MachineError):
            check_own_fault(HTTPError("no"), "hf://x/a.mp4")
    else:
        check_own_fault(HTTPError("no"), "hf://x/a.mp4")


def test_a_lost_connection_is_not_the_files_fault():
    for error in (ConnectionError("reset"), TimeoutError("slow")):
        with pytest.raises(MachineError):
            check_own_fault(error, "https://x/a.mp4")


def test_a_broken_film_on_the_disk_is_still_skipped(tmp_path, clip):
    (tmp_path / "bad.mp4").write_bytes(clip[: len(clip) // 2])
    (tmp_path / "good.mp4").write_bytes(encode_mp4(flat_frames(8)))
    (tmp_path / "metadata.csv").write_text("file_name,text\nbad.mp4,x\ngood.mp4,y\n")
    dataset = VideoDataset(tmp_path, num_frames=2, height=8, width=8)
    assert [dataset[index]["caption"] for index in range(2)] == ["y", "y"]
    assert [os.path.basename(name) for name in dataset.skipped] == ["bad.mp4"]
