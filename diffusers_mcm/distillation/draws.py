"""Random draws keyed by seed, purpose and global sample index, so that they do not depend on how a batch is split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .discriminator.augment import AugmentationDraws, draw_augmentation

_ALIGNED = 16  # bytes, a multiple of each type's size


def sample_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose, global sample index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_normal(seed: int, purpose: str, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal, (B, *shape)."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, purpose, i)) for i in indices])


def draw_uniform(seed: int, purpose: str, indices: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
    """Uniform in [0, 1), (B, *shape)."""
    return torch.stack([torch.rand(tuple(shape), generator=sample_generator(seed, purpose, i)) for i in indices])


def draw_integer(seed: int, purpose: str, indices: Sequence[int], high: int) -> torch.Tensor:
    """Uniform in 0 … high - 1, (B,) long."""
    return torch.stack([torch.randint(high, (), generator=sample_generator(seed, purpose, i)) for i in indices])


@dataclass(frozen=True)
class Coins:
    """Which samples start from the real video: each with probability λ_real, and their number left to chance no more
    than it must be, so that processes which work side by side have as much to generate as each other.

    Of any n consecutive samples of a block, ⌊n λ_real⌋ or ⌈n λ_real⌉ are real; a keyed draw for each block decides
    which of the two, and where they lie. A block is one optimiser step, which micro-batches divide, however long they
    are. For λ_real = ½ pairs will do: a micro-batch is made of whole pairs, and at most one half of one.
    """

    lambda_real: float = 0.5  # in [0, 1]
    total_batch: int = 1  # samples of one optimiser step
    samples_per_coin: int = 1  # so many consecutive samples share a coin; it divides the total batch

    @property
    def block(self) -> int:
        """The number of coins that are drawn together."""
        return 2 if self.lambda_real in (0, 0.5, 1) else max(1, self.total_batch // self.samples_per_coin)

    def draw(self, seed: int, indices: Sequence[int]) -> torch.Tensor:
        """(B,) in [0, 1), float64, each uniform by itself; a sample is real where its coin is below λ_real."""
        coins = [divmod(index // self.samples_per_coin, self.block) for index in indices]
        offsets = {block: draw_uniform(seed, "coin", [block]).item() for block in {block for block, _ in coins}}
        # Multiples of λ, wound around a circle of length 1: a turn is complete, and a real sample due, once in 1/λ.
        turns = [offsets[block] - place * self.lambda_real for block, place in coins]
        return torch.tensor(turns, dtype=torch.float64).remainder(1)


@dataclass(frozen=True)
class StepDraws:
    """Everything random in the student's half of a step, one row per sample."""

    timestep: torch.Tensor  # (B,) a point of the solver grid
    guidance: torch.Tensor  # (B,) w in [w_min, w_max]
    noise: torch.Tensor  # (B, C, T, h, w) added to the trajectory's start
    start_noise: torch.Tensor  # (B, C, T, h, w) for the one-step sample (eq. 7)
    encoder_noise: torch.Tensor  # (B, C, T, h, w) for the VAE's posterior
    coin: torch.Tensor  # (B,) in [0, 1), of `Coins`; generated where it is not below lambda_real
    frames: torch.Tensor  # (B, l) uniforms, one per segment of the clip

    def to(self, device: torch.device) -> "StepDraws":
        """The draws on the device, but for the coin: it decides shapes, and the device would wait for its way back."""
        drawn = {name: value for name, value in vars(self).items() if name != "coin"}
        if device.type == "cpu":
            return self
        packed, places = pack(drawn, pin_memory=device.type == "cuda")
        return StepDraws(coin=self.coin, **unpack(packed.to(device, non_blocking=True), places))


class Place(NamedTuple):
    """Where the bytes of a tensor are among those of several."""

    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size


def pack(tensors: dict[str, torch.Tensor], pin_memory: bool = False) -> tuple[torch.Tensor, dict[str, Place]]:
    """The bytes of tensors one after the other, uint8 (N,), in page-locked memory if wished, and where each is.

    All go to a device in one copy then, for which nobody has to wait.
    """
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = Place(end, tensor.nbytes, tensor.dtype, tensor.shape)
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=pin_memory)
    for name, view in unpack(packed, places).items():
        view.copy_(tensors[name])
    return packed, places


def unpack(packed: torch.Tensor, places: dict[str, Place]) -> dict[str, torch.Tensor]:
    """The tensors that `pack` put together, as views."""
    return {
        name: packed[start : start + size].view(dtype).view(shape)
        for name, (start, size, dtype, shape) in places.items()
    }


def draw_step(
    seed: int,
    indices: Sequence[int],
    latent_shape: Sequence[int],
    solver_timesteps: torch.Tensor,
    guidance_range: tuple[float, float],
    num_adversarial_frames: int,
    coins: Coins,
) -> StepDraws:
    """The draws of the samples with these global indices; `latent_shape` is (C, T, h, w)."""
    low, high = guidance_range
    return StepDraws(
        timestep=solver_timesteps[draw_integer(seed, "timestep", indices, len(solver_timesteps))],
        guidance=low + (high - low) * draw_uniform(seed, "guidance", indices),
        noise=draw_normal(seed, "noise", indices, latent_shape),
        start_noise=draw_normal(seed, "start noise", indices, latent_shape),
        encoder_noise=draw_normal(seed, "encoder noise", indices, latent_shape),
        coin=coins.draw(seed, indices),
        frames=draw_uniform(seed, "frames", indices, (num_adversarial_frames,)),
    )


@dataclass(frozen=True)
class AdversarialDraws:
    """Everything random in what the discriminator sees, one row per image (B * l)."""

    fake: AugmentationDraws
    real: AugmentationDraws
    interpolation: torch.Tensor  # (B * l,) uniform, for the gradient penalty


def draw_adversarial(seed: int, indices: Sequence[int], images_per_sample: int) -> AdversarialDraws:
    """The draws for `images_per_sample` generated and as many real images of each of these samples."""
    fake, real = (
        [draw_augmentation(sample_generator(seed, purpose, i), images_per_sample) for i in indices]
        for purpose in ("fake augmentation", "real augmentation")
    )
    interpolation = draw_uniform(seed, "interpolation", indices, (images_per_sample,)).flatten()
    return AdversarialDraws(AugmentationDraws.cat(fake), AugmentationDraws.cat(real), interpolation)
