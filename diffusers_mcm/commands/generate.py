"""Makes videos from prompts, resumes where it stopped, and shares a list among processes."""

import argparse
import math
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_takes_files, sha256
from ..hub import public_name
from ..location import Location
from ..settings import SAMPLING_KEYS
from .grammar import notice
from .lora_flags import add_place, one_or_pair, take_place
from .machine import add_machine, check_offload, join_processes, spend_less
from .prompts import LAYOUTS, Job, plan, read_prompts
from .startup import quick_imports, quiet_libraries

if TYPE_CHECKING:
    from .. import MCMPipeline
    from ..pipelines.few_step import FewStep

# The names of `pipelines.samplers`, which is not imported for the flags' sake: it takes torch along.
SAMPLERS = ("mcm", "lcm", "ddim", "dpm++", "euler", "unipc")
SPACINGS = ("trailing", "leading", "linspace")
FEW_STEP = ("auto", "lightx2v", "wan2.2-lightning", "fastwan", "fastwan-5b", "rcm")  # and of `pipelines.few_step`
# --format -> how the names in a folder end
FORMATS = {"mp4": ".mp4", "gif": ".gif", "webp": ".webp", "png": ".png", "frames": ""}
VBENCH_FORMATS = ("mp4", "gif")  # that VBench reads
EPILOG = """
lists of prompts (--prompts FILE, or - for stdin):
  .txt, stdin   a prompt a line; blank lines and lines that start with # are skipped
  .jsonl        {"prompt": "a corgi", "negative_prompt": "blurry", "seed": 7} a line, the last two if wanted
  .json         an array of such objects, or of texts
  .csv          the same as columns, under a header

Every file holds how it was made. Where one is there already and was made by the same settings, it is not made again,
so that the same command finishes a list that was interrupted; one that was made by other settings is made anew. A file
that this command did not make is never replaced without --overwrite.

  accelerate launch -m diffusers_mcm generate --prompts list.txt -o videos      shares the list among the GPUs
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm generate`."""
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm generate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="what to show; - reads prompts from stdin")
    add("--prompts", metavar="FILE", help="a list of prompts: .txt, .json, .jsonl, .csv, or - for stdin")
    add(
        *("-o", "--output"),
        default="out.mp4",  # a text, not a path, which would forget a slash at the end
        help=".mp4, .gif, .webp or .png (all frames in one picture); without an ending, or with a slash at the end, a"
        " folder (default: out.mp4)",
    )
    add("--format", choices=FORMATS, help="of the videos in a folder; frames: each a folder of .png (default: mp4)")
    add(
        "--layout",
        choices=LAYOUTS,
        default="plain",
        help="of a folder; vbench: {prompt}-{index}.mp4, the prompts as they are, indices from 0 (default: plain)",
    )
    add("--overwrite", action="store_true", help="make every video, and replace whatever is there")
    add("-v", "--verbose", action="store_true", help="show the libraries' notices and their bars of loading as well")
    _add_model(parser)
    _add_sampling(parser)
    add_machine(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_argument
    model(
        "--model",
        help="packaged model, folder or Hub id: an MCM LoRA, a base model, or motion modules as wangfuyun/AnimateLCM"
        " and ByteDance/AnimateDiff-Lightning (default: mcm-shapes)",
    )
    model(
        "--lora",
        action="append",
        help="MCM LoRA: folder, file or Hub id; put in --model, or without one in its own base model; for the two"
        " experts of Wan 2.2 A14B a folder with both, or twice: --lora HIGH_NOISE --lora LOW_NOISE",
    )
    add_place(model, "its folder or repository")
    model(
        "--base_model",
        help="put the LoRA or the motion modules in this; for AnimateDiff any Stable Diffusion 1.5 (default: its own)",
    )
    model("--variant", help="which files of the base model's weights to read, as fp16, where there are no others")
    model("--lora_scale", type=float, default=1.0, help="strength of the LoRA (default: 1)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling").add_argument
    sampling(
        "--steps",
        type=int,
        dest="num_inference_steps",
        metavar="STEPS",
        help="denoising steps, 1 to 8 as a rule (default: the model's, or 4)",
    )
    sampling(
        "--sampler",
        choices=SAMPLERS,
        help="how the steps are taken; of Wan mcm, euler or unipc (default: the model's own, as a rule mcm)",
    )
    sampling("--shift", type=float, help="of Wan's timesteps (default: the LoRA's, or 5; Wan itself has 3 at 480p)")
    sampling(
        "--timestep_spacing",
        choices=SPACINGS,
        help="of ddim, dpm++, euler and unipc: where their steps lie (default: trailing)",
    )
    sampling(
        "--few_step",
        choices=FEW_STEP,
        help="sample the few-step LoRA or model for Wan of others with the timesteps and sampler that these use, as"
        " read in their code and not run with their weights; auto: by its name",
    )
    sampling("--seed", type=int, default=0, help="same prompt and seed, same video; every prompt has it (default: 0)")
    sampling("--num_videos", type=int, default=1, help="videos of each prompt, from seed, seed + 1, … (default: 1)")
    sampling("--frames", type=int, dest="num_frames", metavar="FRAMES", help="number of frames (default: the model's)")
    sampling("--height", type=int, help="in pixels (default: the model's)")
    sampling("--width", type=int, help="in pixels (default: the model's)")
    sampling("--fps", type=float, help="frames per second of the file (default: the model's)")
    sampling(
        "--guidance_scale",
        type=float,
        help="above 1 doubles the network's work (default: the model's, as a rule 1: off)",
    )
    sampling("--negative_prompt", help="what to avoid; needs --guidance_scale above 1 (default: the model's own)")


def main(argv: Sequence[str] | None = None) -> None:
    """Sample every prompt and write one file each."""
    arguments = build_parser().parse_args(argv)
    arguments.lora = one_or_pair(arguments.lora, "--lora")
    take_place(arguments)
    if arguments.model is None:
        arguments.model, arguments.lora = arguments.lora or "mcm-shapes", None
    check_numbers(arguments)
    jobs = plan_jobs(arguments)

    with quick_imports():
        from ..devices import choose_device

        device = choose_device(arguments.device)
        check_offload(arguments.offload, device)
        tell(headline(arguments, device))
        from tqdm import tqdm

        state = join_processes(device)
        if state.num_processes > 1:
            device = str(state.device)
    with quiet_libraries(arguments.verbose):
        with quick_imports():
            pipeline = load_pipeline(arguments, device)
        # the bar of one video's steps, or that of the list
        pipeline.set_progress_bar_config(disable=len(jobs) > 1)
        settings = settings_of(arguments, pipeline)
        jobs = [with_negative_prompt(job, pipeline, settings) for job in jobs]
        tell(notice([job.prompt for job in jobs], pipeline.config.get("_name_or_path"), settings["model"]))

        pending = [job for job in jobs if arguments.overwrite or not is_made(job, settings)]
        if len(pending) < len(jobs) and state.is_main_process:
            print(f"{len(jobs) - len(pending)} of {len(jobs)} videos are there already, made by the same settings")
        state.wait_for_everyone()  # nobody writes before everybody has looked, so that all share the same list
        share = pending[state.process_index :: state.num_processes]
        with tqdm(share, unit="video", disable=len(jobs) == 1 or not state.is_main_process) as bar:
            for job in bar:
                length = make(job, pipeline, settings, arguments)
                bar.clear()
                print(f"{job.path}  ({length} frames, seed {job.seed}): {job.prompt}", flush=True)
        state.wait_for_everyone()
        state.destroy_process_group()


def tell(text: str | None) -> None:
    """A line, if there is one, to whom it may concern: once from all processes, and apart from the list of files."""
    if text and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def headline(arguments: argparse.Namespace, device: str) -> str:
    """The one line that a run begins with: model, device, precision."""
    lora = f" with {named(arguments.lora)}" if arguments.lora else ""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    many = f", {processes} processes" if processes > 1 else ""
    return f"{named(arguments.model)}{lora} on {device}{many}, {arguments.dtype}"


def named(source: str | list[str]) -> str:
    """A model or LoRA, or both of a pair, as others may see it."""
    names = public_name(source, given=True)
    return names if isinstance(names, str) else " and ".join(names)


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """What to make and where, with everything checked that can be checked before a model is loaded."""
    from ..video_io import check_fps, check_frames_folder, names_folder, write_frames, writer_for

    if arguments.fps is not None:
        check_fps(arguments.fps, "--fps")
    if arguments.num_videos < 1:
        raise ValueError(f"expected --num_videos of at least 1, got {arguments.num_videos}")
    output = arguments.output
    if not output.strip():
        raise ValueError("expected a file or folder as --output, got an empty text")
    path = Path(output)
    if names_folder(output) or not path.suffix:
        if path.exists() and not path.is_dir():
            raise ValueError(f"expected a folder as --output, got {output!r}, which is a file")
        if arguments.layout == "vbench" and arguments.format not in (None, *VBENCH_FORMATS):
            known = " or ".join(VBENCH_FORMATS)
            raise ValueError(
                f"expected --format {known} with --layout vbench, for VBench reads no other, got {arguments.format}"
            )
        suffix = FORMATS[arguments.format or "mp4"]
    else:
        writer_for(output)
        if arguments.layout != "plain":
            raise ValueError(f"expected a folder as --output with --layout {arguments.layout}, got {output!r}")
        if arguments.format is not None:
            raise ValueError(f"expected a folder as --output with --format {arguments.format}, got {output!r}")
        suffix = None
    check_takes_files(path if suffix is not None else path.parent, "--output")
    options = {name: getattr(arguments, name) for name in ("seed", "negative_prompt", "num_videos", "layout")}
    jobs = plan(read_prompts(arguments.prompt, arguments.prompts), path, suffix, **options)
    for job in jobs if arguments.overwrite else ():  # else what is there stays there
        if writer_for(job.path) is write_frames:
            check_frames_folder(job.path)
    return jobs


def check_numbers(arguments: argparse.Namespace) -> None:
    """`ValueError` for a flag that is `nan` or `inf`, which Python reads as numbers."""
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"expected a finite number as --{name}, got {value}")


