"""What the autoencoders of the shapes world are trained with: losses that see edges, and words in the latents."""

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_mcm.shapes.captions import COLOURS, SHAPES, parse

WORDS = len(COLOURS) + len(SHAPES)
NOISE = 0.05  # deviation of the posterior; it is fixed, since a learned one starts at 1 and drowns what is learned
WORD_NOISE = 0.7  # deviation of the noise through which colour and shape must still be read
WORD_WEIGHT = 0.03
STEEPNESS_WEIGHT = 0.1
SAMPLER_NOISE = 0.6  # largest deviation that is added to the latents of the decoder's own training


def initialise(vae: nn.Module) -> None:
    """Convolutions that keep the variance, no biases, residual branches that start at zero.

    torch's own initialisation shrinks the signal by a third a layer while its biases stay: through so narrow and
    deep a network the picture drowns in constants and even the background takes hundreds of steps.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0", ".proj")):
            nn.init.zeros_(module.weight)


class WithWords(nn.Module):
    """An autoencoder and the linear map by which each latent cell must tell colour and shape."""

    def __init__(self, vae: nn.Module, read: nn.Module):
        super().__init__()
        self.vae, self.read = vae, read


def words(captions: list[str]) -> list[tuple[int, int]]:
    """Of each caption the numbers of its colour and its shape."""
    return [(list(COLOURS).index(c.colour), SHAPES.index(c.shape)) for c in map(parse, captions)]


def word_loss(read: nn.Module, latents: torch.Tensor, said: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cross-entropy of the words (B, 2: colour, shape) that `read` finds in every cell of noisy latents.

    `read` is linear, a 1x1 convolution to `WORDS` channels.
    """
    noisy = latents + WORD_NOISE * torch.randn(latents.shape, generator=generator)
    colour, shape = read(noisy).split([len(COLOURS), len(SHAPES)], dim=1)
    said = said.reshape(*said.shape, *(1,) * (latents.ndim - 2)).expand(-1, -1, *latents.shape[2:])
    return F.cross_entropy(colour, said[:, 0]) + F.cross_entropy(shape, said[:, 1])


def like_a_sampler(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normalised latents for the decoder alone, half of them as wrong as a sampler's: what they say most plainly is
    to be drawn."""
    extent = torch.rand(len(latents), *(1,) * (latents.ndim - 1), generator=generator)
    deviation = NOISE + SAMPLER_NOISE * (2 * extent - 1).clamp(min=0)
    return latents + deviation * torch.randn(latents.shape, generator=generator)


def picture_losses(reconstruction: torch.Tensor, x: torch.Tensor, *, decoder_only: bool) -> dict[str, torch.Tensor]:
    """How far pictures (B, 3, H, W) are off: `pixel`, `edge`, `error`, and `loss`, which is minimised.

    A decoder alone is to be sharp, hence absolute errors, for the median of what may be is sharper than the mean, and
    `steepness`.
    """
    error, weights, losses = reconstruction - x, emphasis(x), {}
    if decoder_only:
        pixel = (weights * error.abs()).mean()
        edge = sum((w * d.abs()).mean() for w, d in zip(spread(weights), edges(error)))
        losses["steepness"] = (steepness(reconstruction) / steepness(x) - 1).abs().mean()
    else:
        pixel = (weights * (2 * error.square() + 0.5 * error.abs())).mean()
        edge = sum(d.abs().mean() for d in edges(error))
    losses["loss"] = pixel + edge + STEEPNESS_WEIGHT * losses.get("steepness", 0)
    return losses | {"pixel": pixel, "edge": edge, "error": error.abs().mean()}


def emphasis(images: torch.Tensor) -> torch.Tensor:
    """Weights (B, 1, H, W) that count what differs from the background five times: it is a tenth of the pixels."""
    background = images.flatten(2).median(dim=2).values[..., None, None]
    return 1 + 4 * ((images - background).abs().amax(1, keepdim=True) > 0.1)


def normalise(latents: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit scale by channel: a scale that is free to drift makes the first thousand steps unstable."""
    return F.batch_norm(latents, None, None, training=True)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def steepness(images: torch.Tensor) -> torch.Tensor:
    """Root of the mean squared difference of neighbours, (B,).

    Errors alone prefer a soft edge wherever its place is not quite known; this wants it as steep as it was.
    """
    return sum(d.square().flatten(1).mean(1) for d in edges(images)).add(1e-6).sqrt()


def spread(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each difference of neighbours the larger of their weights."""
    return (
        torch.maximum(weights[..., 1:], weights[..., :-1]),
        torch.maximum(weights[..., 1:, :], weights[..., :-1, :]),
    )
