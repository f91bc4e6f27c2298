"""The command `diffusers-mcm`. Everything heavy is imported by the subcommand that needs it."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

SHAPES_COMMANDS = {
    "build": (".shapes.build", "write the shapes world: H.264 videos with captions, and the image sets"),
    "demo": (".shapes.demo", "sample held-out prompts with the teacher and with MCM, side by side"),
    "figures": (".shapes.figures", "measure teacher, MCM and LCM on every held-out caption"),
}
DTYPES = ("float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `diffusers-mcm`; the shapes commands parse their own flags."""
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm", description="Motion consistency models: text to video in one to eight steps."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    shapes = commands.add_parser("shapes", help="the embedded world of moving shapes: build, demo, figures")
    shapes_commands = shapes.add_subparsers(dest="shapes_command", required=True, metavar="COMMAND")
    for name, (_, text) in SHAPES_COMMANDS.items():
        shapes_commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="make videos from prompts")
    add = generate.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to show; several prompts give numbered files")
    add("-o", "--output", default="out.mp4", type=Path, help=".mp4, .gif or .png (all frames in one picture)")
    add("--model", default="mcm-shapes", help="packaged model, folder or Hub id: an MCM LoRA or a base model")
    add("--steps", type=int, help="denoising steps, 1 to 8 as a rule (default: the model's, or 4)")
    add("--seed", type=int, help="same seed, same video; every prompt starts from it (default: a new one, printed)")
    add("--frames", type=int, help="number of frames (default: the model's)")
    add("--height", type=int, help="in pixels (default: the model's)")
    add("--width", type=int, help="in pixels (default: the model's)")
    add("--fps", type=float, help="frames per second of the file (default: the model's)")
    add("--guidance_scale", type=float, help="above 1 calls the network twice a step (default: off)")
    add("--negative_prompt", help="what to avoid; needs --guidance_scale above 1")
    add("--device", help="cpu, cuda, cuda:1, mps … (default: the best there is)")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the networks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that the user can put right."""
    arguments, rest = (parser := build_parser()).parse_known_args(argv)
    try:
        if arguments.command == "shapes":
            module = import_module(SHAPES_COMMANDS[arguments.shapes_command][0], __package__)
            module.main(rest)
        else:
            if rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            generate(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"diffusers-mcm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusers-mcm: interrupted", file=sys.stderr)
        return 130
    return 0


def generate(arguments: argparse.Namespace) -> None:
    """Sample every prompt and write one file each."""
    from .video_io import write_video, writer_for

    writer_for(arguments.output)  # a wrong extension is told before the work, not after it
    if arguments.fps is not None and arguments.fps <= 0:
        raise ValueError(f"expected --fps above 0, got {arguments.fps:g}")

    import torch

    from . import MCMPipeline
    from .devices import choose_device

    device = choose_device(arguments.device)
    seed = torch.seed() % 2**32 if arguments.seed is None else arguments.seed
    pipeline = MCMPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(device)
    options = {
        "num_inference_steps": arguments.steps,
        "num_frames": arguments.frames,
        "height": arguments.height,
        "width": arguments.width,
        "guidance_scale": arguments.guidance_scale,
        "negative_prompt": arguments.negative_prompt,
    }
    options = {name: value for name, value in options.items() if value is not None}
    fps = arguments.fps or pipeline.sampling_default("fps")
    for prompt, path in zip(arguments.prompts, numbered(arguments.output, len(arguments.prompts))):
        generator = torch.Generator().manual_seed(seed)
        video = pipeline(prompt, generator=generator, output_type="np", **options).frames[0]
        write_video(path, video, fps=fps)
        print(f"{path}  ({len(video)} frames, seed {seed}): {prompt}")


def numbered(path: Path, count: int) -> list[Path]:
    """`out.mp4` -> [out.mp4], or [out-1.mp4, out-2.mp4, …] for several."""
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_name(f"{path.stem}-{index:0{digits}d}{path.suffix}") for index in range(1, count + 1)]
