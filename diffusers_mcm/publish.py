"""Publishing a LoRA folder on the Hub: all of it in one commit, or nothing."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import hub
from .base_models import base_model_of, base_repository_of, half_named
from .card_text import files_shown, is_untouched, without_seal
from .cards import (
    CARD_NAME,
    DEFAULT_PROMPT,
    SAMPLE_NAME,
    SCORES_NAMES,
    check_card,
    metadata,
    render_folder_card,
)
from .files import atomic_files, disk_full_told, write_text
from .location import INDEX_NAME, MOTION_HEAD_NAME, SCHEDULER_NAME, WEIGHTS_NAME, Location
from .lora import (
    LoRA,
    LoRAPair,
    as_pair,
    check_alike,
    find_pair,
    open_safetensors,
    read_beside,
    read_loras,
    write_lora_pair,
    write_lora_weights,
    write_safetensors,
    write_settings,
)
from .settings import CONFIG_NAME, EXPERTS, Sample, Settings
from .text_files import read_text

logger = logging.getLogger(__name__)

# What the description of a commit says of the card in it, by which a later push knows a card that nobody has edited.
_CARD_MARK = "diffusers-mcm card"


class PublishError(OSError):
    """The Hub refused, failed or was not there. What was to be published is where it was."""


@dataclass(frozen=True)
class Destination:
    """Where on the Hub something is published, and how."""

    repo_id: str  # `"owner/name"`, or a name in your own namespace; created if it is not there
    private: bool | None = None  # of a new repository, by default as the account's; an existing one never changes
    token: str | None = None  # default: `HF_TOKEN`, or that of `hf auth login`
    commit_message: str | None = None
    revision: str | None = None  # the branch to commit to, created if it is not there; default: `main`
    create_pr: bool = False  # open a pull request instead
    overwrite_card: bool = False  # put our card in the place of one that was edited on the Hub, which otherwise stays


def publish_lora(
    folder: str | os.PathLike,
    destination: Destination,
    base_model: str | None = None,
    lora: LoRA | LoRAPair | None = None,
) -> str:
    """Put a LoRA folder, as training and `save_mcm_lora` write it or with PEFT's files, on the Hub in one commit; so,
    too, the pair of LoRAs for two experts.

    Everything is read and checked before the Hub is asked anything: `ValueError` for a folder that cannot be published
    as it is. After a `PublishError` the same call finishes the job; what was uploaded is not uploaded again.
    `base_model` is the base model's repository, where the folder names one that only this machine has, and `lora` what
    the folder holds, where that is in memory and need not be read. Returns the address of the commit.
    """
    hub.check_repository_name(destination.repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        with disk_full_told(staged):
            stage_lora(Path(folder), staged, destination.repo_id, base_model, lora)
        return publish_folder(staged, destination, "Upload a motion consistency LoRA")


def publish_folder(folder: Path, destination: Destination, message: str) -> str:
    """Put all files of a folder on the Hub in one commit, by default with this message; the address of the commit.

    A card that was edited on the Hub stays as it is there, and a warning says so, unless `overwrite_card`.
    """
    from huggingface_hub import CommitOperationAdd

    repository, branch = open_repository(destination), destination.revision
    names = Location.of(folder).files()
    files = {name: folder / name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    outcome = "What was there before is untouched; the same command finishes the job."
    with _told_plainly(replace(destination, repo_id=repository), outcome) as api:
        if branch is not None and not destination.create_pr:
            api.create_branch(repository, branch=branch, exist_ok=True)
        parent = api.model_info(repository, revision=branch).sha
        there = Location(repository, revision=parent, options={"token": api.token}, remote=True)
        if CARD_NAME in files and not destination.overwrite_card and _edited_on_hub(api, there, files[CARD_NAME]):
            del files[CARD_NAME]
            logger.warning(
                "The card of %s was edited on the Hub and stays as it is there; everything else is published. To put"
                " this folder's card in its place: --overwrite_card, in Python overwrite_card=True.",
                repository,
            )
        # `upload_folder` may split its work into several commits; half a model could be left behind. The parent: an
        # edit that comes in between is not overwritten unseen.
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=destination.commit_message or message,
            commit_description=f"{_CARD_MARK} {_digest(files[CARD_NAME])}" if CARD_NAME in files else None,
            revision=branch,
            create_pr=destination.create_pr,
            parent_commit=parent,
        )
        return commit.pr_url or commit.commit_url


def _edited_on_hub(api: Any, there: Location, ours: Path) -> bool:
    """Whether the card there is neither this one nor one that an earlier push has put there."""
    theirs = there.file(CARD_NAME)
    if theirs is None or _digest(theirs) == _digest(ours):
        return False
    mark = f"{_CARD_MARK} {_digest(theirs)}"
    return not any(mark in commit.message for commit in api.list_repo_commits(there.name, revision=there.revision))


def _digest(card: Path) -> str:
    # The Hub's editor may end lines, or the text, in its own way without a word being changed.
    text = card.read_text(encoding="utf-8").rstrip()
    return hashlib.sha256("\n".join(text.splitlines()).encode()).hexdigest()


def open_repository(destination: Destination) -> str:
    """Create the repository unless it is there; its full name. Fails where the token may not write."""
    private = destination.private
    with _told_plainly(destination, "Nothing was uploaded.") as api:
        repository = api.create_repo(destination.repo_id, private=private, exist_ok=True).repo_id
        is_private = private if private is None else api.model_info(repository).private
    if is_private != private:
        words = {True: "private", False: "public"}
        raise ValueError(
            f"{repository} exists and is {words[bool(is_private)]}, not {words[bool(private)]}, and publishing never"
            " changes that. Ask for neither, or change it in the repository's settings."
        )
    return repository


@contextmanager
def _told_plainly(destination: Destination, outcome: str) -> Iterator[Any]:
    """The Hub's API; an error of it says what happened and what to do, and never the token."""
    from huggingface_hub import HfApi

    # The HTTP library quotes a header that it cannot send, in its error and in its log.
    token = destination.token.strip() if destination.token else None
    if token and not re.fullmatch("[!-~]+", token):
        raise ValueError("The token holds a space, a line break or another character that no token has.")
    try:
        yield HfApi(token=token)
    except hub.http_errors() as error:
        there = Location(destination.repo_id, revision=destination.revision, remote=True)
        raise PublishError(f"Publishing {there} failed. {there.explain(error)} {outcome}") from None


