"""Inception-I3D, whose 400 logits FVD is computed on. It reads safetensors only."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..location import Location

MIN_FRAMES = 9  # with fewer nothing is left for the last pooling
INPUT_SIZE = 224
#: Each block's widths: 1×1; 1×1 and 3×3; 1×1 and 3×3; 1×1 after the pooling.
_MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
# What a pooling before a block does: kernel and stride over time, height and width.
_POOLED = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def _pad(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Zeros around (N, C, T, H, W) as TensorFlow's "SAME" puts them: the odd one at the end."""
    padding: list[int] = []
    for size, width, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
        missing = max(width - (size % step or step), 0)
        padding += [missing // 2, missing - missing // 2]
    return F.pad(x, padding)


def _max_pool(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    return F.max_pool3d(_pad(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    """A convolution, batch normalisation and a rectifier."""

    def __init__(self, channels: int, width: int, kernel: int = 1, stride: int = 1, eps: float = 1e-5):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        return F.relu(self.bn(self.conv3d(_pad(x, kernel, stride))))


class _Mixed(nn.Module):
    """Four branches side by side, under the names that the published weights have."""

    def __init__(self, channels: int, widths: Sequence[int], eps: float):
        super().__init__()
        self.b0 = _Unit(channels, widths[0], eps=eps)
        self.b1a, self.b1b = _Unit(channels, widths[1], eps=eps), _Unit(widths[1], widths[2], 3, eps=eps)
        self.b2a, self.b2b = _Unit(channels, widths[3], eps=eps), _Unit(widths[3], widths[4], 3, eps=eps)
        self.b3b = _Unit(channels, widths[5], eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.b3b(_max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], dim=1)


class _Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, 400, 1)


class InceptionI3d(nn.Module):
    """The two-stream network's RGB half (Carreira and Zisserman 2017), with the logits of Kinetics-400.

    Args:
        eps: of the batch normalisation. The ports of the weights to PyTorch that FVD is computed with use 1e-5, the
            TensorFlow original 1e-3; the logits of random weights differ by 0.8 %.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2, eps)
        self.Conv3d_2b_1x1 = _Unit(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3, eps=eps)
        for name, (channels, widths) in _MIXED.items():
            self.add_module(name, _Mixed(channels, widths, eps))
        self.logits = _Logits()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str, eps: float = 1e-5) -> "InceptionI3d":
        """Load a `.safetensors` file, or the only one of a folder or a Hub repository, under the usual key names.

        Raises:
            ValueError: for a pickled file, with the command that converts it, and for other keys or shapes than I3D's.
        """
        from safetensors.torch import load_file

        path = Location.of(name).find_lora_file()
        if path is None:
            raise ValueError(f"expected a .safetensors file of the Inception-I3D, got {name!r}, where there is none")
        model, state = cls(eps), load_file(path)
        wanted = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
        found = {key for key in state if not key.endswith("num_batches_tracked")}
        if found != wanted:
            raise ValueError(
                f"{path} does not hold the Inception-I3D: {len(wanted - found)} of its {len(wanted)} keys are missing,"
                f" such as {min(wanted - found, default='none')!r}, and {len(found - wanted)} others are there, such"
                f" as {min(found - wanted, default='none')!r}"
            )
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        if other := sorted(key for key in wanted if tuple(state[key].shape) != shapes[key]):
            got = f"{other[0]!r} of shape {tuple(state[other[0]].shape)}, not {shapes[other[0]]}"
            raise ValueError(f"{path} does not hold the Inception-I3D: it has {got}")
        model.load_state_dict(state, strict=False)
        return model

    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        """Videos (N, 3, T, 224, 224) in [-1, 1], T at least 9 -> logits (N, 400)."""
        if videos.ndim != 5 or videos.shape[1] != 3:
            raise ValueError(f"expected videos (N, 3, T, H, W), got {tuple(videos.shape)}")
        if videos.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs at least {MIN_FRAMES} frames, got {videos.shape[2]}")
        if videos.shape[3:] != (INPUT_SIZE, INPUT_SIZE):
            raise ValueError(f"I3D takes frames of {INPUT_SIZE}×{INPUT_SIZE} pixels, got {tuple(videos.shape[3:])}")
        x = self.Conv3d_1a_7x7(videos)
        for name in ("Conv3d_2b_1x1", "Conv3d_2c_3x3", *_MIXED):
            if name in _POOLED:
                x = _max_pool(x, *_POOLED[name])
            x = self.get_submodule(name)(x)
        pooled = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits.conv3d(pooled)[..., 0, 0].mean(2)
