"""What the training scripts of the shapes world share: a resumable loop, keyed batches, the frame cache."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from diffusers_mcm.files import atomic_file


def parser(description: str, *, steps: int, batch: int, lr: float, data: bool = True) -> argparse.ArgumentParser:
    """The flags that every script here has; `--data` only where `data` says that one is read."""
    p = argparse.ArgumentParser(description=description)
    if data:
        p.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    p.add_argument("--output", type=Path, required=True, help="folder for the trained component")
    p.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--batch", type=int, default=batch)
    p.add_argument("--lr", type=float, default=lr)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--checkpoint_every", type=int, default=200)
    return p


class Frames:
    """The cached world: `videos` uint8 (N, T, H, W, 3), `images` by domain (N, H, W, 3), and the captions of each."""

    def __init__(self, folder: Path):
        self.videos = np.load(folder / "videos.npy", mmap_mode="r")
        with np.load(folder / "images.npz") as images:
            self.images = {domain: images[domain] for domain in images}
        self.captions: dict[str, list[str]] = json.loads((folder / "captions.json").read_text())


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float().div(127.5).sub(1)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(
    name: str,
    model: nn.Module,
    loss_step: Callable[[np.random.Generator, torch.Generator], dict[str, torch.Tensor]],
    args: argparse.Namespace,
    *,
    decay: float | None = None,
    watch: Callable[[int, nn.Module], dict] | None = None,
    watch_every: int = 0,
) -> nn.Module:
    """Run the AdamW loop to `args.steps`, resuming from `args.work` where it holds a checkpoint.

    Batches and noise are keyed by the seed, the step and the process, so a resumed run repeats what an uninterrupted
    one would do. Under `torchrun` the processes average their gradients; the first one writes.

    Args:
        name: of the checkpoint and the log.
        model: what is trained.
        loss_step: takes the step's numpy and torch generators and returns losses; `loss` is minimised.
        decay: of the weights' moving average, which is then returned; without it, the last weights are.
        watch: called with the step and the averaged model every `watch_every` steps; what it returns is logged.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.work / f"{name}.pt", args.work / f"{name}.jsonl"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay or 0.0)
    )
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    began = time.perf_counter()
    for step in range(start, args.steps):
        rng = np.random.default_rng([args.seed, step, rank])
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * processes + rank)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.steps)
        losses = loss_step(rng, generator)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if processes > 1:
            average_gradients(trained, processes)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        done = step + 1
        if rank > 0:
            continue
        seconds = spent + time.perf_counter() - began
        record = {}
        if done % 20 == 0 or done == args.steps:
            record = {key: round(float(value.detach()), 5) for key, value in losses.items()}
        if watch and watch_every and (done % watch_every == 0 or done == args.steps):
            record |= watch(done, averaged.module)
        if record:
            with log.open("a") as out:
                out.write(json.dumps({"step": done, "seconds": round(seconds, 1), **record}) + "\n")
        if done % args.checkpoint_every == 0 or done == args.steps:
            state = {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "seconds": seconds,
            }
            with atomic_file(checkpoint) as part:
                torch.save(state, part)
    return averaged.module if decay else model


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= processes
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def save_half(model: nn.Module, folder: Path) -> None:
    """Write a component in float16, the form in which the package carries it."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