# --- what is published -----------------------------------------------------------------------------------------------
def stage_lora(
    folder: Path, target: Path, repo_id: str, base_model: str | None = None, lora: LoRA | LoRAPair | None = None
) -> None:
    """Write what will be published of a LoRA folder into `target`; `ValueError` if it cannot be."""
    _check_folder(folder)
    read = lora or read_loras(folder)
    loras = [read] if isinstance(read, LoRA) else list(read)
    _check_whole(loras, folder)
    public = [_made_public(each, base_model) for each in loras]
    sample = _sample_in(folder, public)
    public = [replace(each, settings=replace(each.settings, sample=sample)) for each in public]
    denoiser = base_model_of(public[0]).denoiser_name
    if len(public) == 2:
        write_lora_pair(target, dict(zip(EXPERTS, public)), denoiser)
    else:
        write_lora_weights(target / WEIGHTS_NAME, {denoiser: public[0]})
        write_settings(target, public[0])
    path = folder / CARD_NAME  # as its owner left it; one that nobody has edited is made anew for the repository
    ours = path.is_file() and _has_settings(folder, loras)  # and no other tool's
    edited = ours and _card_made_for(folder, loras) is None
    card = read_text(path) if edited else _card(folder, repo_id, public)
    check_card(card, str(path))
    write_text(target / CARD_NAME, card)
    wanted = {MOTION_HEAD_NAME, *SCORES_NAMES, sample and sample.file, *files_shown(card)}
    written = {Path(lora.source) for lora in loras}
    for name in Location.of(folder).files():
        copy = target / name
        if name in wanted and not copy.exists() and folder / name not in written:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy)


def _check_folder(folder: Path) -> None:
    """`ValueError` unless a folder may hold LoRAs, and that is all."""
    if not folder.is_dir():
        raise ValueError(f"Expected a LoRA folder, got {str(folder)!r}, which is no folder.")
    if (folder / INDEX_NAME).is_file():
        raise ValueError(
            f"{folder} holds a whole pipeline. `push` publishes a LoRA folder, such as those in its mcm_adapters/;"
            " `pipe.save_pretrained(folder, push_to_hub=True, repo_id=…)` publishes the whole."
        )


def _check_whole(loras: Sequence[LoRA], folder: Path) -> None:
    """`ValueError` unless it is one LoRA for one denoiser, or the pair for two experts, each of them whole."""
    for lora in loras:
        lora.check_pairs()
        lora.check_no_differences("a LoRA is published in diffusers' layout, which has no names for that")
        kind, expert = base_model_of(lora), half_named(lora).settings.expert
        if len(loras) == 1 and expert is not None:
            raise ValueError(
                f"{folder} holds half a pair, the LoRA of the {expert} expert. Put it into one folder with the other"
                " half, `diffusers-mcm convert HIGH_NOISE LOW_NOISE pair --to diffusers`, and publish that."
            )
        if len(loras) == 2 and not kind.experts:
            raise ValueError(
                f"{lora.source} was made for base model {kind.name!r}, which has one denoiser; a pair is for two"
                " experts, as those of Wan 2.2 A14B."
            )
    if len(loras) == 2:
        check_alike(*loras)


def _made_public(lora: LoRA, base_model: str | None) -> LoRA:
    """The LoRA with its base model's repository, and nothing of this machine."""
    recorded = base_model or base_repository_of(lora)
    settings = replace(lora.settings, base_model=base_model_of(lora).name, base_model_repository=recorded).public()
    public = replace(lora, settings=settings)
    if lora.adapter_config:
        public.adapter_config = {**lora.adapter_config, "base_model_name_or_path": recorded}
    return public


