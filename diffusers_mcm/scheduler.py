"""Multistep consistency sampling as diffusers schedulers: `MCMScheduler`, and `MCMFlowScheduler` for the flow path.

The module path and the class names are stored in saved pipelines, and diffusers finds a class again only in a module
that itself holds `SchedulerMixin`: none of them may be moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .consistency import (
    BETA_SCHEDULES,
    FLOW_SHIFT,
    FLOW_STEPS,
    PREDICTION_TYPES,
    SAME,
    FlowPath,
    check_known,
    working,
)
from .scheduler_common import (
    StepCounter,
    as_timesteps,
    check_in_schedule,
    check_step,
    check_trained,
    is_positive_integer,
)

logger = logging.get_logger(__name__)
MCMSchedulerOutput = LCMSchedulerOutput  # `prev_sample` and `denoised`, each of the shape of the sample


class MCMScheduler(LCMScheduler):
    """
    Multistep consistency sampling (algorithm 1 of Song et al. 2023): predict the clean sample, add noise again for the
    next timestep. It is [`LCMScheduler`], whose arguments it takes, but for three things: `timestep_scaling` is by
    default 4.0, the one MCM is trained with; half types are stepped in float32, since near the last timestep x̂_0 is a
    small difference of two large tensors, divided by a small α; and what makes no sense is refused with the reason.

    `steps_offset`, `set_alpha_to_one` and `timestep_spacing` are there so that configurations can be exchanged only:
    the timesteps are picked from the grid of distillation, and the last sample has no noise.
    """

    _compatibles = ["LCMScheduler"]

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
        check_known("prediction_type", prediction_type, PREDICTION_TYPES)
        if trained_betas is None:
            check_known("beta_schedule", beta_schedule, BETA_SCHEDULES)
        super().__init__(**self.config)
        # `LCMScheduler.from_config(self.config)` replaces arguments that were left at their default by its own, which
        # for this one is 10. Listed as if it had been passed, it stays.
        if "_use_default_values" in self.config:
            defaults = sorted(set(self.config["_use_default_values"]) - {"timestep_scaling"})
            self.register_to_config(_use_default_values=defaults)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the timesteps to sample at. To be called before sampling, with what [`LCMScheduler`] takes.

        Exactly one of `num_inference_steps`, at most those of the distillation grid, and `timesteps`, descending, is
        needed. `original_inference_steps` are those of that grid, if not the configured ones; `strength` is the part
        of the schedule that is used, when starting from something other than pure noise.
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
            chosen = self._check_custom_timesteps(timesteps, grid, strength)
        if chosen[0] >= len(self.alphas_cumprod):
            raise ValueError(
                f"The schedule starts at timestep {chosen[0]}, but `trained_betas` has only {len(self.alphas_cumprod)}"
                " values."
            )
        self.custom_timesteps, self.num_inference_steps = timesteps is not None, len(chosen)
        self.timesteps = torch.from_numpy(chosen).to(device=device, dtype=torch.long)
        self._step_index = self._begin_index = None

    def _distillation_grid(self, original_inference_steps: int | None, strength: float) -> np.ndarray:
        """The timesteps of distillation, descending: 999, 979, …, 19 for 50 steps."""
        steps = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        total = self.config.num_train_timesteps
        if not is_positive_integer(steps) or steps > total:
            raise ValueError(
                f"`original_inference_steps` must be an integer from 1 to the {total} training timesteps; got {steps}."
            )
        return np.arange(int(steps * strength), 0, -1) * (total // steps) - 1

    @staticmethod
    def _spread_over_grid(grid: np.ndarray, num_inference_steps: int | None) -> np.ndarray:
        if not is_positive_integer(num_inference_steps):
            raise ValueError(f"`num_inference_steps` must be a positive integer; got {num_inference_steps}.")
        if num_inference_steps > len(grid):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but the distillation grid has only {len(grid)} steps"
                " (`original_inference_steps` × `strength`). Use fewer steps; MCM is made for 1 to 8."
            )
        return grid[np.linspace(0, len(grid), num=num_inference_steps, endpoint=False).astype(np.int64)]

    def _check_custom_timesteps(self, timesteps: Sequence[int], grid: np.ndarray, strength: float) -> np.ndarray:
        values = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
        if values.ndim != 1 or len(values) == 0 or np.any(values != np.floor(values)):
            raise ValueError(f"`timesteps` must be a list of at least one integer; got {timesteps}.")
        values = values.astype(np.int64)
        last = self.config.num_train_timesteps - 1
        if np.any(values[1:] >= values[:-1]):
            raise ValueError(f"`timesteps` must be descending; got {values.tolist()}.")
        if values[0] > last or values[-1] < 0:
            raise ValueError(f"`timesteps` must lie in 0..{last}; got {values.tolist()}.")
        if off_grid := sorted(set(values.tolist()) - set(grid.tolist()), reverse=True):
            logger.warning(
                f"The timesteps {off_grid} are not on the grid of distillation ({grid[0]}, …, {grid[-1]}); the model"
                " was not trained for them."
            )
        used = int(len(values) * strength)
        if used == 0:
            raise ValueError(f"`strength` {strength} leaves none of the timesteps {list(timesteps)}.")
        return values[-used:]

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The index of `timestep` in the schedule."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        check_in_schedule(timestep, schedule)
        return super().index_for_timestep(timestep, schedule)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep after this one in the schedule, -1 after the last; without a schedule that below it."""
        if self.num_inference_steps is not None:
            check_in_schedule(timestep, self.timesteps)
        return super().previous_timestep(timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Predict the clean sample and add noise again for the next timestep (none after the last).

        Computed in float32 for half types, and returned in the type of `sample`, which is `(B, C, T, H, W)` or any
        other shape with the batch first. There is one `timestep` for the whole batch, and one generator, or one for
        each sample. Without `return_dict` it returns the tuple `(prev_sample, denoised)`.
        """
        timestep = check_step(self, model_output, timestep, sample, generator)
        check_in_schedule(timestep, self.timesteps)
        stepped = super().step(working(model_output), timestep, working(sample), generator, return_dict=False)
        prev_sample, denoised = (each.to(sample.dtype) for each in stepped)
        return MCMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε, computed in float32 for half types, returned in the type of `original_samples`.

        `timesteps` is (B,) or (1,).
        """
        check_trained(timesteps, len(self.alphas_cumprod))
        return super().add_noise(working(original_samples), working(noise), timesteps).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = α_t ε − σ_t x_0, computed in float32 for half types, returned in the type of `sample`."""
        check_trained(timesteps, len(self.alphas_cumprod))
        return super().get_velocity(working(sample), working(noise), timesteps).to(sample.dtype)


class MCMFlowScheduler(StepCounter, SchedulerMixin, ConfigMixin):
    """
    Multistep consistency sampling on the path of flow-matching models, x_t = (1 − σ) x_0 + σ ε with t = 1000 σ:
    predict the clean sample, x̂_0 = x_t − σ v, and add noise again for the next timestep. A drop-in in diffusers'
    `WanPipeline`, which however gives it no generator: the noise it adds is then torch's global one.

    Args:
        num_train_timesteps (`int`, defaults to 1000): t where σ is 1.
        shift (`float`, defaults to 5.0): Of the grid that the student was distilled on, σ = s u / (1 + (s − 1) u). It
            is the student's own; what its teacher is sampled with, `flow_shift` or `shift` of other schedulers, is
            not taken over.
        original_inference_steps (`int`, defaults to 48): Points of that grid, u = 1/48, …, 1, of which sampling visits
            some, evenly spaced: 1000, 937.5, 833.33 and 625 in four steps.
        stochastic (`bool`, defaults to `True`): `False` takes Euler steps instead of adding fresh noise. They need no
            student, so that more of them than the grid has points can be taken: u = 1/n, …, 1.
        boundary (`float`, *optional*): The σ where two experts meet, each a student of its own phase, as 0.875 of Wan
            2.2 A14B. What the first one predicts lies there, and is what the second one starts from: of all steps that
            are not above the boundary, the first is at it.
        trained_timesteps (`list[float]`, *optional*): The timesteps of a student that was trained at some that are on
            no such grid, descending, as those of FastWan. As many steps visit these, another number those of the grid.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = FLOW_SHIFT,
        original_inference_steps: int = FLOW_STEPS,
        stochastic: bool = True,
        boundary: float | None = None,
        trained_timesteps: Sequence[float] | None = None,
    ):
        if not is_positive_integer(original_inference_steps):
            raise ValueError(f"`original_inference_steps` must be a positive integer; got {original_inference_steps}.")
        self.path = FlowPath(shift, num_train_timesteps)
        self.phases = (self.path,) if boundary is None else self.path.split(boundary)
        self.num_inference_steps: int | None = None
        self._trained: torch.Tensor | None = None
        if trained_timesteps is not None:
            self._trained = as_timesteps("trained_timesteps", trained_timesteps, num_train_timesteps)
        self._take(self._grid())

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs):
        """As every scheduler's; of a scheduler of another class only `num_train_timesteps` is taken over.

        What a later version of this one has in its configuration besides is passed over with a warning.
        """
        if isinstance(config, Mapping) and not cls._is_own(config):
            config = {key: value for key, value in config.items() if key == "num_train_timesteps"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _is_own(cls, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is one of this class, as it says, or else as its keys do."""
        if "_class_name" in config:
            return config["_class_name"] == cls.__name__
        known = cls._get_init_keys(cls)
        return {"shift", "original_inference_steps"} <= config.keys() or all(
            key in known or key.startswith("_") for key in config
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- the timesteps -----------------------------------------------------------------------------------------------
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the timesteps to sample at. To be called before sampling.

        Exactly one of them is needed: `num_inference_steps`, where noise is added in each at most those of the
        distillation grid, or the points themselves, descending, as `timesteps`, above 0 and at most
        `num_train_timesteps`, or as `sigmas`, which are those divided by it. They are visited as they are given:
        nothing is shifted a second time.
        """
        given = dict(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if sum(each is not None for each in given.values()) != 1:
            named = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"Pass exactly one of `num_inference_steps`, `timesteps` and `sigmas`; got {named}.")
        if num_inference_steps is not None:
            chosen = self._spread(num_inference_steps)
        elif timesteps is not None:
            chosen = self._given("timesteps", timesteps)
        else:
            chosen = self._given("sigmas", sigmas, 1)
        self.num_inference_steps = len(chosen)
        self._take(chosen, device)

    def _take(self, chosen: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Visit these timesteps; `sigmas` are those divided by `num_train_timesteps`, and 0, on the CPU."""
        self._phase_of_step = [0] * len(chosen)
        if len(self.phases) == 2:
            start = chosen.new_tensor(self.phases[1].start_timestep)
            is_start = (chosen - start).abs() <= start * SAME
            chosen = torch.where(is_start, start, chosen)
            self._phase_of_step = (chosen <= start).int().tolist()
        self.sigmas = torch.cat([chosen / self.config.num_train_timesteps, torch.zeros(1)])
        if len(self.phases) == 2:  # `WanPipeline` asks the second expert below the boundary only
            chosen = torch.where(is_start, torch.nextafter(start, torch.zeros(())), chosen)
        self._begin_anew(chosen.to(device))

    def _grid(self) -> torch.Tensor:
        """The timesteps of distillation, descending."""
        return torch.cat(
            [phase.solver_timesteps(self.config.original_inference_steps).flip(0) for phase in self.phases]
        )

    def _spread(self, num_inference_steps: int) -> torch.Tensor:
        grid = self.config.original_inference_steps
        if not is_positive_integer(num_inference_steps) or self.config.stochastic and num_inference_steps > grid:
            raise ValueError(
                f"`num_inference_steps` must be an integer from 1 to the {grid} steps of the distillation grid"
                f" (`original_inference_steps`); got {num_inference_steps}. MCM is made for 1 to 8. A model that was"
                " not distilled is sampled in more steps without fresh noise: `stochastic=False`."
            )
        if self._trained is not None and num_inference_steps == len(self._trained):
            return self._trained
        chosen = [
            phase.visited_timesteps(num_inference_steps, max(grid, num_inference_steps)) for phase in self.phases
        ]
        if not len(chosen[-1]):
            logger.warning(
                f"No step of {num_inference_steps} lies below the boundary {self.config.boundary}: the second expert,"
                " which finishes what the first one begins, does nothing. Take 2 steps or more."
            )
        return torch.cat(chosen)

    def _given(self, name: str, values: Any, largest: float | None = None) -> torch.Tensor:
        chosen = as_timesteps(name, values, self.config.num_train_timesteps, largest)
        trained = self._grid() if self._trained is None else torch.cat([self._grid(), self._trained])
        off_grid = [t for t in chosen.tolist() if (trained - t).abs().min() > 1e-2]
        if off_grid and self.config.stochastic:
            logger.warning(f"The timesteps {off_grid} are not on the grid of distillation; no student learnt them.")
        if len(self.phases) == 2:
            self._warn_of_a_step_over(self.phases[1].start_timestep, chosen)
        return chosen

    def _warn_of_a_step_over(self, start: float, chosen: torch.Tensor) -> None:
        if chosen[0] > start > chosen[-1] and (chosen - start).abs().min() > start * SAME:
            logger.warning(
                f"A step goes past {start:g}, where the second expert starts, and beyond what the first one learnt;"
                " give that timestep, too."
            )

    # --- diffusers' interface ----------------------------------------------------------------------------------------
    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = (1 − σ) x_0 + σ ε in the type of `original_samples`; `timesteps` is (B,) or (1,)."""
        return self.path.add_noise(original_samples, noise, timesteps.expand(len(original_samples)))

    # --- a step ------------------------------------------------------------------------------------------------------
    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Predict the clean sample and go on to the next timestep, with fresh noise or, if not `stochastic`, without.

        Computed in float32 for half types, and returned in the type of `sample`, which is `(B, C, T, H, W)` or any
        other shape with the batch first. There is one `timestep` for the whole batch, and one generator, or one for
        each sample. Without `return_dict` it returns the tuple `(prev_sample, denoised)`.
        """
        index = self._next_index(check_step(self, model_output, timestep, sample, generator))
        x, v = working(sample), working(model_output)
        sigma, sigma_next = (float(each) for each in self.sigmas[index : index + 2])
        denoised, (here, *later) = x - sigma * v, self._phase_of_step[index : index + 2]
        if self.config.stochastic and later == [here]:
            phase = self.phases[here]
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            keep, add = phase.again_scalings(sigma_next)
            landed = denoised if phase.ends_clean else x + (phase.end - sigma) * v
            prev_sample = keep * landed + add * noise
        else:  # to 0, or to where the next expert starts, which is where this one's predictions lie
            prev_sample = denoised if not sigma_next else x + (sigma_next - sigma) * v
        self._step_index = index + 1
        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        return MCMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)
