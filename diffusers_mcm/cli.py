"""The command `diffusers-mcm`: a table of subcommands, each a module of that name that parses its own flags."""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "generate": "make videos from prompts",
    "convert": "write a LoRA in the layout of another tool",
    "evaluate": "measure folders of videos: FVD, CLIPSIM, FID and motion",
    "encode": "encode a training's clips and captions once",
    "info": "tell what is in a LoRA",
    "push": "publish a LoRA folder on the Hub",
}
SHAPES_COMMANDS = {
    "build": "write the shapes world: H.264 videos with captions, and the image sets",
    "demo": "sample held-out prompts with the teacher and with MCM, side by side",
    "figures": "measure teacher, MCM and LCM on every held-out caption",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `diffusers-mcm`, which knows the subcommands but not their flags."""
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm", description="Motion consistency models: text to video in one to eight steps."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False).set_defaults(module=f".commands.{name}")
    shapes = commands.add_parser("shapes", help="the embedded world of moving shapes: build, demo, figures")
    shapes_commands = shapes.add_subparsers(required=True, metavar="COMMAND")
    for name, text in SHAPES_COMMANDS.items():
        shapes_commands.add_parser(name, help=text, add_help=False).set_defaults(module=f".shapes.{name}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that the user can put right."""
    arguments, rest = build_parser().parse_known_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt that its encoding lacks is no reason to stop a list
            stream.reconfigure(errors="backslashreplace")
    try:
        import_module(arguments.module, __package__).main(rest)
        sys.stdout.flush()  # where that goes to a full disk, it is an error like any other
    except (ValueError, OSError, ImportError) as error:
        print(f"diffusers-mcm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusers-mcm: interrupted", file=sys.stderr)
        return 130
    return 0
