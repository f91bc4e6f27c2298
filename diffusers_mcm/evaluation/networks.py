"""The frozen networks whose features are compared: rows of two tables, one for whole videos and one for frames."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..features import IMAGENET_MEAN, IMAGENET_STD, MAX_INPUT_SIZE, pretrained
from ..hub import how_to_convert
from ..location import Location
from .i3d import INPUT_SIZE, MIN_FRAMES, InceptionI3d

PREPROCESSOR_NAME = "preprocessor_config.json"
CLIP_SOURCE = "openai/clip-vit-base-patch16"
INCEPTION_NAME = "fid_inception.safetensors"  # in a repository with weights of other networks besides
# What a configuration says of where it was read, and by what.
_NOT_OF_THE_NETWORK = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


class Features(nn.Module):
    """A frozen network and how pixels go into it.

    Args:
        model: what `read` calls.
        read: (model, pixels) -> features (N, d); pixels are (N, 3, T, H, W) for a network of videos, and
            (N, 3, H, W) for one of frames, normalised and of the size that the network takes.
        size: side of the square that frames are brought to; None leaves them as they are.
        mean, std: of the channels, for pixels in [0, 1].
        layer: which features these are, in words.
        num_frames: the number of frames that the network takes, where it takes one alone; `least` of them otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[Any, torch.Tensor], torch.Tensor],
        *,
        layer: str,
        size: int | None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        num_frames: int | None = None,
        least: int = 1,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.read, self.layer, self.size = read, layer, size
        self.mean, self.std = tuple(mean), tuple(std)
        self.num_frames, self.least = num_frames, least

    def digest(self) -> str:
        """SHA-256 over the configuration of the network, and the names and values of its weights in memory."""
        config = self.model.config.to_dict() if hasattr(self.model, "config") else {}
        kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_NETWORK}
        state = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def described(self) -> dict[str, Any]:
        """What of the network decides its features, as plain values."""
        resize = "none" if self.size is None else f"{self.size}x{self.size}, bilinear, antialiased where it shrinks"
        normalised = {"mean": list(self.mean), "std": list(self.std)}
        return {"sha256": self.digest(), "layer": self.layer, "resize": resize, **normalised}

    def check_frames(self, count: int, name: str) -> None:
        """`ValueError` where clips of `count` frames are not what the network takes."""
        if self.num_frames is not None and count != self.num_frames:
            raise ValueError(f"{name} takes {self.num_frames} frames, not {count}: ask for them with --num_frames")
        if count < self.least:
            raise ValueError(f"{name} needs at least {self.least} frames, got {count}: ask for more with --num_frames")

    @torch.no_grad()
    def forward(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (N, T, H, W, 3), of a network of frames (N, H, W, 3) -> features float32 (N, d)."""
        device = next(self.model.parameters()).device
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device).movedim(-1, -3).float() / 255
        if self.size is not None and pixels.shape[-2:] != (self.size, self.size):
            flat, size = pixels.flatten(0, -4), (self.size, self.size)
            scaled = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=True)
            pixels = scaled.unflatten(0, pixels.shape[:-3])
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        pixels = (pixels - mean) / std
        return self.read(self.model, pixels.movedim(-4, -3) if pixels.ndim == 5 else pixels).float().cpu().numpy()


class Network(NamedTuple):
    """A row of a table of networks."""

    load: Callable[[str], Features]
    source: str | None  # where its weights come from if nothing is said; None: they must be given


def _normalisation(name: str) -> dict[str, Any]:
    """Mean and deviation of the channels that a network was trained with: what its files say, or ImageNet's."""
    said = Location.of(name).json(PREPROCESSOR_NAME) or {}
    return {"mean": said.get("image_mean", IMAGENET_MEAN), "std": said.get("image_std", IMAGENET_STD)}


def load_i3d(name: str, eps: str = "1e-5") -> Features:
    """The 400 logits of Inception-I3D, which FVD is computed on; `eps` is that of its batch normalisation, as said."""
    model = InceptionI3d.from_pretrained(name, float(eps))
    layer = f"400 logits, eps {eps}"
    return Features(model, lambda model, x: model(x), layer=layer, size=INPUT_SIZE, least=MIN_FRAMES)


def load_vjepa2(name: str) -> Features:
    """The mean token of V-JEPA 2's encoder, of any number of frames."""
    from transformers import VJEPA2Model

    model = pretrained(VJEPA2Model, name, ["vjepa2"], dtype=torch.float32)

    def read(model, x):
        return model(pixel_values_videos=x.movedim(2, 1), skip_predictor=True).last_hidden_state.mean(1)

    return Features(
        model, read, layer="mean token of the encoder", size=model.config.crop_size, **_normalisation(name), least=2
    )


def load_videomae(name: str) -> Features:
    """The mean token of VideoMAE's encoder, which takes one number of frames and no other."""
    from transformers import VideoMAEModel

    model = pretrained(VideoMAEModel, name, ["videomae"], dtype=torch.float32)

    def read(model, x):
        return model(pixel_values=x.movedim(2, 1)).last_hidden_state.mean(1)

    size, num_frames = model.config.image_size, model.config.num_frames
    layer = "mean token of the encoder"
    return Features(model, read, layer=layer, size=size, **_normalisation(name), num_frames=num_frames)


def load_dinov2(name: str) -> Features:
    """The class token of DINOv2 after its last norm."""
    from transformers import Dinov2Model

    model = pretrained(Dinov2Model, name, ["dinov2"], dtype=torch.float32)
    size = min(model.config.image_size, MAX_INPUT_SIZE)
    return Features(
        model, lambda model, x: model(x).pooler_output, layer="class token", size=size,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


class ClipFeatures(Features):
    """CLIP's image embeddings of frames, as its own processor prepares them, and its text embeddings of captions."""

    def __init__(self, model: nn.Module, tokenizer, processor):
        super().__init__(model, self._embed, layer="projected image embedding", size=None)
        self.tokenizer, self.processor = tokenizer, processor

    @staticmethod
    def _embed(model, pixels: torch.Tensor) -> torch.Tensor:
        return _pooled(model.get_image_features(pixel_values=pixels))

    def described(self) -> dict[str, Any]:
        """What of the network and its processor decides the features, as plain values."""
        kept = ("size", "crop_size", "resample", "image_mean", "image_std", "do_resize", "do_center_crop")
        said = json.loads(json.dumps(self.processor.to_dict(), default=str))
        how = {key: said[key] for key in kept if key in said}
        length = self.model.config.text_config.max_position_embeddings
        words = hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()
        return {
            "sha256": self.digest(),
            "layer": self.layer,
            "resize": f"Pillow, {json.dumps(how, sort_keys=True)}",
            "text": f"{length} tokens, vocabulary {words[:16]}",
        }

    @torch.no_grad()
    def forward(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (N, H, W, 3) -> embeddings float32 (N, d), not of length 1."""
        pixels = self.processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
        device = next(self.model.parameters()).device
        return self._embed(self.model, pixels["pixel_values"].to(device)).float().cpu().numpy()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> embeddings float32 (N, d); what goes beyond the text encoder's length is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(next(self.model.parameters()).device)
        return _pooled(self.model.get_text_features(**tokens)).float().cpu().numpy()


def _pooled(output) -> torch.Tensor:
    """The embedding, which newer versions of transformers wrap."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def load_clip(name: str) -> ClipFeatures:
    """A CLIP with its tokenizer and its image processor, whose Pillow version is taken: torchvision's differs."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # before transformers had two kinds the one there was used Pillow
        from transformers import CLIPImageProcessor as Processor
    folder = Location.of(name).name
    model = pretrained(CLIPModel, name, ["clip"], dtype=torch.float32)
    return ClipFeatures(model, AutoTokenizer.from_pretrained(folder), Processor.from_pretrained(folder))


def load_inception(name: str) -> Features:
    """FID's Inception v3, of torch-fidelity, with weights from safetensors; 2048 pooled features."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import load_file

    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # its own torchvision may not fit the torch that is installed: a RuntimeError
        raise ImportError(
            f"the features 'inception' are those of torch-fidelity, which cannot be imported ({error}): install"
            " torch-fidelity and the torchvision that belongs to your torch, or take dinov2 or clip"
        ) from error
    file = Location.of(name).find_lora_file(INCEPTION_NAME)
    if file is None:
        raise ValueError(f"expected {INCEPTION_NAME}, or one .safetensors file alone, in {name}: there is none")
    state = load_file(file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "inception.pth")
        torch.save(state, path)
        try:
            model = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, KeyError) as error:  # it loads strictly
            raise ValueError(f"{name} does not hold the weights of FID's Inception v3: {error}") from error

    def read(model, x):
        return model((x * 255).round().to(torch.uint8))[0]

    return Features(model, read, layer="2048 pooled", size=None, mean=(0, 0, 0), std=(1, 1, 1))


VIDEO_NETWORKS = {
    "i3d": Network(load_i3d, None),  # FVD's own
    "i3d-eps1e-3": Network(partial(load_i3d, eps="1e-3"), None),  # as the original's batch normalisation
    "vjepa2": Network(load_vjepa2, "facebook/vjepa2-vitl-fpc64-256"),
    "videomae": Network(load_videomae, "MCG-NJU/videomae-base-ssv2"),
}
FRAME_NETWORKS = {
    "dinov2": Network(load_dinov2, "facebook/dinov2-base"),
    "clip": Network(load_clip, CLIP_SOURCE),  # what CMMD is defined on
    "inception": Network(load_inception, "nikhilr01/sen-bridge-weights"),  # FID's own, beside those of LPIPS
}


@dataclass(frozen=True)
class Choice:
    """A network that somebody asked for: a row of a table, and where its weights are."""

    row: str
    source: str

    @classmethod
    def parse(cls, text: str, table: dict[str, Network]) -> "Choice":
        """`i3d=FILE`, `vjepa2`, `videomae=mcm-shapes-video`: a row's name, and where its weights are."""
        row, _, source = text.partition("=")
        if row not in table:
            raise ValueError(f"expected a network out of {', '.join(table)}, got {row!r}; weights follow a '=' sign")
        if not source and table[row].source is None:
            raise ValueError(
                f"the weights of {row} are on no Hub as safetensors: give a file, {row}=FILE;"
                f" {how_to_convert('i3d_pretrained_400.pt')}"
            )
        return cls(row, source or str(table[row].source))