def load_pipeline(arguments: argparse.Namespace, device: str) -> "MCMPipeline":
    """The pipeline on its device, set up to use as little memory or time as the flags say."""
    import torch

    from .. import MCMPipeline, make_scheduler
    from ..pipelines.samplers import OWN, check_spacing

    check_spacing(arguments.sampler, arguments.timestep_spacing)
    row = few_step(arguments)
    names = ("lora", "subfolder", "weight_name", "revision", "base_model", "variant", "num_inference_steps")
    given = {name: value for name in names if (value := getattr(arguments, name))}
    pipeline = MCMPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype), **given)
    if arguments.sampler is not None or arguments.shift is not None:
        options = (arguments.timestep_spacing, arguments.shift)
        pipeline.scheduler = make_scheduler(arguments.sampler or OWN, pipeline, *options)
    if row is not None:
        row.set_up(pipeline)
    if arguments.fuse_lora:
        pipeline.fuse_lora(lora_scale=arguments.lora_scale)
    spend_less(pipeline, arguments, device)
    return pipeline


def few_step(arguments: argparse.Namespace) -> "FewStep | None":
    """How the makers of what is loaded sample it, if that is asked for; `ValueError` if something else is, too."""
    from ..pipelines.few_step import few_step_named

    if arguments.few_step is None:
        return None
    for name in ("sampler", "shift"):
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(
                f"expected --few_step or --{name}, got both, {arguments.few_step} and {value}: the first brings a"
                f" {name}, too"
            )
    loras, files, subfolders = (
        each if isinstance(each, list) else [each]
        for each in (arguments.lora or arguments.model, arguments.weight_name, arguments.subfolder)
    )
    if arguments.weight_name:  # what else lies beside these tells nothing
        loras = [os.path.join(lora, file) for lora in loras for file in files]
    given = [*loras, *subfolders, arguments.base_model, arguments.model if arguments.lora else None]
    return few_step_named(arguments.few_step, given)


