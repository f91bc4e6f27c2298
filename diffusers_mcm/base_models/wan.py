"""Wan 2.1 and 2.2: a transformer on the flow path, over the latents of a video autoencoder that is causal.

This file is everything the package knows about the networks of those models; `pipelines.wan` samples them, and
`pipelines.wan_a14b` the one that has two transformers, Wan 2.2 A14B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    unpatchify,
)
from torch import nn

from ..conditioning import Conditioning
from ..consistency import FLOW_SHIFT, FLOW_STEPS, FlowPath
from ..lora import base_layer
from ..lora.wan_names import wan_module
from ..scheduler import MCMFlowScheduler
from ..settings import BOUNDARY, HIGH_NOISE, LOW_NOISE
from .base import BaseModel, component_class
from .checkpointing import recompute_causal
from .precision import no_autocast
from .tokens import tokenize

LORA_SUFFIXES = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ffn.net.0.proj", ".ffn.net.2")  # within a block
_READS_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.0\.proj)")
TEXT_LENGTH = 512  # tokens, zeros after the text; the transformer has no mask for them
# What guidance leads away from, by Wan's authors (`sample_neg_prompt` in their wan/configs/shared_config.py): garish,
# overexposed, *static*, blurred details, subtitles, …, *motionless picture*, …, many people behind, walking backwards.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
_TEXT_TO_VIDEO = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan-AI/Wan2.1-T2V-14B-Diffusers, Wan-AI/Wan2.2-TI2V-5B-Diffusers or"
    " Wan-AI/Wan2.2-T2V-A14B-Diffusers"
)


class Wan(BaseModel):
    """Wan 2.1, text to video: 1.3B and 14B, which differ in nothing but their size."""

    name = "wan"
    default_repository = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    sizes: Mapping[int, str] = {
        1536: default_repository,
        5120: "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    }  # by width of a block
    denoiser_name = "transformer"
    denoiser_classes = ("WanTransformer3DModel",)
    guidance_range = (2.0, 6.0)
    height = 480
    width = 832
    num_frames = 81
    fps = 16
    data_fps = 16.0
    num_solver_steps = FLOW_STEPS
    negative_prompt = NEGATIVE_PROMPT
    expand_timesteps = False  # whether diffusers gives each token a timestep; in text to video they are all the same
    scheduler_class = MCMFlowScheduler
    decodes_any_frames = False  # each latent is decoded after the one before it
    scheduler_defaults = {"num_train_timesteps": 1000, "shift": FLOW_SHIFT}
    noise_schedule_keys = ("num_train_timesteps",)  # a shift is a way of sampling the teacher; the student has its own
    described_scheduler_keys: tuple[str, ...] = ("shift", "original_inference_steps")
    student_settings = {"shift": FLOW_SHIFT}
    frame_decoders = ("exact", "image")
    vae_dtype = torch.float32  # as Wan's authors and diffusers run it

    # --- what a repository holds -------------------------------------------------------------------------------------
    def matches(self, model_index: Mapping[str, Any]) -> bool:
        has_two = component_class(model_index, "transformer_2") is not None
        expands = bool(model_index.get("expand_timesteps"))
        return super().matches(model_index) and (has_two, expands) == (bool(self.experts), self.expand_timesteps)

    def check_repository(self, model_index: Mapping[str, Any]) -> None:
        if component_class(model_index, "image_encoder") is not None:
            raise ValueError(
                "This Wan has an image encoder: it makes a picture move. Text to video needs one without, such as"
                f" {_TEXT_TO_VIDEO}."
            )
        boundary = model_index.get("boundary_ratio")
        if not self.experts and boundary is not None:
            raise ValueError(
                f"This Wan has a `boundary_ratio` of {boundary} and one transformer, where two meet:"
                " it is one expert of two, saved without the other. Save the pipeline with both."
            )

    def check_components(self, denoiser: nn.Module, vae: nn.Module) -> None:
        channels, latents = denoiser.config.in_channels, vae.config.z_dim
        if channels != latents:
            raise ValueError(
                f"This {type(denoiser).__name__} takes {channels} channels, the latents have {latents}: it is one for"
                f" making a picture or a video into another. Text to video needs one such as {_TEXT_TO_VIDEO}."
            )

    def noise_path(self, scheduler_config: Mapping[str, Any] | None = None, **student: Any) -> FlowPath:
        config = self.scheduler_config(scheduler_config)
        return FlowPath(student.get("shift", config["shift"]), config["num_train_timesteps"])

    def student_scheduler(self, config: Mapping[str, Any], *, num_solver_steps: int, **student: Any) -> Any:
        schedule = {key: config[key] for key in self.noise_schedule_keys if key in config}
        return self.scheduler_class.from_config(
            schedule, original_inference_steps=num_solver_steps, stochastic=True, **student
        )

    def recognises(self, module_names: Iterable[str]) -> bool:
        blocks = (name for name in module_names if name.startswith("blocks."))
        return any(".attn1." in name or wan_module(name) == name for name in blocks)

    def repository_for(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        # what an attention in a block projects from is as wide as the block
        width = next((shape[1] for name, shape in shapes.items() if _READS_A_BLOCK.fullmatch(name)), None)
        return self.sizes.get(width) if width is not None else None

    def lora_target_modules(self, denoiser: nn.Module) -> list[str]:
        return sorted(
            name
            for name, module in denoiser.named_modules()
            if isinstance(base_layer(module), nn.Linear)
            and name.startswith("blocks.")
            and name.endswith(LORA_SUFFIXES)
        )

    def enable_decoder_checkpointing(self, vae: nn.Module) -> None:
        kinds = (WanResidualBlock, WanAttentionBlock, WanResample)
        recompute_causal(layer for layer in vae.decoder.modules() if isinstance(layer, kinds))

    # --- the tensors -------------------------------------------------------------------------------------------------
    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        factor = vae.config.scale_factor_spatial
        for side, size, patch in zip(("height", "width"), (height, width), denoiser.config.patch_size[1:]):
            if not isinstance(size, Integral) or size < 1 or size % (factor * patch):
                raise ValueError(
                    f"`{side}` must be a positive multiple of {factor * patch}, {factor} pixels of the VAE times"
                    f" {patch} of the transformer's patches; got {size!r}."
                )
        frames = count_latent_frames(vae, num_frames)
        return denoiser.config.in_channels, frames, height // factor, width // factor

    def encode_posterior(self, vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count_latent_frames(vae, pixels.shape[2])  # the VAE would leave out without a word what is too much
        with no_autocast(pixels.device.type):
            posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def scale_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        mean, std = latent_statistics(vae, latents)
        return (latents - mean) / std

    def decode_video(self, vae: nn.Module, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """As the VAE does it, in tiles where those are enabled; it always decodes four frames at a time."""
        mean, std = latent_statistics(vae, latents)
        with no_autocast(latents.device.type):
            return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]

    def decode_frames(
        self, vae: nn.Module, latents: torch.Tensor, frame_indices: torch.Tensor, decoder: str = "exact"
    ) -> torch.Tensor:
        """`decoder` is a row of `FRAME_DECODERS`. Nothing is clamped: a clamped pixel would have no gradient."""
        mean, std = latent_statistics(vae, latents)
        picks = [[place_in_latents(vae, frame) for frame in row] for row in frame_indices.tolist()]
        with no_autocast(latents.device.type):
            return FRAME_DECODERS[decoder](vae, (latents * std + mean).to(vae.dtype), picks)

    @torch.no_grad()
    def encode_text(self, tokenizer, text_encoder: nn.Module, prompts: list[str]) -> Conditioning:
        """`prompt_embeds (B, 512, features)`, cleaned as diffusers cleans prompts, and zeros after the text."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # it imports every loader

        tokens = tokenize(tokenizer, [prompt_clean(prompt) for prompt in prompts], TEXT_LENGTH, text_encoder)
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        padding = tokens.attention_mask[..., None].to(embeds.device) == 0
        return {"prompt_embeds": embeds.masked_fill(padding, 0)}

    def embeds_condition(self, prompt_embeds: torch.Tensor) -> Conditioning:
        """Shorter ones get zeros after them, on which the transformer was trained."""
        missing = TEXT_LENGTH - prompt_embeds.shape[1]
        return {"prompt_embeds": nn.functional.pad(prompt_embeds, (0, 0, 0, max(missing, 0)))}

    def text_features(self, denoiser: nn.Module) -> int:
        return denoiser.config.text_dim

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning
    ) -> torch.Tensor:
        """The network computes in its own type, whose three inputs must all have it; the time stays float32."""
        kind = getattr(denoiser, "dtype", latents.dtype)  # a function that stands for the network has none
        embeds = text["prompt_embeds"].to(kind)
        output = denoiser(latents.to(kind), timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        return output.to(latents.dtype)


class WanTI2V(Wan):
    """Wan 2.2 TI2V-5B, as text to video: the same transformer over the latents of another VAE."""

    name = "wan-ti2v"
    default_repository = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    sizes = {3072: default_repository}
    height = 704
    width = 1280
    num_frames = 121
    fps = 24
    data_fps = 24.0
    expand_timesteps = True


class WanA14B(Wan):
    """Wan 2.2 A14B, text to video: two transformers of the size of Wan 2.1's 14B, each for a part of the path.

    The teacher's guidance has a range of its own for each. Wan's authors sample with a scale w + 1 of 4 for the first
    and 3 for the second (`sample_guide_scale` in their wan/configs/wan_t2v_A14B.py; diffusers' modular pipeline, too),
    and Self-Forcing-Plus distils with w = 4 and 3 (`guidance_scale` in its configs/wan22_high.yaml and wan22_low.yaml,
    which multiplies the difference that is added to the conditional prediction). The ranges are as wide as each other,
    with the middle between the two: 3.5 and 2.5. No student was trained with them yet.
    """

    name = "wan-a14b"
    default_repository = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    sizes = {5120: default_repository}
    experts = {HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"}
    guidance_ranges = {HIGH_NOISE: (2.0, 5.0), LOW_NOISE: (1.0, 4.0)}
    scheduler_defaults = {**Wan.scheduler_defaults, "boundary": BOUNDARY}
    described_scheduler_keys = ("shift", "boundary", "original_inference_steps")

    def check_repository(self, model_index: Mapping[str, Any]) -> None:
        super().check_repository(model_index)
        check_boundary(model_index.get("boundary_ratio"))


def check_boundary(boundary: Any) -> float:
    """The σ where the two experts of a Wan meet; `ValueError` if a pipeline does not say it."""
    if isinstance(boundary, bool) or not isinstance(boundary, Real) or not 0 < float(boundary) < 1:
        raise ValueError(
            f"Expected a `boundary_ratio` between 0 and 1, where the two experts of this Wan meet ({BOUNDARY} for"
            f" {WanA14B.default_repository}); got {boundary!r}."
        )
    return float(boundary)


# --- latents and frames: the first latent stands for one frame, each other for four ----------------------------------
def count_latent_frames(vae: nn.Module, num_frames: int) -> int:
    """How many latents a clip of so many frames has; `ValueError` if there is none of that length."""
    stride = vae.config.scale_factor_temporal
    if not isinstance(num_frames, Integral) or num_frames < 1 or num_frames % stride != 1:
        nearest = ""
        if isinstance(num_frames, Integral):
            below = max((num_frames - 1) // stride, 0) * stride + 1
            nearest = f", such as {below} or {below + stride}"
        raise ValueError(f"`num_frames` must be one more than a multiple of {stride}{nearest}; got {num_frames!r}.")
    return (num_frames - 1) // stride + 1


def place_in_latents(vae: nn.Module, frame: int) -> tuple[int, int]:
    """The latent that a frame belongs to, and which of that latent's frames it is."""
    stride = vae.config.scale_factor_temporal
    return (0, 0) if frame == 0 else ((frame - 1) // stride + 1, (frame - 1) % stride)


def latent_statistics(vae: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the VAE's latents, for each channel."""
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).to(like) for name in ("mean", "std"))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


_Caches = list[Any]  # what each causal convolution of the decoder keeps of the latents before: a tensor, or a word
GROUP_CELLS = 4096  # latent cells of a frame that go through the decoder at once, if one clip has no more


def _empty_caches(vae: nn.Module) -> _Caches:
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())


def _joined(clips: list[_Caches]) -> _Caches:
    """The caches of several clips, of which equally many latents are decoded, as those of one batch."""
    batched = (isinstance(each[0], torch.Tensor) and len(each) > 1 for each in zip(*clips))
    return [torch.cat(each) if is_batch else each[0] for each, is_batch in zip(zip(*clips), batched)]


def _split(caches: _Caches, clips: int) -> list[_Caches]:
    """The reverse of `_joined`; no gradients lead through what is kept."""
    kept = (each.detach().split(1) if isinstance(each, torch.Tensor) else [each] * clips for each in caches)
    return [list(rows) for rows in zip(*kept)]


def _decode_next(vae: nn.Module, latent: torch.Tensor, caches: _Caches, is_first: bool) -> torch.Tensor:
    """The next latent of clips `(B, C, 1, h, w)` to its frames `(B, 3, 1 or 4, H, W)`; the caches are renewed."""
    pixels = vae.decoder(vae.post_quant_conv(latent), feat_cache=caches, feat_idx=[0], first_chunk=is_first)
    patch = vae.config.patch_size
    return pixels if patch is None else unpatchify(pixels, patch_size=patch)


Picks = list[list[tuple[int, int]]]  # for each sample its frames, as `place_in_latents` says


def _exact_frames(vae: nn.Module, latents: torch.Tensor, picks: Picks) -> torch.Tensor:
    """The frames of the whole clip: all latents up to the last that is picked are decoded, those between without
    gradients, so that a picked one costs the memory of one. Small clips go through the decoder in groups, which takes
    less time and more memory."""
    size = max(1, GROUP_CELLS // latents[0, 0, 0].numel())
    groups = (slice(first, first + size) for first in range(0, len(picks), size))
    return torch.cat([_frames_of_group(vae, latents[group], picks[group]) for group in groups])


def _frames_of_group(vae: nn.Module, latents: torch.Tensor, picks: Picks) -> torch.Tensor:
    """`_exact_frames` where the clips of which a latent is picked are decoded together, and so are the others."""
    wanted = [{latent for latent, _ in row} for row in picks]
    caches, frames = dict(enumerate(_empty_caches(vae) for _ in picks)), dict[tuple[int, int], torch.Tensor]()
    for number, latent in enumerate(latents[:, :, : max(map(max, wanted)) + 1].split(1, dim=2)):
        going_on = [clip for clip, each in enumerate(wanted) if number <= max(each)]
        for is_picked in (True, False):
            clips = [clip for clip in going_on if (number in wanted[clip]) == is_picked]
            if not clips:
                continue
            batch = _joined([caches.pop(clip) for clip in clips])  # popped: what is renewed is not to be kept as well
            with torch.set_grad_enabled(is_picked and torch.is_grad_enabled()):
                pixels = _decode_next(vae, latent[clips], batch, number == 0)
            caches |= zip(clips, _split(batch, len(clips)))
            del batch
            if is_picked:
                frames |= {(clip, number): pixels[place] for place, clip in enumerate(clips)}
    return torch.stack([frames[clip, latent][:, place] for clip, row in enumerate(picks) for latent, place in row])


def _frames_as_images(vae: nn.Module, latents: torch.Tensor, picks: Picks) -> torch.Tensor:
    """Each picked latent decoded as if the clip began with it: that is cheap, for nothing before it is decoded, but of
    any latent but the first it is no frame of the clip."""
    chosen = [clip[:, latent] for clip, row in zip(latents, picks) for latent, _ in row]
    return _decode_next(vae, torch.stack(chosen)[:, :, None], _empty_caches(vae), True)[:, :, 0]


# --frame_decoder: `f(vae, latents in the VAE's own scale (B, C, T, h, w), picks)` to frames (B * l, 3, H, W).
FRAME_DECODERS: dict[str, Callable[[nn.Module, torch.Tensor, Picks], torch.Tensor]] = {
    "exact": _exact_frames,
    "image": _frames_as_images,
}