def _sample_in(folder: Path, loras: Sequence[LoRA]) -> Sample | None:
    """The sample clip; `ValueError` where there is none, or a warning of a pair, which not everybody can sample."""
    sample = loras[0].settings.sample
    if sample and (folder / sample.file).is_file():
        return sample
    told = (
        f"{folder} has no sample clip, without which nobody sees what the LoRA does. Make one:"
        ' `diffusers-mcm push … --prompt "a corgi running on the beach"`.'
    )
    if len(loras) == 1:
        raise ValueError(told)
    logger.warning(told)
    return None


# --- the card --------------------------------------------------------------------------------------------------------
def _has_settings(folder: Path, loras: Sequence[LoRA]) -> bool:
    """Whether a folder says in our words what is in it; those of a pair are in its files."""
    return (folder / CONFIG_NAME).is_file() or len(loras) == 2 and loras[0].settings.base_model is not None


def _card(folder: Path, repository: str, loras: Sequence[LoRA]) -> str:
    """The card of a folder with one LoRA, or with a pair, whose settings and scheduler are in its files."""
    first, *others = loras
    more = {"second": others[0].settings, "scheduler": first.scheduler_config} if others else {}
    return render_folder_card(folder, repository, first.settings, **more)


def _card_made_for(folder: Path, loras: Sequence[LoRA]) -> str | None:
    """The repository in the folder's card, if that is as it was made and nobody has edited it.

    One without a seal is of an older version, and is made once more to be compared.
    """
    path = folder / CARD_NAME
    if not path.is_file() or loras[0].settings.base_model_repository is None:
        return None
    text = read_text(path)
    name = re.search(r'MCMPipeline\.from_pretrained\("([^"]+)"', text)
    if name is None:
        return None
    untouched = is_untouched(text)
    if untouched is None:
        untouched = text.rstrip() == without_seal(_card(folder, name[1], loras)).rstrip()
    return name[1] if untouched else None


# --- the sample ------------------------------------------------------------------------------------------------------
def record_sample(folder: Path, video, prompt: str, fps: float) -> None:
    """Put a clip (T, H, W, 3), float in [0, 1] or uint8, in a LoRA folder, its prompt in the settings, and both in the
    card, unless somebody has edited that. The settings of a pair are in the headers of its two files."""
    location = Location.of(folder)
    pair = find_pair(location)
    if pair is None:
        alone = Settings.read(location)  # whose file need not be opened for its header
        loras = [_read_settings(location) if alone is None else LoRA({}, settings=alone)]
    else:
        loras = list(as_pair([_read_settings(each) for each in pair]))
    repository = _card_made_for(folder, loras) if _has_settings(folder, loras) else None
    last = CONFIG_NAME if pair is None else Path(loras[-1].source).name
    with atomic_files(folder, last) as temporary:
        sample = put_sample(temporary, loras[0].settings, video, prompt, fps).sample
        for lora in loras:
            lora.settings = replace(lora.settings, sample=sample)
            if pair is None:
                lora.settings.write(temporary)
            else:
                _write_settings_in(Path(lora.source), temporary / Path(lora.source).name, lora.settings)
        if repository is not None:
            for name in (*SCORES_NAMES, SCHEDULER_NAME):  # the card shows what they say
                if (folder / name).is_file():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(folder / name, temporary / name)
            write_text(temporary / CARD_NAME, _card(temporary, repository, loras))


def _read_settings(location: Location) -> LoRA:
    """A LoRA's file and what is beside it, without its tensors."""
    weights = location.lora_file()
    with open_safetensors(weights) as file:
        settings, scheduler_config, _ = read_beside(location, file.metadata() or {})
    return LoRA({}, settings=settings, scheduler_config=scheduler_config, source=str(weights))


def _write_settings_in(old: Path, new: Path, settings: Settings) -> None:
    """Write the file `old` as `new`, in the layout that it is in, with other settings in its header."""
    with open_safetensors(old) as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    write_safetensors(
        new, tensors, header | {"mcm_config": json.dumps(settings.to_dict(), sort_keys=True, default=str)}
    )


def put_sample(folder: Path, settings: Settings, video, prompt: str, fps: float) -> Settings:
    """Write a clip into a folder; the settings that name it."""
    from .video_io import write_mp4

    write_mp4(folder / SAMPLE_NAME, video, fps=fps)
    return replace(settings, sample=Sample(SAMPLE_NAME, prompt))


def pipeline_card(repository: str) -> str:
    """The card of a whole pipeline, base model included."""
    return f"""---
{metadata(["diffusers", "text-to-video", "motion-consistency-model", "diffusers-mcm"])}
---

# {repository.rpartition("/")[2]}

A text-to-video pipeline that samples in one to eight steps, saved with diffusers-mcm: base model, LoRAs and scheduler.

```python
from diffusers_mcm import MCMPipeline

pipe = MCMPipeline.from_pretrained("{repository}")
frames = pipe("{DEFAULT_PROMPT}").frames[0]
```
"""