def settings_of(arguments: argparse.Namespace, pipeline: "MCMPipeline") -> dict[str, Any]:
    """What all videos of a run have in common and what decides how they look."""
    from ..pipelines.samplers import sampler_settings

    given = vars(arguments)
    settings = {name: public_name(given[name], given=True) for name in ("model", "lora", "base_model")}
    settings |= {name: given[name] for name in ("subfolder", "revision", "lora_scale", "guidance_scale", "dtype")}
    settings |= {name: value for name in ("variant", "shift", "vae_tiling") if (value := given[name])}
    if arguments.guidance_scale is None:
        settings["guidance_scale"] = pipeline.motion_model.kind.guidance_scale if pipeline.motion_model else 1.0
    for name in SAMPLING_KEYS:
        settings[name] = pipeline.sampling_default(name) if given[name] is None else given[name]
    if (row := few_step(arguments)) is not None:
        settings |= {"few_step": row.title, "stochastic": row.stochastic, "shift": row.shift}
        if row.timesteps and settings["num_inference_steps"] == len(row.timesteps):
            settings["timesteps"] = list(row.timesteps)
    weights = pipeline.adapter_weights
    if any(weight != 1 for weight in weights.values()):  # as a LoRA's makers, or a saved pipeline, say
        settings["adapter_weights"] = weights
    settings |= sampler_settings(pipeline) | {"lora_sha256": (lora := lora_sha256(arguments, pipeline))}
    return settings | {"base_version": base_version(arguments, pipeline, alone=lora is None)}


