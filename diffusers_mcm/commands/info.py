"""Tells what is in a LoRA, or in each of a pair for two experts."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .lora_flags import add_place, take_place
from .startup import quiet_libraries


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm info`."""
    parser = argparse.ArgumentParser(prog="diffusers-mcm info", description=__doc__)
    add = parser.add_argument
    add("source", help="folder, .safetensors file, packaged model or Hub id; a motion module, kohya file or pair, too")
    add_place(add, "SOURCE")
    add("--json", action="store_true", help="for programs to read")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the description."""
    arguments = build_parser().parse_args(argv)
    take_place(arguments)
    options = vars(arguments)
    as_json = options.pop("json")
    with quiet_libraries():
        from ..formats import describe

        description = describe(options.pop("source"), **options)
    if as_json:
        print(json.dumps(description, indent=2))
        return
    _show(description)


def _show(description: Mapping[str, Any], indent: str = "") -> None:
    for name, value in description.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _show(value, f"{indent}  ")
        else:
            print(f"{indent}{name}: {'not known' if value is None else value}")
