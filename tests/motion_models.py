"""The repositories of AnimateLCM and AnimateDiff-Lightning, file by file as they are on the Hub, with tiny weights."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_mcm.lora.layouts import animatediff_keys
from tests.formats.world import STABLE_DIFFUSION
from tests.tiny import save_tiny_stable_diffusion, tiny_image_unet, tiny_motion_adapter

LCM, LIGHTNING = "wangfuyun/AnimateLCM", "ByteDance/AnimateDiff-Lightning"
LCM_LORA = "AnimateLCM_sd15_t2v_lora.safetensors"
WIDTHS = dict(block_out_channels=(32, 64))
# What a file without a configuration does not tell, and is always so.
SIZES = dict(**WIDTHS, motion_num_attention_heads=8, motion_norm_num_groups=32, motion_max_seq_length=32)
FINE_TUNE, FINE_TUNE_SEED = "emilianJR/epiCRealism", 7


def kohya_lora(unet, rank=4) -> dict[str, torch.Tensor]:
    """A random LoRA for the layers of an image UNet, as kohya names them, of a scale of a half."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_out.0", ".ff.net.2", ".proj_in", ".conv1")):
            key, (out, into, *kernel) = "lora_unet_" + name.replace(".", "_"), module.weight.shape
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, into, *kernel, generator=generator) * 0.2
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.2
            tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    return tensors


def save_motion_models(root: Path) -> Path:
    """Both, the base model that they go into, and a fine-tune of it, as `tests.hub_server` serves them."""
    for name, seed in ((STABLE_DIFFUSION, 0), (FINE_TUNE, FINE_TUNE_SEED)):
        save_tiny_stable_diffusion(root / name, seed, unet=tiny_image_unet(seed, **WIDTHS))
    adapter = tiny_motion_adapter(1, **SIZES)
    adapter.save_pretrained(root / LCM)
    shutil.copyfile(
        root / LCM / "diffusion_pytorch_model.safetensors", root / LCM / "diffusion_pytorch_model.fp16.safetensors"
    )
    save_file(kohya_lora(tiny_image_unet(**WIDTHS)), root / LCM / LCM_LORA)
    (root / LCM / "AnimateLCM_sd15_t2v.ckpt").write_bytes(b"pickled")
    (root / LIGHTNING / "comfyui").mkdir(parents=True)
    for steps in (1, 2, 4, 8):
        tensors = tiny_motion_adapter(steps, **SIZES).state_dict()
        stem = f"{root / LIGHTNING}/animatediff_lightning_{steps}step"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{stem}_diffusers.safetensors")
        save_file(animatediff_keys(tensors), f"{stem}_comfyui.safetensors")
    return root
