"""What a LoRA is in memory, and the names of the files it lies in."""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from .. import hub
from ..settings import Settings

logger = logging.getLogger(__name__)

PEFT_CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for it, in the safetensors header
# Ours, in the same place: settings, scheduler and PEFT's configuration, each as JSON.
HEADER_KEYS = ("mcm_config", "mcm_scheduler", "peft_adapter_config")
DEFAULT_ADAPTER = "default"


@dataclass
class LoRA:
    """A LoRA that was read from disk, or is about to be written."""

    tensors: dict[str, torch.Tensor]
    # What some LoRAs for Wan add to parameters besides, biases and norms, by the parameter's name and in its shape.
    differences: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    alpha: float | None = None  # None: the rank, that is a scale of one
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    settings: Settings = Settings()  # mcm_config.json
    scheduler_config: dict[str, Any] | None = None
    adapter_config: dict[str, Any] | None = None  # adapter_config.json, as PEFT wrote it
    source: str = "the LoRA"
    folder: Path | None = None  # where `settings` were read, for paths relative to it

    @property
    def base_repository(self) -> str | None:
        """Where its base model is: what our settings say, or else PEFT's, if that is not a path elsewhere."""
        if self.settings.base_model_repository is not None:
            return self.settings.base_model_repository
        name = (self.adapter_config or {}).get("base_model_name_or_path")
        if name and not (hub.is_hub_id(name) or os.path.isdir(name)):
            logger.warning("%s names a base model that is not here, %r; its default is used.", self.source, name)
            return None
        return name

    def cast(self, dtype: torch.dtype | None) -> Self:
        """Return it with tensors of this type on the CPU; `None` leaves theirs."""
        tensors, differences = (
            {key: tensor.detach().to("cpu", dtype) for key, tensor in part.items()}
            for part in (self.tensors, self.differences)
        )
        return replace(self, tensors=tensors, differences=differences)

    @property
    def modules(self) -> list[str]:
        return sorted({split_key(key)[0] for key in self.tensors})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each module's matrix A, where it has one."""
        halves = {module: self.tensors.get(f"{module}.lora_A.weight") for module in self.modules}
        return {module: tuple(down.shape) for module, down in halves.items() if down is not None}

    def ranks(self) -> dict[str, int]:
        return {module: self.tensors[f"{module}.lora_A.weight"].shape[0] for module in self.modules}

    def peft_config(self):
        """peft's `LoraConfig`, with the ranks the tensors really have."""
        from peft import LoraConfig

        ranks = self.ranks()
        rank = Counter(ranks.values()).most_common(1)[0][0]
        different = {f"^{module}": r for module, r in ranks.items() if r != rank}
        # Without an alpha every module has scale one, whatever its rank.
        alpha, alphas = (rank, different) if self.alpha is None else (self.alpha, self.alpha_pattern)
        config: Any = dict(lora_alpha=alpha, alpha_pattern=alphas, use_rslora=self.use_rslora)
        return LoraConfig(r=rank, rank_pattern=different, target_modules=self.modules, **config)

    def scales(self) -> dict[str, float]:
        """The factor of B·A in each module: alpha / rank, or alpha / √rank with rsLoRA."""
        from peft.utils.other import get_pattern_key

        config, ranks = self.peft_config(), self.ranks()
        pattern = config.alpha_pattern
        alphas = {module: pattern.get(get_pattern_key(pattern, module), config.lora_alpha) for module in ranks}
        return {module: alphas[module] / (math.sqrt(r) if self.use_rslora else r) for module, r in ranks.items()}

    def without_differences(self) -> Self:
        """Return its pairs of matrices alone."""
        return replace(self, differences={}) if self.differences else self

    def check_no_differences(self, what: str) -> None:
        """`ValueError` if it changes parameters other than by pairs, where `what` can do nothing with that."""
        if self.differences:
            raise ValueError(
                f"{self.source} adds to {len(self.differences)} parameters besides its LoRA (keys *.diff, *.diff_b),"
                f" such as {next(iter(self.differences))!r}, and {what}. They are part of what it does:"
                " MCMPipeline.load_lora_weights puts them in, and the layout comfyui holds them."
            )

    def check_pairs(self) -> None:
        """`ValueError` unless every module has both of its matrices, and they fit each other."""
        halves = Counter(split_key(key)[0] for key in self.tensors)
        half = [module for module, count in halves.items() if count != 2]
        if half:
            raise ValueError(
                f"{self.source} is incomplete: {len(half)} of its {len(halves)} modules have only one of lora_A and"
                f" lora_B, such as {half[0]!r}. Was the file cut or edited? Fetch it again."
            )
        for module in self.modules:
            check_shapes(self.source, module, *(self.tensors[f"{module}.lora_{half}.weight"].shape for half in "AB"))


def check_shapes(source: str, module: str, down: Sequence[int], up: Sequence[int]) -> None:
    """`ValueError` unless matrices of these shapes, A and B, are those of a linear layer or a convolution."""
    if len(down) not in (2, 4, 5) or len(up) != len(down) or up[1] != down[0]:
        raise ValueError(
            f"{source}: lora_A and lora_B of {module!r} have the shapes {tuple(down)} and {tuple(up)}; expected those"
            " of a linear layer, (r, in) and (out, r), or of a convolution, with its kernel's sizes besides."
        )


def split_key(key: str) -> tuple[str, str]:
    """`a.b.lora_A.weight` to (`a.b`, `lora_A.weight`)."""
    module, separator, rest = key.rpartition(".lora_")
    return module, f"lora_{rest}" if separator else key
