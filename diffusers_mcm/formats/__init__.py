"""LoRA files of other tools: written, and described."""

from .conversion import LAYOUTS, convert
from .description import describe
