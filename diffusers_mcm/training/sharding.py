"""The frozen weights of the denoiser, split among the processes (FSDP2). What is trained is small, and whole in each.

Each process gathers a block's weights when it comes to it, and drops them after it: the numbers are the same, forward
to the bit, and the gradients of the LoRA are averaged by DDP as ever. So optimisers and checkpoints are whole too.
"""

import logging
import os

from accelerate import Accelerator
from torch import nn

from ..distillation.student import Student
from ..wording import readable
from .config import TrainingConfig

logger = logging.getLogger(__name__)
_ASKED = "ACCELERATE_USE_FSDP"
# What accelerate can be told of FSDP and would be passed over here.
_PASSED_OVER = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params is not supported: leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing is not supported: give --gradient_checkpointing",
}


def asked_by_accelerate() -> bool:
    """Whether `accelerate launch` was told to use FSDP 2; ValueError for what of FSDP is not supported.

    accelerate is no longer told so then: its own FSDP splits what is trained, and on a CPU it does nothing at all.
    """
    if not _says_yes(_ASKED):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"FSDP 1 ({_ASKED} without FSDP_VERSION=2) is not supported: launch with --fsdp_version 2.")
    for variable, remedy in _PASSED_OVER.items():
        if _says_yes(variable):
            raise ValueError(f"{remedy} ({variable}).")
    os.environ[_ASKED] = "false"
    return True


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")


def check_sharding(config: TrainingConfig, accelerator: Accelerator) -> None:
    """ValueError where frozen weights cannot be split."""
    if config.fsdp and accelerator.num_processes == 1:
        raise ValueError("--fsdp splits the frozen weights among processes, and there is only one: leave it out.")


def shard_frozen(student: Student, accelerator: Accelerator) -> None:
    """Split what of the student's denoiser is not trained; to be done before DDP wraps the student."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    denoiser = student.denoiser
    trained = {parameter for parameter in denoiser.parameters() if parameter.requires_grad}
    for child in denoiser.children():
        for block in child if isinstance(child, nn.ModuleList) else (child,):
            if any(parameter not in trained for parameter in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(denoiser, mesh=mesh, ignored_params=trained)
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    student._ddp_params_and_buffers_to_ignore = frozen  # DDP would send each process the first one's part
    student.in_step = True
    whole = sum(parameter.nbytes for parameter in denoiser.parameters())
    here = sum(getattr(parameter, "_local_tensor", parameter).nbytes for parameter in denoiser.parameters())
    if accelerator.is_main_process:
        logger.info(
            "The frozen weights of the denoiser are split: %s of %s are here.", readable(here), readable(whole)
        )
