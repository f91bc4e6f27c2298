"""How sparing a pipeline is with the memory and the time of its machine, as flags say it."""

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

    from .. import MCMPipeline

LONGEST_WAIT = timedelta(days=1)  # of one process for another; a launcher ends them all when one has died
DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    machine = parser.add_argument_group("machine").add_argument
    machine("--device", help="cpu, cuda, cuda:1, mps … (default: the best there is)")
    machine("--dtype", choices=DTYPES, default="float32", help="precision of the networks (default: float32)")
    machine("--offload", choices=OFFLOADS, default="none", help="keep weights in host memory until they are needed")
    machine("--vae_slicing", action="store_true", help="decode one frame at a time; not for Wan")
    machine("--vae_tiling", action="store_true", help="decode in overlapping tiles: less memory, most of all for Wan")
    machine("--decode_chunk_size", type=int, help="decode that many frames at a time; not for Wan (default: 16)")
    machine("--fuse_lora", action="store_true", help="add the LoRA to the weights, which saves its cost at every step")
    machine("--compile", action="store_true", help="torch.compile the denoiser: slow to start, for long lists")


def check_offload(offload: str, device: str) -> None:
    """`ValueError` where there is nothing that weights could be kept away from."""
    if offload != "none" and device == "cpu":
        raise ValueError(
            f"expected an accelerator (cuda, mps …) for --offload {offload}, got the cpu: all weights are in host"
            " memory already; --dtype bfloat16 halves them"
        )


def join_processes(device: str) -> "PartialState":
    """This process among those that a launcher has started, which may wait for each other until the last is done.

    By itself torch would end them after 10 minutes over NCCL and 30 over Gloo, and one video can take longer.
    """
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)


def spend_less(pipeline: "MCMPipeline", arguments: argparse.Namespace, device: str) -> None:
    """Put a pipeline on its device, as sparing with memory and time as the flags say."""
    chunks = arguments.vae_slicing or arguments.decode_chunk_size is not None
    if chunks and not pipeline.base_model.decodes_any_frames:
        raise ValueError(
            f"expected neither --vae_slicing nor --decode_chunk_size for a {pipeline.base_model.name}, whose"
            " autoencoder decodes one latent after the other anyway: --vae_tiling saves memory there"
        )
    if arguments.vae_slicing:
        pipeline.vae.enable_slicing()
    if arguments.vae_tiling:
        pipeline.vae.enable_tiling()
    if arguments.offload == "none":
        pipeline.to(device)
    else:
        getattr(pipeline, f"enable_{arguments.offload}_cpu_offload")(device=device)
    if arguments.compile:
        for denoiser in pipeline.denoisers.values():
            denoiser.compile()
