"""Few-step LoRAs and models for Wan that others have made, and how their makers sample them, for comparison with MCM.

What is said here was read in the makers' code and configurations. None of it was run with their weights: what is
tested is that files of these layouts load wholly, and that the settings reach the sampler.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from ..location import Location
from ..lora import find_pair
from ..scheduler import MCMFlowScheduler

AUTO = "auto"  # of `few_step_named`: the row that a name is recognised by


@dataclass(frozen=True)
class FewStep:
    """How a few-step LoRA or model is sampled.

    Attributes:
        title: what it is called, by whom it is.
        pattern: what the names of its files or repositories have in them.
        base_model: the repository of what it is for or, of a model, of what it was made from.
        kind: the name of that base model here.
        shift: of the grid of timesteps.
        steps: how many of its points are visited.
        timesteps: those that are visited instead in that many steps, where they are on no such grid.
        stochastic: whether fresh noise is added in each step; else they are Euler's.
        strength: of a LoRA.
        boundary: the σ where the two experts of a pair take turns.
        source: where that is said.
    """

    title: str
    pattern: re.Pattern[str]
    base_model: str
    shift: float
    steps: int
    timesteps: tuple[float, ...] | None = None
    stochastic: bool = False
    strength: float = 1.0
    boundary: float | None = None
    kind: str = "wan"
    source: str = ""

    def set_up(self, pipeline: DiffusionPipeline) -> None:
        """Have a pipeline that holds the LoRA or model sample as its makers do; `ValueError` if it is for another."""
        base = pipeline.base_model.name
        if base != self.kind:
            raise ValueError(
                f"{self.title} is for a {self.kind}, such as {self.base_model}; this is a {base}. Load that one, or"
                " take the settings of what you have loaded."
            )
        experts = pipeline.config.get("boundary_ratio")
        if self.boundary != experts:
            raise ValueError(
                f"{self.title} is for {self.base_model}, whose two experts meet at {self.boundary}; those of this"
                f" {base} meet at {experts}."
            )
        pipeline.scheduler = MCMFlowScheduler(
            shift=self.shift,
            stochastic=self.stochastic,
            trained_timesteps=None if self.timesteps is None else list(self.timesteps),
        )
        pipeline.register_to_config(num_inference_steps=self.steps)
        if self.strength != 1.0:
            pipeline.set_adapters(pipeline.get_active_adapters(), self.strength)


def _angles(*angles: float) -> tuple[float, ...]:
    """Timesteps of TrigFlow's angles: x = cos a x_0 + sin a ε is (1 − σ) x_0 + σ ε scaled, σ = sin / (sin + cos)."""
    return tuple(1000 * math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles)


_NAMED = re.compile
_DMD = (1000.0, 757.0, 522.0)
# rCM begins at a σ of 80 on the path of diffusion, not with pure noise
_RCM = _angles(math.atan(80), 1.5, 1.4, 1.0)
_FASTVIDEO = "FastVideo, its WanDMDPipeline: dmd_denoising_steps and flow_shift"
FEW_STEP: dict[str, FewStep] = {
    "lightx2v": FewStep(
        "LightX2V's LoRA for Wan 2.1 T2V 14B",
        _NAMED(r"(?i)^(?!.*(wan[._-]?2[._]?2|i2v)).*lightx2v"),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        shift=5.0,
        steps=4,
        source="LightX2V, configs/distill/wan21/wan_t2v_distill_lora_4step_cfg.json; its step-distill scheduler",
    ),
    "wan2.2-lightning": FewStep(
        "Wan2.2-Lightning's and LightX2V's pairs for Wan 2.2 T2V A14B",
        _NAMED(r"(?i)^(?!.*i2v).*(wan[._-]?2[._]?2.*(lightning|lightx2v|distill)|a14b-4steps)"),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        shift=5.0,
        steps=4,
        boundary=0.875,
        kind="wan-a14b",
        source="Wan2.2-Lightning, generate.py (Euler); LightX2V, configs/distill/wan22/wan_moe_t2v_distill_lora.json",
    ),
    "fastwan": FewStep(
        "FastWan 2.1 T2V, 1.3B or 14B",
        _NAMED(r"(?i)fastwan[._-]?2[._]?1"),
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        shift=8.0,
        steps=3,
        timesteps=_DMD,
        stochastic=True,
        source=_FASTVIDEO,
    ),
    "fastwan-5b": FewStep(
        "FastWan 2.2 TI2V 5B",
        _NAMED(r"(?i)fastwan[._-]?2[._]?2"),
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        shift=5.0,
        steps=3,
        timesteps=_DMD,
        stochastic=True,
        kind="wan-ti2v",
        source=_FASTVIDEO,
    ),
    "rcm": FewStep(
        "rCM of Wan 2.1 T2V, 1.3B or 14B",
        _NAMED(r"(?i)(^|[^a-z])rcm([^a-z]|$)"),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        shift=5.0,
        steps=4,
        timesteps=_RCM,
        stochastic=True,
        source="NVlabs/rcm, rcm/inference/wan2pt1_t2v_rcm_infer.py",
    ),
}


def few_step_named(name: str, files: Iterable[str | os.PathLike | None] = ()) -> FewStep:
    """A row of the table, or with `"auto"` that for the names of what is loaded: of a folder on this machine that
    holds a pair those of both its files, too.

    Raises:
        ValueError: for a name that is not in the table, or if nothing is recognised, or more than one thing.
    """
    if name in FEW_STEP:
        return FEW_STEP[name]
    if name != AUTO:
        raise ValueError(f"expected the settings of one of {', '.join((AUTO, *FEW_STEP))}, got {name!r}")
    given = [os.fspath(each) for each in files if each]
    found = recognised([*given, *_pairs_in(given)])
    if len(found) != 1:
        what = f"several: {', '.join(found)}" if found else "none"
        raise ValueError(
            f"expected a name by which one of {', '.join(FEW_STEP)} is recognised, got"
            f" {' and '.join(given) or 'none'}, which tells {what}. Name the settings themselves"
        )
    return FEW_STEP[found[0]]


def _pairs_in(names: Iterable[str]) -> list[str]:
    """The files of the pairs that lie in folders of these names on this machine."""
    pairs = (find_pair(Location.of(name)) for name in names if os.path.isdir(name))
    return [os.fspath(half.lora_file()) for pair in pairs if pair for half in pair]


def recognised(names: Iterable[str | os.PathLike]) -> list[str]:
    """The rows of the table that names of files or repositories have in them."""
    told = [_told(os.fspath(name)) for name in names]
    return [row for row, what in FEW_STEP.items() if any(map(what.pattern.search, told))]


def _told(name: str) -> str:
    """What a name tells: of a file on this machine nothing but its own, and that of the folder that it lies in."""
    path = os.path.normpath(name)
    return "/".join(path.split(os.sep)[-2:])
