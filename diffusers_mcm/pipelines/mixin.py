"""The mixins of `MCMPipeline` find here what they may count on in each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base_models import BaseModel


class PipelineMixin:
    """The base of `MCMPipeline`'s mixins declares what the others, and `DiffusionPipeline`, give each of them."""

    if TYPE_CHECKING:  # so that nothing stands in front of what it declares
        base_model: BaseModel
        vae: nn.Module
        text_encoder: nn.Module
        tokenizer: Any
        scheduler: Any
        config: Any
        progress_bar: Any
        _execution_device: torch.device

        def __call__(self, *args, **kwargs) -> Any: ...
        def save_pretrained(self, save_directory: Any, *args, **kwargs) -> None: ...
        def sampling_default(self, name: str) -> int: ...
        @property
        def denoiser(self) -> Any: ...
