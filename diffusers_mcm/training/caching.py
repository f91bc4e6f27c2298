"""A run whose clips and texts were encoded before: what it needs of the cache, and the data set that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..base_models import BaseModel
from ..cards import DEFAULT_PROMPT
from ..data import KeyedDataset, VideoDataset
from .batches import TrainingData
from .cache_key import Key, cache_key, check_key, read_key, write_key
from .config import TrainingConfig
from .stored import ClipStore, TextStore


@dataclass(frozen=True)
class LatentCache:
    """The folder of `--cache_latents`: clips, prompts of the denoiser, and texts that the discriminator reads."""

    folder: Path
    clips: ClipStore
    prompts: TextStore
    judge: TextStore


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


def open_cache(config: TrainingConfig, base: BaseModel, data: TrainingData, create: bool = False) -> LatentCache:
    """The cache of `--cache_latents`, which has to be of this run's data, networks and settings.

    With `create` it may be new, or lack parts, which are added to what it was made of.
    """
    folder = Path(config.cache_latents or "")
    then = read_key(folder)
    if then is None and not create:
        raise ValueError(
            f"There is no cache in --cache_latents {folder} yet. Make it with: diffusers-mcm encode, and the flags of"
            " this run."
        )
    known: dict[str, Key] = then or {}
    now = cache_key(config, base, data.videos, known)
    check_key(folder, known, now)
    if create and now.keys() - known.keys():
        write_key(folder, {**now, **known})
    clips = ClipStore(folder, number_of_clips(data.videos))
    return LatentCache(folder, clips, TextStore(folder, "prompt"), TextStore(folder, "judge"))


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


def check_complete(cache: LatentCache, config: TrainingConfig, data: TrainingData, samples: int) -> None:
    """Raise ValueError, with what is missing, unless the cache has all that a run of so many samples needs."""
    wanted = min(samples, number_of_clips(data.videos))
    captions = cache.clips.captions(wanted)
    missing: dict[str, list] = {
        "clips": cache.clips.missing(wanted),
        "prompts": cache.prompts.missing(prompts_of(config, captions)),
        "texts for the discriminator": cache.judge.missing(judged_texts(config, data, captions)),
    }
    told = [f"{len(each):,} {what}, such as {each[0]!r}" for what, each in missing.items() if each]
    if told:
        raise ValueError(
            f"The cache in --cache_latents {cache.folder} lacks of what this run needs: {'; '.join(told)}. Add it"
            " with: diffusers-mcm encode, and the flags of this run."
        )
