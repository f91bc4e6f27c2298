"""Publishes a LoRA folder on the Hub: weights, settings, scheduler, model card and sample clip, in one commit."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from ..hub import check_repository_name
from ..location import Location
from .startup import quiet_libraries


def build_parser() -> argparse.ArgumentParser:
    """Flags of `diffusers-mcm push`."""
    parser = argparse.ArgumentParser(
        prog="diffusers-mcm push", description=__doc__, epilog="After a failure the same command finishes the job."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="LoRA folder, as training writes it, or one with a pair")
    add("repo_id", metavar="REPO", help="owner/name, or a name in your own namespace; created if it is not there")
    visibility = parser.add_mutually_exclusive_group()
    for name, action in (("private", "store_true"), ("public", "store_false")):
        text = f"make a new repository {name} (default: as your account does; an existing one stays what it is)"
        visibility.add_argument(f"--{name}", dest="private", action=action, default=None, help=text)
    add("--message", dest="commit_message", metavar="MESSAGE", help="commit message")
    add("--revision", help="branch to commit to, created if it is not there (default: main)")
    add("--create_pr", action="store_true", help="open a pull request instead of committing")
    add("--token", help="token for the Hub (default: HF_TOKEN, or that of `hf auth login`)")
    add("--base_model", metavar="REPO", help="the base model's repository, if it was trained with a local copy")
    add("--overwrite_card", action="store_true", help="replace a card that was edited on the Hub (default: it stays)")
    add("--variant", help="with --prompt: which files of the base model's weights to read, as fp16")
    add("--prompt", help="make the sample clip anew, of this, and keep it in DIR; needs the base model")
    add("--device", help="where the clip is made (default: the best there is)")
    add("--dry_run", action="store_true", help="check everything and list what would be published, and stop there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check the folder, then publish it."""
    arguments = build_parser().parse_args(argv)
    folder, base_model = arguments.folder, arguments.base_model
    check_repository_name(arguments.repo_id)
    with quiet_libraries(), TemporaryDirectory() as temporary:
        from ..publish import Destination, publish_lora, stage_lora

        if arguments.prompt:
            _make_sample(arguments)
        if arguments.dry_run:
            stage_lora(folder, Path(temporary), arguments.repo_id, base_model)
            for name in Location.of(temporary).files():
                print(f"{Path(temporary, name).stat().st_size:>12,}  {name}")
        else:
            destination = Destination(**{entry.name: getattr(arguments, entry.name) for entry in fields(Destination)})
            print(f"Published: {publish_lora(folder, destination, base_model)}")


def _make_sample(arguments: argparse.Namespace) -> None:
    import torch

    from .. import MCMPipeline
    from ..devices import choose_device
    from ..publish import record_sample

    options = {name: value for name in ("base_model", "variant") if (value := getattr(arguments, name))}
    pipeline = MCMPipeline.from_pretrained(arguments.folder, **options).to(choose_device(arguments.device))
    video = pipeline(arguments.prompt, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
    record_sample(arguments.folder, video, arguments.prompt, pipeline.sampling_default("fps"))
