"""Encode once what a training would encode again in every epoch: clips, captions, frames that are judged.

Takes the flags of the training script, --cache_latents among them, and fills that folder; what is there already stays.
Then train with the same flags.
"""

import logging
from collections.abc import Sequence

from .startup import quick_imports, quiet_libraries


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cache, and say where it is."""
    from ..training.arguments import parse_config

    config = parse_config(argv, prog="diffusers-mcm encode", description=__doc__)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    with quiet_libraries():
        with quick_imports():
            from ..training.encoding import encode
        folder = encode(config)
    print(folder)
