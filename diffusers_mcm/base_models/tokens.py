"""What a text encoder is given of prompts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def tokenize(tokenizer, prompts: list[str], length: int, text_encoder: nn.Module) -> Any:
    """The tokenizer's output for the encoder, `(B, length)` where that computes: padded, or cut off with a warning
    that names what is lost."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    for prompt, full in zip(prompts, tokenizer(prompts, verbose=False).input_ids):
        if len(full) > length:
            lost = tokenizer.decode(full[length - 1 : -1])
            logger.warning("The text encoder reads %d tokens; of %r it will not see %r.", length, prompt, lost)
    # Where weights are offloaded one by one the encoder is nowhere, and accelerate's hook moves what it is given.
    meta = text_encoder.device.type == "meta"
    return tokens.to(torch.device("cpu") if meta else text_encoder.device)
