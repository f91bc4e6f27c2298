"""The packaged v-prediction teacher as a flow-matching one: the same network, read along the straight path.

A point x = (1 − σ) x_0 + σ ε of the straight path, times s = 1 / √((1 − σ)² + σ²), is a point α x_0 + σ' ε of the
variance-preserving one, with α = (1 − σ) s and σ' = σ s: the network is asked there, at the timestep of the same
signal-to-noise ratio σ' / α. Nothing is trained and nothing is lost, and an Euler step is a DDIM step.

    python flow_teacher.py FOLDER          # writes it as a repository, which MCMPipeline loads where this is imported
"""

import json
import shutil
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin as ModelMixin  # noqa: PLC0414 - diffusers loads a class only from a module that holds it
from diffusers import SchedulerMixin, UNet3DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from train_teacher import SCHEDULE

from diffusers_mcm import ModelScopeMCMPipeline
from diffusers_mcm.base_models import BASE_MODELS
from diffusers_mcm.base_models.modelscope import ModelScope
from diffusers_mcm.base_models.wan import Wan
from diffusers_mcm.consistency import FLOW_SHIFT, FLOW_STEPS, FlowPath, VariancePreservingPath, expand_like
from diffusers_mcm.files import atomic_folder
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.scheduler import MCMFlowScheduler


@lru_cache(1)
def noise_to_signal() -> np.ndarray:
    """log(σ' / α) of each timestep that the network was trained for, ascending, float64."""
    path = VariancePreservingPath.from_scheduler_config(SCHEDULE)
    return np.log(path.sigmas.double().numpy()) - np.log(path.alphas.double().numpy())


def timestep_of(sigma: torch.Tensor) -> torch.Tensor:
    """The variance-preserving timestep with the signal-to-noise ratio of σ, a real number, in the type of σ.

    Between two timesteps log(σ' / α) is taken as linear. Beyond the first and the last, where the network never was
    (σ below 0.0099 and above 0.9937), it is the first and the last.
    """
    ratio = torch.logit(sigma.double().cpu())  # log(σ / (1 − σ))
    table = noise_to_signal()
    return torch.from_numpy(np.interp(ratio.numpy(), table, np.arange(len(table)))).to(sigma)


class FlowUNet3DConditionModel(UNet3DConditionModel):
    """A UNet3D that was trained to predict v on the shapes teacher's schedule, and predicts ε − x_0 at t = 1000 σ."""

    def forward(self, sample, timestep, encoder_hidden_states, *args, return_dict: bool = True, **options):
        """`sample` (B, C, T, H, W) on the straight path, `timestep` in 0..1000, a number, () or (B,)."""
        timestep = torch.as_tensor(timestep, device=sample.device).to(sample.dtype)
        sigma = timestep.expand(len(sample)) / SCHEDULE["num_train_timesteps"]
        scale = torch.hypot(1 - sigma, sigma)
        alpha_like, sigma_like, scale_like = (
            expand_like(x, sample) for x in ((1 - sigma) / scale, sigma / scale, scale)
        )
        x = sample / scale_like
        (v,) = super().forward(x, timestep_of(sigma), encoder_hidden_states, *args, return_dict=False, **options)
        # ε̂ − x̂_0, with ε̂ = σ' x + α v and x̂_0 = α x − σ' v
        flow = (sigma_like - alpha_like) * x + (alpha_like + sigma_like) * v
        return UNet3DConditionOutput(sample=flow) if return_dict else (flow,)


class FlowModelScope(ModelScope):
    """The shapes teacher on the flow path: ModelScope's networks, Wan's path and sampler."""

    name = "modelscope-flow"
    denoiser_classes = ("FlowUNet3DConditionModel",)
    num_solver_steps = FLOW_STEPS
    scheduler_class = MCMFlowScheduler
    scheduler_defaults = Wan.scheduler_defaults
    noise_schedule_keys = Wan.noise_schedule_keys
    described_scheduler_keys = Wan.described_scheduler_keys
    student_settings = {"shift": FLOW_SHIFT}

    def noise_path(self, scheduler_config: Mapping[str, Any] | None = None, **student: Any) -> FlowPath:
        return Wan.noise_path(self, scheduler_config, **student)

    def student_scheduler(self, config: Mapping[str, Any], **student: Any) -> SchedulerMixin:
        return Wan.student_scheduler(self, config, **student)


class FlowModelScopeMCMPipeline(ModelScopeMCMPipeline):
    """Few-step text to video with the shapes teacher on the flow path."""

    base_model = FlowModelScope()


BASE_MODELS[FlowModelScope.name] = FlowModelScopeMCMPipeline.base_model


def write_repository(folder: Path, teacher: Path = PACKAGED_FOLDER / "mcm-shapes-teacher") -> Path:
    """Write the packaged teacher as a flow teacher, weights and all, in the layout of diffusers; the folder."""
    with atomic_folder(folder) as part:
        leave = shutil.ignore_patterns("logs", "README.md", "scheduler")
        shutil.copytree(teacher, part, ignore=leave, dirs_exist_ok=True)
        MCMFlowScheduler().save_pretrained(part / "scheduler")
        index = json.loads((part / "model_index.json").read_text())
        index["unet"] = ["flow_teacher", FlowUNet3DConditionModel.__name__]
        index["scheduler"] = ["diffusers_mcm.scheduler", MCMFlowScheduler.__name__]
        (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    write_repository(Path(sys.argv[1]))
