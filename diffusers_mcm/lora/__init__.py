"""LoRA: what it is in memory and on disk, how tools name its tensors, and its layers in a network.

In memory a LoRA is a dict `module.lora_A.weight -> tensor`, `module.lora_B.weight -> tensor`, with the module's full
name in the denoiser. On disk the keys have a prefix: the denoiser's name (`unet.`, what diffusers writes and reads) or
`base_model.model.` (what PEFT writes). Both are read, and others besides (`layouts`, `components`); the first is
written, unless one converts (`formats`). What else belongs to a LoRA, scale, settings and scheduler, is in the header
of the file too, so that the file alone is enough.

A LoRA fits wholly or not at all: a key without a module, a module with half a pair, a tensor of another shape is an
error before anything in the denoiser has changed.
"""

from ..location import MOTION_HEAD_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME
from ..settings import CONFIG_NAME
from .adapter import DEFAULT_ADAPTER, METADATA_KEY, PEFT_CONFIG_NAME, LoRA, split_key
from .components import read_components
from .experts import (
    PAIR_NAMES,
    LoRAPair,
    as_pair,
    by_experts,
    check_alike,
    expert_in_name,
    expert_of,
    find_pair,
    for_expert,
    pair_of,
    read_loras,
    write_lora_pair,
)
from .files import (
    lora_header,
    open_safetensors,
    read_beside,
    read_lora,
    read_lora_file,
    write_lora_folder,
    write_lora_weights,
    write_safetensors,
    write_settings,
)
from .layers import (
    activate,
    add_lora,
    base_layer,
    check_fits,
    compute_dtype,
    extract_lora,
    fresh_lora,
    fused,
    load_lora_into,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    parameter_named,
    set_lora_state_dict,
    take_out,
    train_only,
)
from .layouts import DENOISER, SECOND_DENOISER, TEXT_ENCODER
