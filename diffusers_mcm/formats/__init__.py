"""LoRA files of other tools: written, and described."""

from .convert import LAYOUTS, convert
from .info import describe

__all__ = ["LAYOUTS", "convert", "describe"]
