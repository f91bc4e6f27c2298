"""The sampling methods that the demo shows and the figures measure: each is a row of one table."""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .captions import Caption


class Method(NamedTuple):
    """One way to make a video. `guidance` above 1 calls the network twice a step."""

    name: str
    label: str
    network: str
    sampler: str
    steps: int
    guidance: float = 1.0


# the teacher's guidance is what `diffusers-mcm shapes figures` found best on training captions
TEACHER_METHODS = (
    Method("teacher-ddim-50", "teacher, DDIM, 50 steps", "teacher", "ddim", 50, 3.0),
    Method("teacher-ddim-4", "teacher, DDIM, 4 steps", "teacher", "ddim", 4, 3.0),
    Method("teacher-dpm-4", "teacher, DPM++, 4 steps", "teacher", "dpm++", 4, 2.0),
)
MCM_METHODS = tuple(
    Method(f"mcm-{steps}", f"MCM, {steps} step{'s'[: steps > 1]}", "mcm", "mcm", steps) for steps in (1, 2, 4, 8)
)
LCM_METHODS = tuple(
    Method(f"lcm-{steps}", f"LCM, {steps} step{'s'[: steps > 1]}", "lcm", "mcm", steps) for steps in (1, 2, 4)
)


class Networks:
    """The pipelines of the methods, each loaded when first asked for, with its LoRA fused.

    `sources` are what `MCMPipeline.from_pretrained` takes, by network ("teacher", "mcm", "lcm").
    """

    def __init__(self, sources: Mapping[str, str], device: str = "cpu"):
        self.sources, self.device = sources, device
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def pipeline(self, network: str):
        """The pipeline with the scheduler it came with."""
        if network not in self._loaded:
            from .. import MCMPipeline

            pipeline = MCMPipeline.from_pretrained(self.sources[network]).to(self.device)
            pipeline.set_progress_bar_config(disable=True)
            if pipeline.get_active_adapters():
                pipeline.fuse_lora()  # as anyone would who makes more than one video
            self._loaded[network] = pipeline, pipeline.scheduler
        pipeline, pipeline.scheduler = self._loaded[network]
        return pipeline

    def sample(self, method: Method, prompts: Sequence[Caption | str], seeds: Sequence[int]) -> np.ndarray:
        """One video per prompt and seed -> uint8 (N, T, H, W, 3). A seed means the same start for every method."""
        import torch

        from .. import make_scheduler
        from ..video_io import to_uint8

        pipeline = self.pipeline(method.network)
        pipeline.scheduler = make_scheduler(method.sampler, pipeline)
        videos = pipeline(
            [str(prompt) for prompt in prompts],
            num_inference_steps=method.steps,
            guidance_scale=method.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).frames
        return np.stack([to_uint8(video) for video in videos])

    def timed(
        self, method: Method, prompts: Sequence[Caption | str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, float]:
        """What `sample` makes, and the seconds per video from prompt to pixels, where all are made at once."""
        self.pipeline(method.network)  # loading is not sampling
        start = time.perf_counter()
        videos = self.sample(method, prompts, seeds)
        return videos, (time.perf_counter() - start) / len(videos)

    def timed_in_turns(
        self, methods: Sequence[Method], batches: Sequence[tuple[Sequence[Caption | str], Sequence[int]]]
    ) -> Iterator[tuple[Method, np.ndarray, float]]:
        """Of each batch, prompts and their seeds, what `timed` says of every method, the methods in turn.

        So other load on the machine falls on all. Each has made a first batch before, which is slower.
        """
        for method in methods:
            self.sample(method._replace(steps=1), *batches[0])
        for batch in batches:
            for method in methods:
                yield method, *self.timed(method, *batch)


def machine(device: str) -> str:
    """What the seconds were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}"
