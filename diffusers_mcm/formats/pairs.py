"""What a LoRA's two matrices amount to."""

from __future__ import annotations

import math
from collections import Counter

from ..lora import LoRA, split_key


def check_pairs(lora: LoRA) -> None:
    """`ValueError` unless every module has both of its matrices."""
    halves = Counter(split_key(key)[0] for key in lora.tensors)
    half = [module for module, count in halves.items() if count != 2]
    if half:
        raise ValueError(
            f"{lora.source} is incomplete: {len(half)} of its {len(halves)} modules have only one of lora_A and"
            f" lora_B, such as {half[0]!r}. Was the file cut or edited? Fetch it again."
        )


def scales(lora: LoRA) -> dict[str, float]:
    """The factor of B·A in each module: alpha / rank, or alpha / √rank with rsLoRA."""
    from peft.utils.other import get_pattern_key

    config, ranks = lora.peft_config(), lora.ranks()
    alphas = {
        module: config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        for module in ranks
    }
    return {module: alphas[module] / (math.sqrt(r) if lora.use_rslora else r) for module, r in ranks.items()}
