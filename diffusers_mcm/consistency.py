"""The noise path and the consistency function on it (section 2 of the paper).

A *path* says how a clean latent becomes noise, x_t = α_t x_0 + σ_t ε, and how the network's output is read along it.
Everything that depends on the kind of path is here; teacher, trajectory and losses only ask the path.
The student of one of two experts learns a *phase* of a path alone: from where the phase starts to where it ends.
Latents are (B, C, T, H, W), timesteps are (B,), integers or real numbers as the path says.
Coefficients and arithmetic are float32 whatever the latents' type; results come back in the type of the latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import LCMScheduler

TIMESTEP_SCALING = 4.0
SIGMA_DATA = 0.5


def boundary_scalings(timestep, timestep_scaling: float = TIMESTEP_SCALING, sigma_data: float = SIGMA_DATA):
    """c_skip and c_out of eq. 1, such that f(x, 0) = x. `timestep` is a number or a tensor; so are the results."""
    scaled = timestep * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
    return c_skip, c_out


class PredictionType(NamedTuple):
    """How x̂_0 and ε̂ are read off a network's output at x_t = α x_0 + σ ε. Each is `f(output, x_t, alpha, sigma)`."""

    x0: Callable[..., torch.Tensor]
    noise: Callable[..., torch.Tensor]


PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": PredictionType(
        x0=lambda output, x_t, alpha, sigma: (x_t - sigma * output) / alpha,
        noise=lambda output, x_t, alpha, sigma: output,
    ),
    "v_prediction": PredictionType(
        x0=lambda output, x_t, alpha, sigma: alpha * x_t - sigma * output,
        noise=lambda output, x_t, alpha, sigma: sigma * x_t + alpha * output,
    ),
    "sample": PredictionType(
        x0=lambda output, x_t, alpha, sigma: output,
        noise=lambda output, x_t, alpha, sigma: (x_t - alpha * output) / sigma,
    ),
}


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """`ValueError` unless `name` is one of the known ones, which it lists."""
    if name not in known:
        raise ValueError(f"Unknown {what} {name!r}; valid values are {sorted(known)}.")


