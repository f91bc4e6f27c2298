"""What accelerate decides and provides: precision, accumulation, processes, autocast."""

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

from .config import MIXED_PRECISION, TrainingConfig
from .sharding import asked_by_accelerate, check_sharding
from .tracking import check_tracker

logger = logging.getLogger(__name__)
_PRECISION, _ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# What else `accelerate launch` can be told and a run would pass over, or do in a way that no test vouches for.
_NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
_INSTEAD = "launch with plain data parallelism (DDP), or with --use_fsdp --fsdp_version 2"


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
    precision = os.environ.get(_PRECISION, "").lower() or "no"
    if precision not in MIXED_PRECISION:
        raise ValueError(
            f"accelerate was told to train with mixed precision {precision!r} ({_PRECISION}), and this training does "
            f"{', '.join(MIXED_PRECISION)}: change it in `accelerate launch --mixed_precision` or `accelerate config`."
        )
    steps = os.environ.get(_ACCUMULATION, "").strip() or "1"
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(
            f"{_ACCUMULATION} must be a whole number of 1 or more, not {steps!r}: change it, or unset it and give"
            " --gradient_accumulation_steps."
        )
    fsdp = config.fsdp | asked_by_accelerate()
    resolved: dict[str, Any] = {"mixed_precision": precision, "gradient_accumulation_steps": int(steps)}
    for name, told in resolved.items():
        given = getattr(config, name)
        if given is None:
            continue
        if told not in (given, "no", 1) and os.environ.get("RANK", "0") == "0":
            logger.warning("--%s %s is used; accelerate's environment says %s.", name, given, told)
        resolved[name] = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of was said when the configuration was made
        return dataclasses.replace(config, fsdp=fsdp, **resolved)


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run in one process or many; for it there is only DDP, and `sharding` does the rest.

    Precision and accumulation are decided in `config`, as `with_accelerate_settings` returns it.
    """
    _check_environment()
    check_tracker(config.report_to)
    accelerator = Accelerator(
        # Left to itself on a CPU it would not notice `torchrun`, and every process would train alone.
        cpu=not torch.accelerator.is_available(),
        # A plugin, not a number: over a number accelerate's environment would win.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, str(Path(config.output_dir, config.logging_dir))),
        kwargs_handlers=[
            # The buffers (spectral norms) are the same in every process; sending them about would only cost time.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # Before torch 2.11 a weight that autocast converted in a pass without gradients is taken from its cache in
            # the pass with gradients, and gets none. The student does both in one region.
            AutocastKwargs(cache_enabled=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout)),
        ],
    )
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.name.startswith("MULTI_"):
        raise ValueError(f"{kind} is not supported; {_INSTEAD}.")
    check_sharding(config, accelerator)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _check_environment() -> None:
    for variable, what in _NOT_SUPPORTED.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise ValueError(f"{what} ({variable}) is not supported; {_INSTEAD}.")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "") or "no"
    if backend.lower() != "no":
        raise ValueError(
            f"torch.compile by accelerate (ACCELERATE_DYNAMO_BACKEND={backend}) is not supported: launch with "
            "--dynamo_backend no, or leave it out of `accelerate config`."
        )
