"""What a cache was made of, as its `cache.json` says: by that a change of data, networks or settings is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base_models import BaseModel
from ..data import VideoDataset
from ..files import sha256, write_text
from ..location import Location
from .config import TrainingConfig

NAME = "cache.json"
FORMAT = 1  # of the files; one that is not known is not read
JUDGED_FRAMES = "judged frames of a clip"
_NETWORK_FILES = (".safetensors", ".json", ".txt", ".model")

Key = dict[str, Any]


def cache_key(config: TrainingConfig, base: BaseModel, videos: VideoDataset, known: Key) -> dict[str, Key]:
    """What a cache for this run is made of: "clips", "prompt" for the texts, and "judge" for those that the
    discriminator reads, if there is one.

    `known` is a key of before, whose sums of files stand for those that have neither size nor time changed.
    """
    teacher = Location.of(config.pretrained_teacher_model, revision=config.revision)

    def network(part: str, location: Location, *folders: str) -> Key:
        return {"networks": _networks(location, folders, known.get(part, {}).get("networks", {}))}

    precision: Key = {"mixed_precision": config.precision}
    read = precision | {"variant": config.variant}
    clips: Key = {
        "number of videos": len(videos),
        "order of videos": videos.rows.order(),
        "captions and sizes of videos": videos.rows.content(),
        "seed": config.seed,
        "num_frames": videos.num_frames,
        "height": videos.height,
        "width": videos.width,
        "data_fps": config.data_fps,
        "frame_interval": config.frame_interval,
        JUDGED_FRAMES: videos.judged_frames,
        "cache_dtype": config.cache_dtype,
        **read,
    }
    if clips["order of videos"] is None:  # then their source has to tell them
        clips |= {"source of videos": str(config.video_data), "video_column": config.video_column}
    key: dict[str, Key] = {
        "clips": clips | network("clips", teacher, "vae"),
        "prompt": {"base_model": base.name} | read | network("prompt", teacher, "text_encoder", "tokenizer"),
    }
    if config.adversarial:
        key["judge"] = precision | network("judge", Location.of(config.discriminator_text), "")
    return key


def _networks(location: Location, folders: tuple[str, ...], known: Key) -> Key:
    """Of a repository on the Hub its commit, of a folder each file with its sum."""
    if location.remote:
        place = location.inside(folders[0]) if folders[0] else location
        return {location.name: place.commit("config.json", "tokenizer_config.json")}
    root = Path(location.name, location.subfolder or "")
    paths = [path for folder in folders for path in (root / folder).glob("*") if path.suffix in _NETWORK_FILES]
    names = {path.relative_to(root).as_posix(): path for path in sorted(paths)}
    return {name: _summed(path, known.get(name)) for name, path in names.items()}


def _summed(path: Path, before: Any) -> Key:
    stat = path.stat()
    seen = {"size": stat.st_size, "changed": stat.st_mtime_ns}
    if isinstance(before, dict) and all(before.get(name) == value for name, value in seen.items()):
        return before
    return {**seen, "sha256": sha256(path)}


def read_key(folder: Path) -> dict[str, Key] | None:
    """What the cache in a folder says that it was made of; None if there is none."""
    path = folder / NAME
    if not path.is_file():
        return None
    key = json.loads(path.read_text(encoding="utf-8"))
    if key.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is of a cache that another version of diffusers-mcm has made: take another folder.")
    return key


def write_key(folder: Path, key: dict[str, Key]) -> None:
    write_text(folder / NAME, json.dumps({"format": FORMAT, **key}, indent=1), synced=True)


def check_key(folder: Path, then: dict[str, Key], now: dict[str, Key]) -> None:
    """Raise ValueError, with what has changed, unless a cache was made of what this run would make it of.

    Parts that only one of them has do not count, nor judged frames that a run does not need, nor how many windows of
    a clip there are: the first ones are the same.
    """
    # each once: what several parts depend on has changed in all of them
    changed = dict.fromkeys(change for part in now if part in then for change in _changes(then[part], now[part]))
    if changed:
        raise ValueError(
            f"The cache in {folder} was made of something else than this run needs: {'; '.join(changed)}. Go back to"
            " that, or make another cache in another folder."
        )


def _changes(then: Key, now: Key) -> list[str]:
    changes = []
    for name, value in now.items():
        if name == "networks":
            sums = [{file: _sum(each) for file, each in networks.items()} for networks in (then[name], value)]
            files = sorted(sums[0].keys() | sums[1].keys())
            changes += [f"{file} is another" for file in files if sums[0].get(file) != sums[1].get(file)]
        elif then.get(name) != value and not (name == JUDGED_FRAMES and not value):
            changes.append(f"{name} was {then.get(name)}, is {value}")
    return changes


def _sum(entry: Any) -> Any:
    return entry["sha256"] if isinstance(entry, dict) else entry