def expand_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) or (1,) -> (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def working(x: torch.Tensor) -> torch.Tensor:
    """float32, or wider if `x` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NoisePath(ABC):
    """What a trajectory needs to know of a diffusion (or flow) model; a subclass supplies coefficients and grid."""

    prediction: PredictionType  # how the network's output is read

    @property
    @abstractmethod
    def terminal_timestep(self) -> float:
        """Where sampling starts, from pure noise."""

    @abstractmethod
    def solver_timesteps(self, num_solver_steps: int = 50) -> torch.Tensor:
        """The teacher's grid, ascending, (num_solver_steps,); the terminal timestep is its last."""

    @abstractmethod
    def previous_timestep(self, t: torch.Tensor, num_solver_steps: int = 50) -> torch.Tensor:
        """Where one step of the solver lands: one grid interval nearer the data, at least 0."""

    @abstractmethod
    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α_t and σ_t, float32, one of each per timestep (B,)."""

    def visited_timesteps(self, num_inference_steps: int, num_solver_steps: int) -> torch.Tensor:
        """What sampling in so many steps visits of the grid, descending, evenly spaced on it."""
        grid = self.solver_timesteps(num_solver_steps).flip(0)
        return grid[torch.arange(num_inference_steps) * len(grid) // num_inference_steps]

    # --- a phase; as a rule it is the whole path ---------------------------------------------------------------------
    @property
    def starts_in_noise(self) -> bool:
        """Whether the phase starts where there is nothing but noise."""
        return True

    @property
    def ends_clean(self) -> bool:
        """Whether it ends where there is none."""
        return True

    @property
    def start_timestep(self) -> float:
        """Where the student's own samples begin."""
        return self.terminal_timestep

    def at_start(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the student's own samples begin with: pure noise, or where a phase starts later, x_0 with some."""
        return noise

    def at_end(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_0 as the consistency function would give it: itself, or where a phase ends before, with noise left."""
        return x0

    def noise_again(self, x_end: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t from what the consistency function gave, with as much noise as it lacks; in the type of `x_end`."""
        return self.add_noise(x_end, noise, t)

    # --- what the network says ---------------------------------------------------------------------------------------
    def predict_x0(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x̂_0 from the network's output at (x_t, t), in the type of `x_t`."""
        return self._read(self.prediction.x0, output, x_t, t)

    def predict_noise(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε̂ from the network's output at (x_t, t), in the type of `x_t`."""
        return self._read(self.prediction.noise, output, x_t, t)

    def consistency_function(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """f(x_t, t) with f(x, 0) = x: x̂_0 itself, on a path whose timestep 0 has no noise."""
        return self.predict_x0(output, x_t, t)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε, in the type of `x0`."""
        alpha, sigma = self._coefficients_like(x0, t)
        return (alpha * working(x0) + sigma * working(noise)).to(x0.dtype)

    def step(self, x0: torch.Tensor, noise: torch.Tensor, t_prev: torch.Tensor) -> torch.Tensor:
        """The deterministic (DDIM, η = 0) transfer of an estimate (x̂_0, ε̂) to `t_prev`."""
        return self.add_noise(x0, noise, t_prev)

    def _read(self, formula: Callable[..., torch.Tensor], output, x_t, t) -> torch.Tensor:
        if output.shape != x_t.shape:
            raise ValueError(
                f"The network's output must have the latents' shape {tuple(x_t.shape)}; got {tuple(output.shape)}."
            )
        alpha, sigma = self._coefficients_like(x_t, t)
        return formula(working(output), working(x_t), alpha, sigma).to(x_t.dtype)

    def _coefficients_like(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α_t and σ_t shaped to multiply `x`, after checking that there is one timestep per sample."""
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"Timesteps must be of shape ({len(x)},), one for each sample of the latents; got {tuple(t.shape)}."
            )
        alpha, sigma = self.coefficients(t)
        return expand_like(alpha, x), expand_like(sigma, x)


_BETAS = ("beta_start", "beta_end", "beta_schedule")
_SCHEDULE = (*_BETAS, "num_train_timesteps", "trained_betas", "rescale_betas_zero_snr", "prediction_type")


class VariancePreservingPath(NoisePath):
    """The path of DDPM-trained models: α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t), float32 (num_train_timesteps,) each.

    Timesteps are integers; `timestep_scaling` and `sigma_data` are those of eq. 1.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        prediction_type: str = "epsilon",
        timestep_scaling: float = TIMESTEP_SCALING,
        sigma_data: float = SIGMA_DATA,
    ):
        if alphas_cumprod.ndim != 1 or alphas_cumprod.numel() == 0:
            raise ValueError(f"alphas_cumprod must be a vector, one value per timestep; got {alphas_cumprod.shape}.")
        if timestep_scaling <= 0 or sigma_data <= 0:
            raise ValueError(
                f"timestep_scaling and sigma_data must be positive; got {timestep_scaling} and {sigma_data}."
            )
        check_known("prediction_type", prediction_type, PREDICTION_TYPES)
        self.prediction = PREDICTION_TYPES[prediction_type]
        if prediction_type == "epsilon" and not torch.all(alphas_cumprod > 0):
            raise ValueError(
                "A noise schedule with zero terminal signal cannot be used with prediction_type 'epsilon', which then"
                " says nothing of x_0; use 'v_prediction' or 'sample', or rescale_betas_zero_snr=False."
            )
        self.num_train_timesteps, self.prediction_type = alphas_cumprod.numel(), prediction_type
        self.timestep_scaling, self.sigma_data = timestep_scaling, sigma_data
        alphas_cumprod = alphas_cumprod.detach().to(torch.float32)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], **overrides: Any) -> VariancePreservingPath:
        """The path a diffusers DDPM-family scheduler configuration describes.

        Keys of `config` that do not describe the noise schedule are ignored, `timestep_scaling` too: the boundary
        belongs to the student, not to the model it starts from. `overrides` win, and may name `timestep_scaling` and
        `sigma_data`.
        """
        valid = {*_SCHEDULE, "timestep_scaling", "sigma_data"}
        if unknown := sorted(set(overrides) - valid):
            raise ValueError(f"Unknown overrides {unknown}; valid ones are {sorted(valid)}.")
        boundary = {key: overrides[key] for key in ("timestep_scaling", "sigma_data") if key in overrides}
        settings = {**config, **overrides}
        if settings.get("trained_betas") is None:
            if missing := [key for key in _BETAS if key not in settings]:
                raise ValueError(f"The scheduler configuration describes no noise schedule: it lacks {missing}.")
            check_known("beta_schedule", settings["beta_schedule"], BETA_SCHEDULES)
        scheduler = LCMScheduler(**{key: settings[key] for key in _SCHEDULE if key in settings})
        if len(scheduler.betas) != len(scheduler):
            raise ValueError(
                f"trained_betas has {len(scheduler.betas)} values, but num_train_timesteps is {len(scheduler)}."
            )
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type, **boundary)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if t.is_floating_point():
            raise ValueError(f"Timesteps must be integers; got {t.dtype}.")
        # Reading values off an accelerator would make it wait, so only timesteps already at hand are checked.
        if t.device.type == "cpu" and t.numel() and not 0 <= t.min() <= t.max() < self.num_train_timesteps:
            raise ValueError(f"Timesteps must lie in 0..{self.num_train_timesteps - 1}; got {t.tolist()}.")
        if self.alphas.device != t.device:
            self.alphas, self.sigmas = self.alphas.to(t.device), self.sigmas.to(t.device)
        return self.alphas[t], self.sigmas[t]

    @property
    def terminal_timestep(self) -> int:
        return self.num_train_timesteps - 1

    def solver_timesteps(self, num_solver_steps: int = 50) -> torch.Tensor:
        """The teacher's grid, int64: 19, 39, …, 999 for 50 steps of 1000."""
        stride = self._solver_stride(num_solver_steps)
        return torch.arange(1, num_solver_steps + 1) * stride - 1

    def previous_timestep(self, t: torch.Tensor, num_solver_steps: int = 50) -> torch.Tensor:
        return (t - self._solver_stride(num_solver_steps)).clamp(min=0)

    def _solver_stride(self, num_solver_steps: int) -> int:
        if not 1 <= num_solver_steps <= self.num_train_timesteps or self.num_train_timesteps % num_solver_steps:
            raise ValueError(
                f"num_solver_steps must be a divisor of the {self.num_train_timesteps} training timesteps, so that the"
                f" grid ends where sampling starts; got {num_solver_steps}."
            )
        return self.num_train_timesteps // num_solver_steps

    def consistency_function(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """f(x_t, t) = c_skip(t) x_t + c_out(t) x̂_0 (eq. 1), in the type of `x_t`."""
        x_wide = working(x_t)
        x0 = self.predict_x0(output, x_wide, t)
        c_skip, c_out = boundary_scalings(t.to(x_wide.dtype), self.timestep_scaling, self.sigma_data)
        return (expand_like(c_skip, x_t) * x_wide + expand_like(c_out, x_t) * x0).to(x_t.dtype)


FLOW_SHIFT = 5.0  # of a student's grid, where nothing else is said: 4 of 48 steps visit 1000, 937.5, 833.33 and 625
FLOW_STEPS = 48  # of that grid: it holds all that sampling in 1, 2, 3, 4, 6 and 8 steps visits; 50 would not
SAME = 1e-6  # σ that differ by no more are one point: where phases meet there may be a point of the grid, or none


class FlowPath(NoisePath):
    """The straight path of flow-matching models: x_t = (1 − σ) x_0 + σ ε, of which the network predicts v = ε − x_0.

    Timesteps are real numbers, t = `num_train_timesteps` · σ. The grid is shifted towards noise: its points are
    σ = s u / (1 + (s − 1) u) for u = 1/N, 2/N, …, 1, with the `shift` s. x̂_0 = x_t − σ v is the consistency function
    as it is, for it is x_t itself, bit for bit, where σ = 0.

    Of a phase, from σ = `start` down to σ = `end`, the consistency function leads to the end, where it is the
    identity: f(x_t, σ) = x_t + (σ_end − σ) v (phased consistency models, Wang et al. 2024). The grid is that of the
    whole path between the ends, and they themselves.
    """

    prediction = PredictionType(
        x0=lambda output, x_t, alpha, sigma: x_t - sigma * output,
        noise=lambda output, x_t, alpha, sigma: x_t + alpha * output,
    )

    def __init__(
        self, shift: float = FLOW_SHIFT, num_train_timesteps: int = 1000, start: float = 1.0, end: float = 0.0
    ):
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be a positive number (1 leaves the grid even); got {shift}.")
        if not 0 <= end < start <= 1:
            raise ValueError(
                f"A phase leads from a σ of at most 1 to a smaller one, at least 0; got {start} to {end}."
            )
        self.shift, self.num_train_timesteps = float(shift), num_train_timesteps
        self.start, self.end = float(start), float(end)

    def split(self, boundary: float) -> tuple[FlowPath, FlowPath]:
        """The phases of two experts that meet at σ = `boundary`, in 0..1: first that where there is more noise."""
        if not 0 < boundary < 1:
            raise ValueError(f"The boundary between two experts is a σ between 0 and 1; got {boundary}.")
        path = (self.shift, self.num_train_timesteps)
        return FlowPath(*path, end=boundary), FlowPath(*path, start=boundary)

    @property
    def terminal_timestep(self) -> float:
        return float(self.num_train_timesteps)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Reading values off an accelerator would make it wait, so only timesteps already at hand are checked.
        if t.device.type == "cpu" and t.numel() and not 0 <= t.min() <= t.max() <= self.num_train_timesteps:
            raise ValueError(f"Timesteps must lie in 0..{self.num_train_timesteps}; got {t.tolist()}.")
        sigma = working(t) / self.num_train_timesteps
        return 1 - sigma, sigma

    # --- the grid ----------------------------------------------------------------------------------------------------
    def solver_timesteps(self, num_solver_steps: int = FLOW_STEPS) -> torch.Tensor:
        """The teacher's grid, float32, without the end: for a shift of 5 and 48 steps 96.15…, 179.1…, …, 1000."""
        return self._grid(num_solver_steps)[1:]

    def previous_timestep(self, t: torch.Tensor, num_solver_steps: int = FLOW_STEPS) -> torch.Tensor:
        """Where one step of the solver lands: the point of the grid before the one that is nearest to `t`, or the end.

        It is looked up, so that steps one after the other arrive at the end exactly.
        """
        grid = self._grid(num_solver_steps).to(t.device)
        nearest = torch.bucketize(working(t), ((grid[1:] + grid[:-1]) / 2).to(working(t).dtype))
        return grid[(nearest - 1).clamp(min=0)]

    def visited_timesteps(self, num_inference_steps: int, num_solver_steps: int = FLOW_STEPS) -> torch.Tensor:
        """What sampling in so many steps, of both phases together, visits in this one.

        They are evenly spaced on the grid of the whole path, but for the first of the second phase, which is at its
        start: what the first one led to lies there. Of two steps or more it has at least one.
        """
        whole = FlowPath(self.shift, self.num_train_timesteps)
        visited = super(FlowPath, whole).visited_timesteps(num_inference_steps, num_solver_steps)
        start, end = (self._exactly(sigma) for sigma in (self.start, self.end))
        if num_inference_steps > 1 and not (self.starts_in_noise and self.ends_clean):
            visited[-1] = torch.minimum(visited[-1], start if self.ends_clean else end)
        here = visited[(visited <= start * (1 + SAME)) & (visited > end * (1 + SAME))]
        here[:1] = torch.where(visited[0] > start, start, here[:1])
        return here

    def _grid(self, num_solver_steps: int) -> torch.Tensor:
        """The end and the points of the grid, computed in float64."""
        if num_solver_steps < 1:
            raise ValueError(f"num_solver_steps must be 1 or more; got {num_solver_steps}.")
        u = torch.arange(num_solver_steps + 1, dtype=torch.float64) / num_solver_steps
        sigmas = self.shift * u / (1 + (self.shift - 1) * u)
        between = sigmas[(sigmas > self.end + SAME) & (sigmas < self.start - SAME)]
        ends = torch.tensor([self.end, self.start], dtype=torch.float64)
        return (self.num_train_timesteps * torch.cat([ends[:1], between, ends[1:]])).to(torch.float32)

    def _exactly(self, sigma: float) -> torch.Tensor:
        """The timestep of a σ, as it is in the grid."""
        return torch.tensor(self.num_train_timesteps * sigma, dtype=torch.float32)

    # --- the phase ---------------------------------------------------------------------------------------------------
    @property
    def starts_in_noise(self) -> bool:
        return self.start == 1

    @property
    def ends_clean(self) -> bool:
        return self.end == 0

    @property
    def start_timestep(self) -> float:
        return float(self._exactly(self.start))

    def consistency_function(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """f(x_t, σ) = x_t + (σ_end − σ) v, in the type of `x_t`: x̂_0 where the phase is the whole path."""
        return self._read(lambda output, x, alpha, sigma: x + (self.end - sigma) * output, output, x_t, t)

    def at_start(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise if self.starts_in_noise else self._noised_to(self.start, x0, noise)

    def at_end(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return x0 if self.ends_clean else self._noised_to(self.end, x0, noise)

    def _noised_to(self, sigma: float, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.add_noise(x0, noise, self._exactly(sigma).to(x0.device).expand(len(x0)))

    def noise_again(self, x_end: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.ends_clean:
            return self.add_noise(x_end, noise, t)
        keep, add = self.again_scalings(self._coefficients_like(x_end, t)[1])
        return (keep * working(x_end) + add * working(noise)).to(x_end.dtype)

    def again_scalings(self, sigma):
        """a and b of x_t = a x_end + b ε: a = (1 − σ) / (1 − σ_end), b² = σ² − (a σ_end)². `sigma` is a number or a
        tensor, from σ_end to 1; so are the results."""
        keep = (1 - sigma) / (1 - self.end)
        return keep, abs(sigma**2 - (keep * self.end) ** 2) ** 0.5  # at the end itself 0, but for rounding
