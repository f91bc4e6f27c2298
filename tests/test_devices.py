"""The device is the one that is named, or the best that the machine has."""

import pytest

from diffusers_mcm.devices import choose_device


def test_the_best_device_unless_one_is_named(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda has=cuda: has)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda has=mps: has)
        assert choose_device() == best and choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="expected a device out of cpu on this machine, got 'cuda:1'"):
        choose_device("cuda:1")
