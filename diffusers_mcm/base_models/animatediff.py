"""AnimateDiff: Stable Diffusion 1.5 or a fine-tune of it, with motion modules between its layers.

A base model comes as a saved AnimateDiff pipeline, or as a Stable Diffusion repository together with a motion adapter,
which is in a repository of its own. This file is everything the package knows about the networks of that model;
`pipelines.animatediff` samples it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import MotionAdapter, SchedulerMixin, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention import FreeNoiseTransformerBlock
from torch import nn

from .. import hub
from ..conditioning import Conditioning
from ..location import Location, check_whole
from ..lora import open_safetensors
from ..moved import moved
from .base import component_class
from .precision import float32_ends
from .stable_diffusion import StableDiffusionModel

ADAPTER = "motion_adapter"
_POSITIONS = ".pos_embed.pe"  # of one attention; it holds no weights, but says how long a clip may be
IMAGE_EMBEDS = "image_embeds."  # keys of a `Conditioning` start with it, one for each IP-Adapter


class AnimateDiff(StableDiffusionModel):
    name = "animatediff"
    default_repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    extra_repositories = {ADAPTER: "guoyww/animatediff-motion-adapter-v1-5-2"}
    denoiser_classes = ("UNetMotionModel", "UNet2DConditionModel")
    guidance_range = (7.0, 8.0)
    height = 512
    width = 512
    num_frames = 16
    scheduler_defaults = {
        **StableDiffusionModel.scheduler_defaults,
        "beta_schedule": "linear",
        "steps_offset": 1,
        "clip_sample": False,
    }

    # --- loading -----------------------------------------------------------------------------------------------------
    def matches(self, model_index: Mapping[str, Any]) -> bool:
        # Stable Diffusion XL has the same class of UNet, and a second text encoder.
        return super().matches(model_index) and "text_encoder_2" not in model_index

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(self.is_temporal(name) for name in module_names)

    def is_temporal(self, module: str) -> bool:
        return ".motion_modules." in module

    def components_elsewhere(self, model_index: Mapping[str, Any]) -> dict[str, str]:
        return {} if has_motion(model_index) else super().components_elsewhere(model_index)

    def image_models_scheduler(self, config: Mapping[str, Any] | None) -> SchedulerMixin:
        """The sampler for a Stable Diffusion with motion modules: of its configuration only what the network predicts
        holds, for its betas (scaled linear) are the image model's, and the motion modules were trained on linear ones.
        """
        kept = {key: value for key, value in (config or {}).items() if key == "prediction_type"}
        return self.scheduler_class.from_config(self.scheduler_config(kept))

    # --- the tensors -------------------------------------------------------------------------------------------------
    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        shape = super().latent_shape(denoiser, vae, num_frames, height, width)
        # a repository of Stable Diffusion has a UNet without motion modules
        longest = denoiser.config.get("motion_max_seq_length", num_frames)
        if num_frames > longest and not any(isinstance(m, FreeNoiseTransformerBlock) for m in denoiser.modules()):
            raise ValueError(
                f"`num_frames` must be at most {longest}, the most that the motion modules can tell apart, got"
                f" {num_frames}; `enable_free_noise()` samples longer clips."
            )
        return shape

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning, **options
    ) -> torch.Tensor:
        """`text["prompt_embeds"]` is `(B, length, features)`, or `(B, T, length, features)` with a text per frame;
        `image_embeds.0` and so on `(B, images, [length,] features)`, for each IP-Adapter."""
        embeds = text["prompt_embeds"]
        embeds = embeds.flatten(0, 1) if embeds.ndim == 4 else embeds.repeat_interleave(latents.shape[2], 0)
        pictures = [value for key, value in text.items() if key.startswith(IMAGE_EMBEDS)]
        if pictures:
            options["added_cond_kwargs"] = {"image_embeds": pictures}
        with float32_ends(denoiser):
            return denoiser(latents, timesteps, encoder_hidden_states=embeds, return_dict=False, **options)[0]


def has_motion(model_index: Mapping[str, Any]) -> bool:
    """Whether a repository's UNet has motion modules in it."""
    return component_class(model_index, "unet") == "UNetMotionModel"


