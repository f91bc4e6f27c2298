"""A run whose clips and texts were encoded before: what it needs of the cache, and the data set that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..base_models import BaseModel
from ..cards import DEFAULT_PROMPT
from ..data import KeyedDataset, VideoDataset
from .batches import TrainingData
from .cache_key import JUDGED_FRAMES, Key, cache_key, check_key, read_key, write_key
from .config import TrainingConfig
from .stored import ClipStore, TextStore, clear_up


@dataclass(frozen=True)
class LatentCache:
    """The folder of `--cache_latents`: clips, prompts of the denoiser, and texts that the discriminator reads."""

    folder: Path
    clips: ClipStore
    prompts: TextStore
    judge: TextStore
    judged_frames: int  # that each clip has, as those have that are there already


class CachedVideos(KeyedDataset):
    """`VideoDataset` with "mean" and "deviation" out of a cache in place of "pixels"; no film is opened."""

    def __init__(self, videos: VideoDataset, clips: ClipStore):
        super().__init__(videos.rows, videos.seed, videos.purpose)
        self.videos, self.clips = videos, clips

    def read(self, index: int) -> tuple[dict, dict[str, str]]:
        starts = self.videos.decodes is None or self.videos.decodes(index)
        return self.clips.read(self.videos.key(index), starts, frames=self.videos.judged_frames > 0), {}


def number_of_clips(videos: VideoDataset) -> int:
    """How many clips a cache has when it is complete."""
    return len(videos) * (videos.windows or 1)


def open_cache(config: TrainingConfig, base: BaseModel, data: TrainingData) -> LatentCache:
    """The cache of `--cache_latents`, new or with what is there, which has to be of this run's data, networks and
    settings; ValueError, with what has changed, if it is not."""
    if config.lambda_change:
        raise ValueError(
            f"--lambda_change {config.lambda_change:g} compares with frames of the real clips, which --cache_latents"
            " does not keep. Leave out one of the two."
        )
    folder = Path(config.cache_latents or "")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--cache_latents takes a folder, new or with what was encoded before; {folder} is a file.")
    clear_up(folder)
    known: dict[str, Key] = read_key(folder) or {}
    now = cache_key(config, base, data.videos, known)
    check_key(folder, known, now)
    key = {**now, **known}
    if key.keys() - known.keys():
        write_key(folder, key)
    clips, texts = ClipStore(folder, number_of_clips(data.videos)), partial(TextStore, folder)
    return LatentCache(folder, clips, texts("prompt"), texts("judge"), key["clips"][JUDGED_FRAMES])


def prompts_of(config: TrainingConfig, captions: set[str]) -> set[str]:
    """All texts that a run conditions its denoiser on, those of its validation clips among them."""
    sampled = config.validation_prompts or ((DEFAULT_PROMPT,) if config.push_to_hub else ())
    return captions | {config.negative_prompt or "", *sampled}


def judged_texts(config: TrainingConfig, data: TrainingData, captions: set[str]) -> set[str]:
    """All texts that the discriminator may read beside images; none if there is no discriminator."""
    if not config.adversarial:
        return set()
    choice = data.image_text.choice
    if choice == "none":
        return {""}
    own = set(data.images.rows.all_texts()) if data.images is not None and choice == "own" else set()
    return captions | own | {""}
