"""The discriminator's trainable heads: one text-conditioned head per block of the frozen network (App. C.1)."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

TEXT_CHANNELS = 64
RESIDUAL_KERNEL = 9
MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


class SpectralConv1d(nn.Conv1d):
    """Convolution over the tokens with circular padding, its weight divided by its largest singular value.

    The singular vectors are state that `update_spectral_norm` moves, not `forward`: several forward passes of one
    optimiser step (micro-batches, real and generated images) all see the same weight.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, generator: torch.Generator | None = None
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.bias)
        # Exact singular vectors, the top eigenvector of W Wᵀ, so that even the first step sees norm 1.
        matrix = self.weight.detach().flatten(1).double()
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
        self.register_buffer("left", left.to(self.weight.dtype))
        self.register_buffer("right", F.normalize(matrix.T @ left, dim=0).to(self.weight.dtype))

    @torch.no_grad()
    def update_spectral_norm(self) -> None:
        """Move the singular vectors on by one power iteration."""
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(matrix.T @ self.left, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def normalized_weight(self) -> torch.Tensor:
        # Half precision would blur the norm, and through it every weight.
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight / torch.dot(self.left, self.weight.flatten(1) @ self.right)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (N, C, P) -> (N, C', P)
        return self._conv_forward(tokens, self.normalized_weight(), self.bias)


def _head_block(channels: int, kernel_size: int, generator: torch.Generator | None) -> nn.Module:
    """Convolution, normalisation, LeakyReLU 0.2."""
    # Groups of several channels within one sample: no statistics shared between samples, and, unlike one channel
    # per group, a channel's mean over the image (its overall appearance) survives.
    groups = max(g for g in range(1, MAX_GROUPS + 1) if channels % g == 0 and channels >= g * MIN_GROUP_CHANNELS)
    conv = SpectralConv1d(channels, channels, kernel_size, generator)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(groups, channels), activation=nn.LeakyReLU(0.2)))


class DiscriminatorHead(nn.Module):
    """Tokens `(N, P, C)` of one block and text embeddings `(N, D)` → patch logits `(N, P)` float32."""

    def __init__(self, feature_dim: int, text_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.pointwise = _head_block(feature_dim, 1, generator)
        self.residual = _head_block(feature_dim, RESIDUAL_KERNEL, generator)
        self.project = SpectralConv1d(feature_dim, TEXT_CHANNELS, 1, generator)
        self.text = nn.Linear(text_dim, TEXT_CHANNELS)
        nn.init.kaiming_uniform_(self.text.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.text.bias)

    def forward(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden = self.pointwise(tokens.transpose(1, 2))  # (N, C, P)
        hidden = (hidden + self.residual(hidden)) / math.sqrt(2)
        patches = self.project(hidden).float()  # (N, 64, P)
        condition = self.text(text).float()[:, :, None]  # (N, 64, 1)
        return (patches * condition).sum(1) / math.sqrt(TEXT_CHANNELS)


class DiscriminatorHeads(nn.Module):
    """One head per block of the frozen network that is looked at; `feature_dim` are the channels of a patch token.

    `generator` is for the initial weights; torch's default generator if left out.
    """

    def __init__(self, num_blocks: int, feature_dim: int, text_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"Expected at least one block, got num_blocks={num_blocks}.")
        if feature_dim < MIN_GROUP_CHANNELS:
            raise ValueError(f"Expected feature_dim of at least {MIN_GROUP_CHANNELS}, got {feature_dim}.")
        self.feature_dim, self.text_dim = feature_dim, text_dim
        self.heads = nn.ModuleList(DiscriminatorHead(feature_dim, text_dim, generator) for _ in range(num_blocks))

    def forward(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Features, one `(N, P, C)` per block, and text `(N, D)` → logits `(N, blocks · P)` float32."""
        self._check(features, text)
        return torch.cat([head(tokens, text) for head, tokens in zip(self.heads, features)], dim=1)

    def update_spectral_norm(self) -> None:
        """Move every spectral norm on by one power iteration; to be called once after each optimiser step."""
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.update_spectral_norm()

    def _check(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> None:
        if len(features) != len(self.heads):
            raise ValueError(f"Expected features of {len(self.heads)} blocks, got {len(features)}.")
        if text.ndim != 2 or text.shape[1] != self.text_dim:
            raise ValueError(f"Expected text embeddings of shape (N, {self.text_dim}), got {tuple(text.shape)}.")
        for tokens in features:
            if tokens.ndim != 3 or tokens.shape[2] != self.feature_dim:
                raise ValueError(f"Expected tokens of shape (N, P, {self.feature_dim}), got {tuple(tokens.shape)}.")
            if len(tokens) != len(text):
                raise ValueError(f"Expected one text embedding per image: {len(tokens)} images, {len(text)} texts.")
            if tokens.shape[1] < RESIDUAL_KERNEL // 2:
                raise ValueError(f"Expected at least {RESIDUAL_KERNEL // 2} patches per image, got {tokens.shape[1]}.")
