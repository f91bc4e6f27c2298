import errno

import numpy as np
import pytest

from diffusers_mcm.files import DiskFullError
from diffusers_mcm.training.validation import write_validation


def test_validation_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    clips = {prompt: np.zeros((2, 16, 16, 3), dtype=np.uint8) for prompt in ("a cat", "a dog")}
    folder = tmp_path / "validation" / "step-000001"
    assert write_validation(folder, clips, 8).ndim == 3
    assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "overview.png"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusers_mcm.training.validation.write_image", full)
    with pytest.raises(DiskFullError, match="No space left on the disk for the validation clips"):
        write_validation(folder.with_name("step-000002"), clips, 8)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]
