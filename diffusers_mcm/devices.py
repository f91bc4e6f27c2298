"""Which device to run on."""

import torch


def choose_device(name: str | None = None) -> str:
    """The named device if this machine has it, else an error that says what it has; the best one if none is named."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device, is_there in found.items() if is_there]
    if name is None:
        return available[0]
    if name.split(":")[0] not in available:
        raise ValueError(f"expected a device out of {', '.join(available)} on this machine, got {name!r}")
    return name
