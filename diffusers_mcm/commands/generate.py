"""Makes videos from prompts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm generate`."""
    parser = argparse.ArgumentParser(prog="diffusers-mcm generate", description=__doc__)
    add = parser.add_argument
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Sample every prompt and write one file each."""
    arguments = build_parser().parse_args(argv)
    from ..video_io import write_video, writer_for

    writer_for(arguments.output)  # a wrong extension is told before the work, not after it
    if arguments.fps is not None and arguments.fps <= 0:
        raise ValueError(f"expected --fps above 0, got {arguments.fps:g}")

    import torch

    from .. import MCMPipeline
    from ..devices import choose_device

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
