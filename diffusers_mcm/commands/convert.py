"""Writes a LoRA in the layout of another tool."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .lora_flags import add_place, take_place
from .startup import quiet_libraries

LAYOUTS = {
    "peft": "a folder with adapter_model.safetensors and adapter_config.json",
    "diffusers": "a folder with, or a file like, pytorch_lora_weights.safetensors",
    "comfyui": "a file with a Wan LoRA under the names that Wan's authors gave its modules, for ComfyUI",
    "kohya": "a file with the spatial layers of an AnimateDiff LoRA, for ComfyUI and other readers of kohya files",
    "motion-module": "a file with a motion adapter and, fused into it, the motion layers of an AnimateDiff LoRA",
}


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm convert`."""
    layouts = "\n".join(f"  {name:14} {text}" for name, text in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm convert",
        description=f"{__doc__} The layouts:\n\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "source",
        nargs="+",
        help="folder, .safetensors file, packaged model or Hub id of a LoRA; for the pair of Wan 2.2 A14B one with"
        " both its files, or two, HIGH_NOISE LOW_NOISE",
    )
    add("destination", type=Path, help="folder, or file that ends in .safetensors; for a pair a folder")
    add("--to", required=True, choices=LAYOUTS, help="the layout")
    add_place(add, "SOURCE")
    add("--motion_adapter", help="what to merge into, as a folder or Hub id (default: what the LoRA was trained with)")
    add("--overwrite", action="store_true", help="replace what is at DESTINATION")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and say what was written."""
    arguments = build_parser().parse_intermixed_args(argv)
    take_place(arguments)
    options = vars(arguments)
    source = options.pop("source")
    with quiet_libraries():
        from ..formats import convert, describe

        path = convert(
            source[0] if len(source) == 1 else source, options.pop("destination"), options.pop("to"), **options
        )
        written = describe(path)
    for file in written.values() if "high_noise" in written else (written,):
        contents = f"{file['targets']} modules, " if file["targets"] else ""
        print(f"{file['file']}  ({file['layout']}: {contents}{file['tensors']} tensors, {file['bytes'] / 1e6:.1f} MB)")
