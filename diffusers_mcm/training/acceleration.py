"""What accelerate decides and provides: precision, accumulation, processes, autocast."""

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .config import MIXED_PRECISION, TrainingConfig
from .tracking import check_tracker

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
    from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration
except ImportError as error:
    raise ImportError("Training needs accelerate: pip install 'diffusers-mcm[train]'") from error

logger = logging.getLogger(__name__)
TRACKER_PROJECT = "mcm"
_PRECISION, _ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# What else `accelerate launch` can be told and a run would pass over, or do in a way that no test vouches for.
_NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


@contextmanager
def told_by_one(accelerator: Accelerator) -> Iterator[None]:
    """Warnings of this package from the main process only, where each process does the same; errors come from all."""
    package = logging.getLogger(__name__.partition(".")[0])
    level = package.level
    if not accelerator.is_main_process:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def with_accelerate_settings(config: TrainingConfig) -> TrainingConfig:
    """The configuration with precision and accumulation, where not given, as accelerate's environment says.

    `accelerate launch` hands its flags and `accelerate config`'s answers on in that environment. A flag that is given
    wins. Raises ValueError for what accelerate can and this training cannot do.
    """
    environment = {
        "mixed_precision": _precision_of_environment(),
        "gradient_accumulation_steps": _accumulation_of_environment(),
    }
    resolved: dict[str, Any] = {"mixed_precision": "no", "gradient_accumulation_steps": 1}
    for name, value in environment.items():
        given = getattr(config, name)
        overruled = given is not None and value not in (None, resolved[name], given)
        if overruled and os.environ.get("RANK", "0") == "0":
            logger.warning("--%s %s is used; accelerate's environment says %s.", name, given, value)
        resolved[name] = given if given is not None else value if value is not None else resolved[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of was said when the configuration was made
        return dataclasses.replace(config, **resolved)


def _precision_of_environment() -> str | None:
    value = os.environ.get(_PRECISION, "").lower() or None
    if value is not None and value not in MIXED_PRECISION:
        raise ValueError(
            f"accelerate was told to train with mixed precision {value!r} ({_PRECISION}), and this training does "
            f"{', '.join(MIXED_PRECISION)}: change it in `accelerate launch --mixed_precision` or `accelerate config`."
        )
    return value


def _accumulation_of_environment() -> int | None:
    value = os.environ.get(_ACCUMULATION, "").strip() or None
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(
            f"{_ACCUMULATION} must be a whole number of 1 or more, not {value!r}: change it, or unset it and give"
            " --gradient_accumulation_steps."
        )
    return int(value)


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """One process or many; DDP is the only kind of parallelism whose results the tests vouch for.

    Args:
        config: With precision and accumulation decided, as `with_accelerate_settings` returns it.
    """
    _check_environment()
    check_tracker(config.report_to)
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        # Left to itself on a CPU it would not notice `torchrun`, and every process would train alone.
        cpu=not torch.accelerator.is_available(),
        # A plugin, not a number: over a number accelerate's environment would win.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
        kwargs_handlers=[
            # The buffers (spectral norms) are the same in every process; sending them about would only cost time.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # Before torch 2.11 a weight that autocast converted in a pass without gradients is taken from its cache in
            # the pass with gradients, and gets none. The student does both in one region.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    _check_distribution(accelerator)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Begin the tracker's run, with the configuration as its settings."""
    values = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in config.to_dict().items()
    }
    accelerator.init_trackers(TRACKER_PROJECT, config=values)


def _check_environment() -> None:
    for variable, what in _NOT_SUPPORTED.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise ValueError(f"{what} ({variable}) is not supported; launch with plain data parallelism (DDP).")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "") or "no"
    if backend.lower() != "no":
        raise ValueError(
            f"torch.compile by accelerate (ACCELERATE_DYNAMO_BACKEND={backend}) is not supported: launch with "
            "--dynamo_backend no, or leave it out of `accelerate config`."
        )


def _check_distribution(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.name.startswith("MULTI_"):
        raise ValueError(f"{kind} is not supported; launch with plain data parallelism (DDP).")