def base_version(arguments: argparse.Namespace, pipeline: "MCMPipeline", alone: bool) -> str | list[str | None] | None:
    """What tells the weights below the LoRA from others, see `Location.version`; of motion modules theirs, too.

    `alone` says that there is no LoRA, so that the base model may be what `--model` names.
    """
    motion, revision = pipeline.motion_model, None
    if arguments.base_model:
        named = arguments.base_model
    elif arguments.lora or alone and motion is None:
        named, revision = arguments.model, arguments.revision
    else:
        named = pipeline.config["_name_or_path"]
    place = Location.of(named, revision=revision, local_files_only=True)  # what has just been loaded is in the cache
    return place.version() if motion is None else [place.version(), motion.modules.version()]


def lora_sha256(arguments: argparse.Namespace, pipeline: "MCMPipeline") -> str | list[str] | None:
    """The hash of the LoRA's file, as the Hub shows it, or those of a pair; `None` for a model without one."""
    from ..lora import pair_of

    revision = None if arguments.lora else arguments.revision
    where = dict(subfolder=arguments.subfolder, weight_name=arguments.weight_name, revision=revision)
    # what has just been loaded is in the cache
    source, where = arguments.lora or arguments.model, where | {"local_files_only": True}
    pair = pair_of(source, **where) if pipeline.motion_model is None else None
    if pair is not None:
        return [sha256(each.lora_file()) for each in pair]
    place = Location.of(source, **where) if pipeline.motion_model is None else pipeline.motion_model.lora
    path = None if place is None else place.find_lora_file()
    return None if path is None else sha256(path)


def with_negative_prompt(job: Job, pipeline: "MCMPipeline", settings: dict[str, Any]) -> Job:
    """A job that says what its guidance leads away from, where that is the base model's own text."""
    if job.negative_prompt is None and settings["guidance_scale"] > 1:
        return job._replace(negative_prompt=pipeline.base_model.negative_prompt or None)
    return job


def recipe(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides how one video looks."""
    return {"prompt": job.prompt, "negative_prompt": job.negative_prompt, "seed": job.seed, **settings}


def is_made(job: Job, settings: dict[str, Any]) -> bool:
    """Whether the job's file is there and was made by this recipe; an error if something else's file is there."""
    from ..video_io import read_metadata

    if not job.path.exists():
        return False
    found = read_metadata(job.path) or {}
    if found.pop("versions", None) is None:
        raise ValueError(
            f"{job.path} is there already and was not made by this command; --overwrite replaces it, another --output"
            " keeps it"
        )
    return found == recipe(job, settings)


def make(job: Job, pipeline: "MCMPipeline", settings: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Sample one video and write it; the number of its frames."""
    import torch

    from ..video_io import write_video

    sampling = {name: settings[name] for name in SAMPLING_KEYS if name != "fps"}
    if arguments.decode_chunk_size is not None:
        sampling["decode_chunk_size"] = arguments.decode_chunk_size
    video = pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        generator=torch.Generator().manual_seed(job.seed),  # of the CPU: the same noise on every device
        lora_scale=1.0 if arguments.fuse_lora else arguments.lora_scale,
        guidance_scale=settings["guidance_scale"],
        output_type="np",
        **sampling,
    ).frames[0]
    metadata = recipe(job, settings) | {"versions": versions()}
    write_video(job.path, video, fps=settings["fps"], metadata=metadata)
    return len(video)


def versions() -> dict[str, str]:
    """Of Python and the packages that compute a video."""
    packages = {name: import_module(name).__version__ for name in ("diffusers_mcm", "diffusers", "torch")}
    return packages | {"python": platform.python_version()}
