"""Measures folders of videos against real ones: FVD, KVD, CLIPSIM, FID, KID, CMMD and motion."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import check_takes_files
from .machine import join_processes
from .startup import quick_imports, quiet_libraries

_NAME = re.compile(r"[^\W_][\w .,+=@%()-]*")
EPILOG = """
  diffusers-mcm evaluate --reference DATA --num_videos 500 --write_prompts prompts.jsonl
  diffusers-mcm generate --prompts prompts.jsonl --model M --steps 4 -o out/mcm4
  diffusers-mcm evaluate out/mcm4 --reference DATA --num_videos 500 -o results

Any folder works: what generate wrote, any tool's videos beside a metadata.csv (file_name,caption), VBench's names
("a prompt-0.mp4"). The networks' rows and where their weights come from: docs/evaluation.md.
The same command goes on where it was stopped; a further folder is put beside those that results holds already.

  accelerate launch -m diffusers_mcm evaluate …      shares the videos among the GPUs
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm evaluate`."""
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm evaluate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        metavar="[NAME=]DIR",
        help="videos of a method; the name is the folder's if none is given",
    )
    add("--reference", required=True, metavar="DATA", help="real videos with captions: folder, table, tars or Hub id")
    add("--images", metavar="DATA", help="real images, for FID, KID and CMMD (default: the reference's frames)")
    add("-o", "--output", type=Path, help="folder for evaluation.json, .md, .png and the features")
    add(
        "--write_prompts",
        type=Path,
        metavar="FILE",
        help="write the reference's captions, a seed each, and stop there",
    )

    data = parser.add_argument_group("reference").add_argument
    data("--split", default="train", help="of a data set on the Hub, or a subfolder (default: train, or the folder)")
    data("--revision", help="of a data set on the Hub")
    data("--video_column", help="column of the videos, if not found by itself")
    data("--caption_column", help="column of the captions, if not found by itself")

    images = parser.add_argument_group("images").add_argument
    images("--image_split", help="of a data set on the Hub, or a subfolder (default: train, or the folder)")
    images("--image_revision", help="of a data set on the Hub")
    images("--image_column", help="column of the images, if not found by itself")
    images("--num_images", type=int, help="chosen by the seed (default: all)")

    protocol = parser.add_argument_group("protocol").add_argument
    protocol(
        "--metrics", nargs="+", help="out of fvd kvd clipsim fid kid cmmd motion (default: fvd clipsim fid motion)"
    )
    protocol("--num_videos", type=int, help="of the reference, chosen by the seed (default: all)")
    protocol("--seed", type=int, default=0, help="chooses videos, captions, windows and images (default: 0)")
    protocol("--num_frames", type=int, default=16, help="of a clip (default: 16)")
    protocol("--frame_interval", type=int, default=1, help="of the reference: every n-th frame (default: 1)")
    protocol("--fps", type=float, help="of the reference: so many frames per second, instead of every n-th")
    protocol("--window", default="centre", help="of the reference: centre, start or random (default: centre)")
    protocol("--size", type=int, nargs="+", metavar="PX", help="height and width of all clips (default: the samples')")
    protocol(
        "--video_network",
        nargs="+",
        dest="video_networks",
        metavar="ROW",
        help="i3d=FILE, i3d-eps1e-3=FILE, vjepa2, videomae, each with =weights (default: videomae)",
    )
    protocol(
        "--frame_network",
        nargs="+",
        dest="frame_networks",
        metavar="ROW",
        help="dinov2, clip, inception, each with =weights (default: dinov2)",
    )
    protocol("--clip", help="the CLIP of CLIPSIM (default: openai/clip-vit-base-patch16)")
    protocol("--covariance", default="sample", help="sample (N - 1) or population (N, as cd-fvd) (default: sample)")
    protocol("--resamples", type=int, default=200, help="of captions, for the intervals; 0: none (default: 200)")

    machine = parser.add_argument_group("machine").add_argument
    machine("--batch_size", type=int, default=4, help="videos at once (default: 4)")
    machine("--device", help="cpu, cuda, cuda:1, mps … (default: the best there is)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write prompts, or measure and print the table."""
    arguments = build_parser().parse_args(argv)
    if arguments.write_prompts:
        _write_prompts(arguments)
    else:
        _measure(arguments)


def _write_prompts(arguments: argparse.Namespace) -> None:
    from ..evaluation.evaluate import write_prompts

    if arguments.folders:
        raise ValueError(f"expected no folders with --write_prompts, got {arguments.folders[0]!r}")
    count = write_prompts(
        arguments.write_prompts, arguments.reference, arguments.num_videos, arguments.seed, **_data(arguments)
    )
    print(f"{arguments.write_prompts}: {count} prompts")


def _data(arguments: argparse.Namespace) -> dict[str, str | None]:
    """How the reference is opened."""
    columns = {"media_column": arguments.video_column, "caption_column": arguments.caption_column}
    return {"split": arguments.split, "revision": arguments.revision, **columns}


def _image_data(arguments: argparse.Namespace) -> dict[str, str]:
    """How the images are opened, as far as flags say it."""
    names = {"split": "image_split", "revision": "image_revision", "media_column": "image_column"}
    given = {field: getattr(arguments, name) for field, name in names.items()}
    return {field: value for field, value in given.items() if value is not None}


def named_folders(texts: Sequence[str]) -> dict[str, str]:
    """`out/mcm4`, `MCM=out/mcm4` -> name and folder."""
    folders: dict[str, str] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or Path(text).is_dir():
            name, folder = Path(text).resolve().name, text
        if not _NAME.fullmatch(name) or name in folders:
            raise ValueError(
                f"expected a name of its own for each folder, of letters, digits and common signs, got {name!r} for"
                f" {folder}: write NAME={folder}"
            )
        folders[name] = folder
    return folders


def _size(given: list[int] | None) -> tuple[int, int] | None:
    """Height and width, of which one number may stand for both."""
    if given is None:
        return None
    if len(given) > 2 or min(given) < 1:
        raise ValueError(f"expected --size as one number, or height and width, got {' '.join(map(str, given))}")
    return given[0], given[-1]


def _measure(arguments: argparse.Namespace) -> None:
    if not arguments.folders or arguments.output is None:
        raise ValueError("expected folders of videos and --output, or --write_prompts")
    folders = named_folders(arguments.folders)
    check_takes_files(arguments.output, "--output")
    size = _size(arguments.size)
    with quick_imports():
        from tqdm import tqdm

        from .. import __version__
        from ..devices import choose_device
        from ..evaluation.evaluate import Options, evaluate
        from ..evaluation.measuring import Processes

    names = {entry.name for entry in dataclasses.fields(Options)} - {"size", "device"}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    device = choose_device(arguments.device)
    state = join_processes(device)
    if state.num_processes > 1:
        device = str(state.device)
    options = Options(**given, size=size, device=device)

    def progress(items, name):
        return tqdm(items, desc=name, disable=not state.is_main_process or not items)

    numbers = (state.process_index, state.num_processes)
    processes = Processes(*numbers, state.wait_for_everyone, state.destroy_process_group)
    with quiet_libraries():
        found = evaluate(
            folders,
            arguments.reference,
            arguments.output,
            options,
            images=arguments.images,
            data=_data(arguments),
            image_data=_image_data(arguments),
            processes=processes,
            progress=progress,
            versions={"diffusers_mcm": __version__},
        )
    if found is not None:
        print(found.summary())
        print(f"\n{arguments.output / 'evaluation.md'}")
