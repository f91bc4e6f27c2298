import errno

import pytest
import torch
from safetensors import SafetensorError

from diffusers_mcm.files import DiskFullError, atomic_folder
from diffusers_mcm.training.disk import room_for, save_state, size_of

FULL = "/dev/full"  # every write to it fails for want of room


def test_a_full_disk_is_told_as_one_whatever_noticed_it(tmp_path):
    def text():
        with open(FULL, "w") as file:
            file.write("x")

    def torch_save():
        link = tmp_path / "state.pt"
        link.symlink_to(FULL)
        save_state({"weights": torch.zeros(1_000_000)}, link)

    def safetensors():  # as its save_file says it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (text, torch_save, safetensors):
        with pytest.raises(
            DiskFullError, match=r"No space left .* for the LoRA: it takes about 1.5 MB, and .* are free"
        ) as e:
            with room_for("the LoRA", tmp_path / "not" / "there", 1_500_000):
                write()
        assert e.value.errno == errno.ENOSPC and str(tmp_path / "not" / "there") in str(e.value)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (RuntimeError("shapes differ"), PermissionError(errno.EACCES, "no"), SafetensorError("bad header")):
        with pytest.raises(type(error)) as raised, room_for("the LoRA", tmp_path):
            raise error
        assert raised.value is error


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(DiskFullError), room_for("it", tmp_path), atomic_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_those_of_all_tensors():
    state = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float16), {"c": (torch.zeros(1),)}], "step": 7}
    assert size_of(state) == 12 + 4 + 4
