"""What is wrong with the arguments of a scheduler, and of a step that it shall take; which step is due."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeGuard

import torch


def check_in_schedule(timestep: float | torch.Tensor, schedule: torch.Tensor) -> None:
    """`ValueError` unless a schedule has this timestep."""
    if not (schedule == timestep).any():
        raise ValueError(f"Timestep {timestep} is not one of the schedule's: {schedule.tolist()}.")


def check_trained(timesteps: torch.Tensor, count: int) -> None:
    """`ValueError` unless these are timesteps of the training, which are 0 to `count` - 1."""
    if ((timesteps < 0) | (timesteps >= count)).any():
        raise ValueError(f"`timesteps` must lie in 0..{count - 1}, those of the training; got {timesteps.tolist()}.")


def as_timesteps(name: str, values: Any, count: int, largest: float | None = None) -> torch.Tensor:
    """What the argument `name` gives as points to visit, 0 (which is none) to `largest`, as timesteps up to `count`.

    `largest` is `count` if nothing is said. `ValueError` unless the points can be visited.
    """
    largest = largest or count
    points = torch.as_tensor(values, dtype=torch.float64).cpu()
    if points.ndim != 1 or not len(points) or points.min() <= 0 or points.max() > largest:
        raise ValueError(f"`{name}` must be numbers above 0 and at most {largest}; got {values}.")
    if (points.diff() >= 0).any():
        raise ValueError(f"`{name}` must be descending; got {values}.")
    return (points * (count / largest)).to(torch.float32)


def check_step(scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any) -> Any:
    """Checks the arguments of `step`; returns the timestep as a number or a tensor without dimensions."""
    if scheduler.num_inference_steps is None:
        raise ValueError("`step` needs a schedule: call `set_timesteps` first.")
    index = scheduler._begin_index if scheduler._step_index is None else scheduler._step_index
    if (index or 0) >= (length := len(scheduler.timesteps)):
        raise ValueError(f"All {length} steps of the schedule have been taken; call `set_timesteps` to start over.")
    if model_output.shape != sample.shape:
        raise ValueError(
            f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}; got {tuple(model_output.shape)}."
        )
    if isinstance(generator, (list, tuple)) and len(generator) not in (1, sample.shape[0]):
        raise ValueError(
            f"A list of generators must have one for each of the {sample.shape[0]} samples; got {len(generator)}."
        )
    if not isinstance(timestep, torch.Tensor):
        return timestep
    if timestep.numel() != 1:
        raise ValueError(f"`timestep` must be one for the whole batch; got shape {tuple(timestep.shape)}.")
    return timestep.reshape(())


def is_positive_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number above 0."""
    return isinstance(value, Integral) and int(value) > 0


class StepCounter:
    """What diffusers' pipelines ask a scheduler about where it is in its schedule."""

    timesteps: torch.Tensor

    def _begin_anew(self, timesteps: torch.Tensor) -> None:
        self.timesteps = timesteps
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The index of the next step; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where sampling begins, if a pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this step of the schedule."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def _next_index(self, timestep: float | torch.Tensor) -> int:
        """The index of the step that is due; the first is where `set_begin_index` or the timestep says."""
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None:
            check_in_schedule(timestep, self.timesteps)
            index = int((self.timesteps == timestep).nonzero()[0])
        return index
