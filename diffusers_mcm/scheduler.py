"""`MCMScheduler`: multistep consistency sampling as a diffusers scheduler.

The module path and the class name are stored in saved pipelines, and diffusers finds the class again only in a module
that itself holds `SchedulerMixin`: neither may be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from .consistency import boundary_scalings, expand_like, get_prediction_type, make_betas

logger = logging.get_logger(__name__)


@dataclass
class MCMSchedulerOutput(BaseOutput):
    """
    Output of [`MCMScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`):
            The latents at the next timestep of the schedule, of the shape of the sample.
        denoised (`torch.Tensor`, *optional*):
            The consistency function's prediction of the clean latents, of the same shape.
    """

    prev_sample: torch.Tensor
    denoised: torch.Tensor | None = None


class MCMScheduler(SchedulerMixin, ConfigMixin):
    """
    Multistep consistency sampling (algorithm 1 of Song et al. 2023): predict the clean sample, add noise again for the
    next timestep. With the same settings it equals [`LCMScheduler`] bit for bit; what differs is the default
    `timestep_scaling`, the one MCM is trained with, and that half types are stepped in float32: near the last timestep
    x̂_0 is a small difference of two large tensors, divided by a small α.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps the base model was trained with.
        beta_start (`float`, defaults to 0.00085):
            First beta of the noise schedule.
        beta_end (`float`, defaults to 0.012):
            Last beta of the noise schedule.
        beta_schedule (`str`, defaults to `"scaled_linear"`):
            One of `linear`, `scaled_linear`, `squaredcos_cap_v2`.
        trained_betas (`np.ndarray` or `list[float]`, *optional*):
            The betas themselves, instead of the three arguments above.
        original_inference_steps (`int`, defaults to 50):
            Number of steps of the grid used in distillation; sampling picks its timesteps from it.
        clip_sample (`bool`, defaults to `False`):
            Clip the predicted clean sample to `[-clip_sample_range, clip_sample_range]`.
        clip_sample_range (`float`, defaults to 1.0):
            See `clip_sample`.
        set_alpha_to_one (`bool`, defaults to `True`):
            Whether the clean sample has no noise at all or that of timestep 0. Sampling never uses it; it is kept so
            that configurations can be exchanged.
        steps_offset (`int`, defaults to 0):
            Kept so that configurations can be exchanged; the grid has no offset.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the network predicts: `epsilon`, `sample` or `v_prediction`.
        thresholding (`bool`, defaults to `False`):
            Dynamic thresholding of the predicted clean sample; wins over `clip_sample`.
        dynamic_thresholding_ratio (`float`, defaults to 0.995):
            The quantile of absolute values to threshold at.
        sample_max_value (`float`, defaults to 1.0):
            The highest threshold.
        timestep_spacing (`str`, defaults to `"leading"`):
            Kept so that configurations can be exchanged; the timesteps are those of the distillation grid.
        timestep_scaling (`float`, defaults to 4.0):
            Factor on the timestep in the boundary scalings `c_skip` and `c_out`; must be the one of training.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale the betas so that the last timestep is pure noise.
    """

    _compatibles = ["LCMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 4.0,
        rescale_betas_zero_snr: bool = False,
    ):
        get_prediction_type(prediction_type)
        self._keep_timestep_scaling_on_conversion()
        self.betas = make_betas(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr
        )
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _keep_timestep_scaling_on_conversion(self) -> None:
        """Have `LCMScheduler.from_config(self.config)` sample alike.

        diffusers replaces arguments that were left at their default by the other class's default, which for this one
        would be 10. Listing it as if it had been passed prevents that.
        """
        if "_use_default_values" in self.config:
            defaults = sorted(set(self.config["_use_default_values"]) - {"timestep_scaling"})
            self.register_to_config(_use_default_values=defaults)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index of the current timestep; `None` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep, if [`~MCMScheduler.set_begin_index`] has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the schedule (for example when starting from a given video)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """Returns the sample as it is; other schedulers scale it."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """
        Choose the timesteps to sample at. To be called before sampling.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of steps, at most those of the distillation grid. Exactly one of this and `timesteps` is needed.
            device (`str` or `torch.device`, *optional*):
                Where to put the timesteps.
            original_inference_steps (`int`, *optional*):
                Number of steps of the distillation grid, if not the configured one.
            timesteps (`list[int]`, *optional*):
                The timesteps themselves, descending.
            strength (`float`, defaults to 1.0):
                The part of the schedule that is used, when starting from something other than pure noise.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "Pass exactly one of `num_inference_steps` and `timesteps`; got"
                f" num_inference_steps={num_inference_steps}, timesteps={timesteps}."
            )
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1; got {strength}.")
        grid = self._distillation_grid(original_inference_steps, strength)
        if timesteps is None:
            chosen = self._spread_over_grid(grid, num_inference_steps)
        else:
            chosen = self._check_custom_timesteps(timesteps, grid)
            chosen = chosen[len(chosen) - int(len(chosen) * strength) :]
            if len(chosen) == 0:
                raise ValueError(f"`strength` {strength} leaves none of the timesteps {list(timesteps)}.")
        if chosen[0] >= len(self.alphas_cumprod):
            raise ValueError(
                f"The schedule starts at timestep {chosen[0]}, but `trained_betas` has only {len(self.alphas_cumprod)}"
                " values."
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.from_numpy(chosen).to(device=device, dtype=torch.long)
        self._step_index = None
        self._begin_index = None

    def _distillation_grid(self, original_inference_steps: int | None, strength: float) -> np.ndarray:
        """The timesteps of distillation, descending: 999, 979, …, 19 for 50 steps."""
        steps = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        total = self.config.num_train_timesteps
        if not _is_positive_integer(steps) or steps > total:
            raise ValueError(
                f"`original_inference_steps` must be an integer from 1 to the {total} training timesteps; got {steps}."
            )
        return np.arange(int(steps * strength), 0, -1) * (total // steps) - 1

    @staticmethod
    def _spread_over_grid(grid: np.ndarray, num_inference_steps: int | None) -> np.ndarray:
        if not _is_positive_integer(num_inference_steps):
            raise ValueError(f"`num_inference_steps` must be a positive integer; got {num_inference_steps}.")
        if num_inference_steps > len(grid):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but the distillation grid has only {len(grid)} steps"
                " (`original_inference_steps` × `strength`). Use fewer steps; MCM is made for 1 to 8."
            )
        indices = np.linspace(0, len(grid), num=num_inference_steps, endpoint=False)
        return grid[np.floor(indices).astype(np.int64)]

    def _check_custom_timesteps(self, timesteps: Sequence[int], grid: np.ndarray) -> np.ndarray:
        values = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
        if values.ndim != 1 or len(values) == 0 or np.any(values != np.floor(values)):
            raise ValueError(f"`timesteps` must be a list of at least one integer; got {timesteps}.")
        values = values.astype(np.int64)
        if np.any(values[1:] >= values[:-1]):
            raise ValueError(f"`timesteps` must be descending; got {values.tolist()}.")
        last = self.config.num_train_timesteps - 1
        if values[0] > last or values[-1] < 0:
            raise ValueError(f"`timesteps` must lie in 0..{last}; got {values.tolist()}.")
        if off_grid := sorted(set(values.tolist()) - set(grid.tolist()), reverse=True):
            logger.warning(
                f"The timesteps {off_grid} are not on the grid of distillation ({grid[0]}, …, {grid[-1]}); the model"
                " was not trained for them."
            )
        return values

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The index of `timestep` in the schedule."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (schedule == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"Timestep {timestep} is not one of the schedule's: {schedule.tolist()}.")
        return found[0]

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep after this one in the schedule, -1 after the last."""
        if self.num_inference_steps is None:
            return timestep - 1
        index = self.index_for_timestep(timestep) + 1
        return self.timesteps[index] if index < len(self.timesteps) else torch.tensor(-1)

    def get_scalings_for_boundary_condition_discrete(self, timestep):
        """`c_skip` and `c_out` at a timestep."""
        return boundary_scalings(timestep, self.config.timestep_scaling)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Predict the clean sample and add noise again for the next timestep (none after the last).

        Computed in float32 for half types, and returned in the type of `sample`.

        Args:
            model_output (`torch.Tensor`):
                The network's output for `sample` at `timestep`.
            timestep (`int` or `torch.Tensor`):
                The current timestep, one for the whole batch.
            sample (`torch.Tensor`):
                The current latents, `(B, C, T, H, W)` or any other shape with the batch first.
            generator (`torch.Generator` or a list of them, *optional*):
                One for the batch, or one for each sample.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`MCMSchedulerOutput`] or a tuple.

        Returns:
            [`MCMSchedulerOutput`] or the tuple `(prev_sample, denoised)`.
        """
        timestep = self._check_step(model_output, timestep, sample, generator)
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} steps of the schedule have been taken; call `set_timesteps` to start over."
            )

        dtype, working = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        model_output, sample = model_output.to(working), sample.to(working)
        # Coefficients are float32 scalars, whatever the sample's type.
        alpha_bar = self.alphas_cumprod[timestep]
        predict_x0 = get_prediction_type(self.config.prediction_type).x0
        x0 = predict_x0(model_output, sample, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        x0 = self._limit(x0)
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(timestep)
        denoised = c_out * x0 + c_skip * sample

        self._step_index += 1
        prev_sample = denoised
        if self._step_index < len(self.timesteps):
            alpha_bar = self.alphas_cumprod[self.timesteps[self._step_index]]
            noise = randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=denoised.dtype)
            prev_sample = alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * noise

        prev_sample, denoised = prev_sample.to(dtype), denoised.to(dtype)
        if not return_dict:
            return prev_sample, denoised
        return MCMSchedulerOutput(prev_sample=prev_sample, denoised=denoised)

    def _check_step(self, model_output, timestep, sample, generator) -> int | torch.Tensor:
        """Checks the arguments of `step`; returns the timestep as a number or a tensor without dimensions."""
        if self.num_inference_steps is None:
            raise ValueError("`step` needs a schedule: call `set_timesteps` first.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}; got"
                f" {tuple(model_output.shape)}."
            )
        if isinstance(generator, (list, tuple)) and len(generator) not in (1, sample.shape[0]):
            raise ValueError(
                f"A list of generators must have one for each of the {sample.shape[0]} samples; got {len(generator)}."
            )
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"`timestep` must be one for the whole batch; got shape {tuple(timestep.shape)}.")
            return timestep.reshape(())
        return timestep

    def _limit(self, x0: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding or clipping of the predicted clean sample, if configured."""
        if self.config.thresholding:
            flat = x0.flatten(1)
            limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(min=1, max=self.config.sample_max_value)
            return (torch.clamp(flat, -limit, limit) / limit).reshape(x0.shape)
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε, computed in float32 for half types, returned in the type of `original_samples`.

        `timesteps` is (B,) or (1,).
        """
        return self._mix(original_samples, noise, timesteps, original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = α_t ε − σ_t x_0, computed in float32 for half types, returned in the type of `sample`."""
        return self._mix(noise, -sample, timesteps, sample.dtype)

    def _mix(self, first, second, timesteps, dtype) -> torch.Tensor:
        """α_t · first + σ_t · second."""
        working = torch.promote_types(dtype, torch.float32)
        alpha_bar = self.alphas_cumprod.to(first.device)[timesteps.to(first.device)].to(working)
        alpha, sigma = expand_like(alpha_bar.sqrt(), first), expand_like((1 - alpha_bar).sqrt(), first)
        return (alpha * first.to(working) + sigma * second.to(working)).to(dtype)


def _is_positive_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and int(value) > 0
