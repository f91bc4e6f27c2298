"""LoRAs for Wan in the namings of the world, made of one in memory, for the tiny transformer of `tests.tiny_wan`."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm import MCMFlowScheduler, WanMCMPipeline, get_base_model
from diffusers_mcm.lora import fresh_lora
from tests.tiny_wan import SIZE, tiny_wan_transformer, wan_components

# Written out once more, as an oracle for the package's own table.
IN_A_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
# What files of LightX2V change besides: parameter -> key.
DIFFERENCES = {
    "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
    "blocks.1.ffn.net.2.bias": "blocks.1.ffn.2.diff_b",
    "blocks.0.attn1.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.1.attn2.norm_k.weight": "blocks.1.cross_attn.norm_k.diff",
    "blocks.0.norm2.weight": "blocks.0.norm3.diff",
    "blocks.0.norm2.bias": "blocks.0.norm3.diff_b",
    "blocks.1.scale_shift_table": "blocks.1.modulation.diff",
    "scale_shift_table": "head.modulation.diff",
    "patch_embedding.weight": "patch_embedding.diff",
    "patch_embedding.bias": "patch_embedding.diff_b",
    "condition_embedder.time_proj.bias": "time_projection.1.diff_b",
    "condition_embedder.text_embedder.linear_2.bias": "text_embedding.2.diff_b",
    "proj_out.weight": "head.head.diff",
    "proj_out.bias": "head.head.diff_b",
}


def original(module: str) -> str:
    """`blocks.0.attn1.to_q` as Wan's authors call it."""
    _, number, inside = module.split(".", 2)
    return f"blocks.{number}.{IN_A_BLOCK[inside]}"


def diffusers_file(tensors: Mapping[str, torch.Tensor], prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def peft_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return diffusers_file(tensors, "base_model.model.")


def original_file(
    tensors: Mapping[str, torch.Tensor],
    alpha: float | torch.Tensor | None = None,
    *,
    prefix: str = "diffusion_model.",
    halves: tuple[str, str] = ("lora_down.weight", "lora_up.weight"),
    separator: str = ".",
) -> dict[str, torch.Tensor]:
    """The authors' names; `alpha` is that of every module."""
    named = {}
    for key, tensor in tensors.items():
        module, _, half = key.rpartition(".lora_")
        name = prefix + original(module).replace(".", separator)
        named[f"{name}.{halves[half.startswith('B')]}"] = tensor
        if alpha is not None:
            named[f"{name}.alpha"] = torch.as_tensor(alpha, dtype=getattr(alpha, "dtype", torch.float32)).clone()
    return named


def musubi_file(tensors: Mapping[str, torch.Tensor], alpha: float | None = None) -> dict[str, torch.Tensor]:
    return original_file(tensors, alpha, prefix="lora_unet_", separator="_")


def random_differences(transformer, seed: int = 3, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """What a LoRA adds to parameters besides, by their names; none of it zero."""
    generator, parameters = torch.Generator().manual_seed(seed), dict(transformer.named_parameters())
    return {name: torch.randn(parameters[name].shape, generator=generator) * scale for name in DIFFERENCES}


def as_keys(differences: Mapping[str, torch.Tensor], prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
    return {prefix + DIFFERENCES[name]: tensor for name, tensor in differences.items()}


def write(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(header or {}) or None)
    return path


# --- what they do ----------------------------------------------------------------------------------------------------
WAN = get_base_model("wan")
RANK, ALPHA = 4, 0.5  # as 8 at 64: a scale of 1/8


def random_tensors() -> dict[str, torch.Tensor]:
    """A LoRA on all of the ten projections of both blocks, in memory."""
    transformer = tiny_wan_transformer()
    generator = torch.Generator().manual_seed(0)
    lora = fresh_lora(transformer, WAN.lora_target_modules(transformer), rank=RANK, generator=generator)
    return {key: torch.randn(each.shape, generator=generator) * 0.3 for key, each in lora.tensors.items()}


def wan_pipeline(**components) -> WanMCMPipeline:
    """Without fresh noise, so that two pipelines can be compared."""
    components = wan_components() | dict(scheduler=MCMFlowScheduler(stochastic=False)) | components
    pipe = WanMCMPipeline(**components, height=SIZE, width=SIZE, num_frames=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options) -> torch.Tensor:
    """Latents of a pipeline, ours or diffusers' own."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=2, height=SIZE, width=SIZE, num_frames=5, guidance_scale=1.0) | options
    return pipe("a red ring", latents=latents, output_type="latent", **options).frames


def sums(tensors, differences=None, scale=1.0, strength=1.0) -> WanMCMPipeline:
    """A pipeline whose weights are the base's plus all that a LoRA adds, added up here."""
    transformer = tiny_wan_transformer()
    parameters = dict(transformer.named_parameters())
    for key in tensors:
        if ".lora_A." in key:
            module = key.removesuffix(".lora_A.weight")
            product = tensors[f"{module}.lora_B.weight"].double() @ tensors[key].double()
            parameters[f"{module}.weight"].data += (strength * scale * product).float()
    for name, difference in (differences or {}).items():
        parameters[name].data += strength * difference
    return wan_pipeline(transformer=transformer)


# --- fixtures, which a module of tests gives its own names: `tensors, pipe = LORA_TENSORS, WAN_PIPE` -----------------
LORA_TENSORS = pytest.fixture(random_tensors, scope="module")
WAN_PIPE = pytest.fixture(wan_pipeline)
