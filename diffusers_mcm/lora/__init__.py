"""LoRA: what it is in memory and on disk, how tools name its tensors, and its layers in a network.

In memory a LoRA is a dict `module.lora_A.weight -> tensor`, `module.lora_B.weight -> tensor`, with the module's full
name in the denoiser. On disk the keys have a prefix: the denoiser's name (`unet.`, what diffusers writes and reads) or
`base_model.model.` (what PEFT writes). Both are read, and others besides (`layouts`, `components`); the first is
written, unless one converts (`formats`). What else belongs to a LoRA, scale, settings and scheduler, is in the header
of the file too, so that the file alone is enough.

A LoRA fits wholly or not at all: a key without a module, a module with half a pair, a tensor of another shape is an
error before anything in the denoiser has changed.
"""

from __future__ import annotations

from ..location import MOTION_HEAD_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME
from ..settings import CONFIG_NAME
from .adapter import (
    DEFAULT_ADAPTER,
    METADATA_KEY,
    PEFT_CONFIG_NAME,
    LoRA,
    split_key,
)
from .components import read_components, write_components
from .layers import (
    activate,
    add_lora,
    base_layer,
    check_fits,
    check_not_wrapped,
    compute_dtype,
    extract_lora,
    fresh_lora,
    fused,
    load_lora_into,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    replace,
    set_lora_state_dict,
    train_only,
)
from .layouts import TEXT_ENCODER
from .reading import LoRAFile, open_safetensors, read_beside, read_lora, read_lora_file, to_lora
from .writing import lora_header, save_lora, write_lora_folder, write_lora_weights, write_safetensors, write_settings

__all__ = [
    "CONFIG_NAME",
    "DEFAULT_ADAPTER",
    "METADATA_KEY",
    "MOTION_HEAD_NAME",
    "PEFT_CONFIG_NAME",
    "PEFT_WEIGHTS_NAME",
    "TEXT_ENCODER",
    "WEIGHTS_NAME",
    "LoRA",
    "LoRAFile",
    "activate",
    "add_lora",
    "base_layer",
    "check_fits",
    "check_not_wrapped",
    "compute_dtype",
    "extract_lora",
    "fresh_lora",
    "fused",
    "load_lora_into",
    "lora_disabled",
    "lora_header",
    "lora_layers",
    "lora_state_dict",
    "open_safetensors",
    "read_beside",
    "read_components",
    "read_lora",
    "read_lora_file",
    "replace",
    "save_lora",
    "set_lora_state_dict",
    "split_key",
    "to_lora",
    "train_only",
    "write_components",
    "write_lora_folder",
    "write_lora_weights",
    "write_safetensors",
    "write_settings",
]
