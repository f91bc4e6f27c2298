"""Frozen feature networks: DINOv2 patch tokens for images, CLIP embeddings for text."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .location import Location, refuse_lacking

MAX_INPUT_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_TYPES = ("clip", "clip_text_model")  # whose text half is read


def check_images(images: torch.Tensor) -> None:
    """`ValueError` unless these are `(N, 3, H, W)`."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected images of shape (N, 3, H, W), got {tuple(images.shape)}.")


def pretrained(kind: type, name: str, model_types: Sequence[str], **options: Any) -> nn.Module:
    """A network of transformers from safetensors, of which nothing is random.

    transformers makes weights that a file lacks anew, at random, and says so in a table that also lists all the
    weights of the file that the network has not: those of the vision half of a CLIP, of which nothing is wrong. It is
    not shown.

    Args:
        kind: a class of transformers.
        name: a folder, a packaged model or a Hub repository.
        model_types: what its configuration may call itself.
        options: of the class's `from_pretrained`.

    Raises:
        ValueError: if the configuration is another model's, or a weight is missing or of another shape.
    """
    from transformers import PretrainedConfig
    from transformers.utils import logging

    location = Location.of(name)
    found_type = PretrainedConfig.get_config_dict(location.name)[0].get("model_type")
    if found_type not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise ValueError(f"Expected a model of type {expected} in {location.name!r}, got {found_type!r}.")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with location.never_pickled():
            model, found = kind.from_pretrained(  # type: ignore[attr-defined]
                location.name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    finally:
        logging.set_verbosity(level)
    refuse_lacking(
        {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])},
        f"{location.name} does not hold all weights of a {kind.__name__}, or not in their shapes",
    )
    return model


class _Frozen(nn.Module):
    """Never trained and never in training mode, whatever the module that owns it does."""

    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)


class PatchFeatures(_Frozen):
    """Patch tokens of a frozen `transformers.Dinov2Model` after the given blocks, counted from 0.

    Gradients pass through to the images.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int] = (2, 5, 8, 11)):
        super().__init__()
        config = model.config
        if not blocks or not all(0 <= block < config.num_hidden_layers for block in blocks):
            raise ValueError(f"Expected blocks within 0..{config.num_hidden_layers - 1}, got {tuple(blocks)}.")
        self.blocks = tuple(blocks)
        self.input_size = min(config.image_size, MAX_INPUT_SIZE)
        self.feature_dim = config.hidden_size
        if self.input_size % config.patch_size:
            raise ValueError(
                f"The input size {self.input_size} is not a multiple of the network's patch size {config.patch_size}."
            )
        self.model = model.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_pretrained(
        cls, name: str, blocks: Sequence[int] = (2, 5, 8, 11), dtype: torch.dtype | None = None
    ) -> "PatchFeatures":
        """Load from a folder, a packaged model or a Hub repository that holds a DINOv2 without registers."""
        from transformers import Dinov2Model

        return cls(pretrained(Dinov2Model, name, ["dinov2"], dtype=dtype or torch.float32), blocks)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images `(N, 3, H, W)` in [-1, 1] → one `(N, P, C)` float32 per block."""
        check_images(images)
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, (self.input_size, self.input_size), mode="area")
        images = ((images.float() + 1) / 2 - self.mean.float()) / self.std.float()
        hidden = self.model(images.to(self.model.dtype), output_hidden_states=True).hidden_states
        # hidden[0] is the embedding; token 0 is the class token.
        return [self.model.layernorm(hidden[block + 1])[:, 1:].float() for block in self.blocks]


def _text_config(name: str) -> Any:
    """The configuration of a CLIP's text half."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if (kind := config.model_type) not in CLIP_TYPES:
        raise ValueError(f"Expected a model of type 'clip' or 'clip_text_model' in {name!r}, got {kind!r}.")
    if config.model_type == "clip":
        # The text half of many CLIP configurations keeps the default width, not the model's.
        config.text_config.projection_dim = config.projection_dim
        config = config.text_config
    return config


def text_dimension(name: str) -> int:
    """The width of the embeddings of `TextFeatures`, from the configuration alone."""
    return _text_config(Location.of(name).name).projection_dim


class TextSize(nn.Module):
    """In the place of `TextFeatures` where all texts were encoded before: it knows how wide their embeddings are."""

    def __init__(self, text_dim: int):
        super().__init__()
        self.text_dim = text_dim


class TextFeatures(_Frozen):
    """Projected embeddings of prompts by a frozen `transformers.CLIPTextModelWithProjection` and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.text_dim = model.config.projection_dim

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype | None = None) -> "TextFeatures":
        """Load from a folder, a packaged model or a Hub repository of a CLIP, or its text half, with the tokenizer."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        location = Location.of(name)
        config = _text_config(location.name)
        dtype = dtype or torch.float32
        model = pretrained(CLIPTextModelWithProjection, name, CLIP_TYPES, config=config, dtype=dtype)
        return cls(model, AutoTokenizer.from_pretrained(location.name))

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts → `(N, D)` float32."""
        if isinstance(prompts, str):
            raise ValueError(f"Expected a list of prompts, got the single string {prompts!r}.")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",  # a fixed length, or an embedding would depend on its neighbours in rounding
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.model(tokens.input_ids.to(self.model.device)).text_embeds.float()