def with_motion(unet: UNet2DConditionModel | UNetMotionModel, adapter: MotionAdapter | None) -> UNetMotionModel:
    """The UNet with the adapter's motion modules in it; with its own if there is no adapter."""
    if isinstance(unet, UNet2DConditionModel):
        if adapter is None:
            raise ValueError("A UNet2DConditionModel has no motion modules; expected a `motion_adapter` with it.")
        return UNetMotionModel.from_unet2d(unet, adapter)
    if adapter is not None:
        unet.load_motion_modules(adapter)
    return unet


# --- motion adapters: in diffusers' layout, or in the files of AnimateDiff's own code --------------------------------
def load_motion_adapter(
    source: MotionAdapter | str | os.PathLike, dtype: torch.dtype | None = None, variant: str | None = None, **options
) -> MotionAdapter:
    """A motion adapter as it is, or from a folder, a repository on the Hub, or a `.safetensors` file.

    `dtype` is by default that of the file; `variant` is read where there is such.
    """
    if isinstance(source, MotionAdapter):
        return source
    location = Location.of(source, **options)
    if location.is_file or location.file("config.json") is None:
        return read_motion_modules(location.name if location.is_file else _only_file(location), dtype)
    given = location.arguments | location.variant(variant) | ({} if dtype is None else {"dtype": dtype})
    with location.never_pickled():
        adapter = MotionAdapter.from_pretrained(location.name, use_safetensors=True, **given)
    check_whole(adapter, location.name)
    return adapter


def _only_file(location: Location) -> Path:
    """The one file of weights in a folder or repository that has no configuration."""
    files = [name for name in location.files() if "/" not in name]
    names = [name for name in files if hub.is_safetensors(name)]
    if len(names) == 1 and (found := location.file(names[0])):
        return found
    source = location.name
    if names:
        raise ValueError(f"There are several motion modules in {source}: {', '.join(names)}; give the path of one.")
    pickled = [name for name in files if hub.is_pickled(name)]
    if pickled:
        path = Path(source, pickled[0]) if location.is_folder else pickled[0]
        raise ValueError(f"{source} has no .safetensors file; {hub.how_to_convert(path)}")
    raise ValueError(f"{source} is no motion adapter: it has neither a config.json nor a .safetensors file.")


def read_motion_modules(path: str | os.PathLike, dtype: torch.dtype | None = None) -> MotionAdapter:
    """A motion adapter from one file; its sizes are read off the weights."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    with open_safetensors(Path(path)) as file:
        tensors = {key.removeprefix("module."): file.get_tensor(key) for key in file.keys()}
    strange = [key for key in tensors if ".motion_modules." not in key]
    if strange or not any(key.startswith("down_blocks.") for key in tensors):
        raise ValueError(
            f"{path} is no motion module: {len(strange)} of its {len(tensors)} keys are of something else"
            + (f", such as {strange[0]!r}." if strange else ".")
        )
    lengths = {tensor.shape[1] for key, tensor in tensors.items() if key.endswith(("pos_encoder.pe", _POSITIONS))}
    weights = convert_animatediff_checkpoint_to_diffusers(tensors)
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith(_POSITIONS)}
    adapter = MotionAdapter(**_config(weights), **({"motion_max_seq_length": max(lengths)} if lengths else {}))
    expected = {key: value for key, value in adapter.state_dict().items() if not key.endswith(_POSITIONS)}
    different = sorted(expected.keys() ^ weights.keys())
    different += [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if different:
        raise ValueError(
            f"{path} is no motion module that diffusers knows: {len(different)} weights are missing, unknown or of"
            f" another shape, such as {different[0]!r}. It may be one for Stable Diffusion XL, or incomplete."
        )
    adapter.load_state_dict(weights, strict=False)  # but for the positions, which are computed
    return adapter.to(dtype or next(iter(weights.values())).dtype).eval()


def _config(weights: Mapping[str, torch.Tensor]) -> dict:
    """The sizes that the weights show: channels and layers of each block, and whether the middle one has any."""
    names = {key: key.split(".") for key in weights}
    norms = [key for key, name in names.items() if name[0] == "down_blocks" and name[4:] == ["norm", "weight"]]
    layers = Counter(int(names[key][1]) for key in norms)
    channels = {int(names[key][1]): len(weights[key]) for key in norms}
    return {
        "block_out_channels": tuple(channels[block] for block in sorted(layers)),
        "motion_layers_per_block": tuple(layers[block] for block in sorted(layers)),
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in weights),
    }


def __getattr__(name: str):
    """Names that this module once held are found where they are now."""
    return moved(__name__, name, {"AnimateDiffMCMPipeline": "diffusers_mcm.pipelines"})
