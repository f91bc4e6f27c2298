"""Encodes once what a run would encode again and again: its clips, its captions and what the discriminator reads."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..base_models import BaseModel
from ..data import StepLoader, VideoDataset, to_unit_range
from ..data.loading import worker_deaths_told
from ..distillation.draws import Coins
from ..features import TextFeatures
from ..pipelines.wan import check_embeddings
from ..wording import readable
from .acceleration import build_accelerator, told_by_one, with_accelerate_settings
from .batches import TrainingData, num_workers, open_data, told_skipped
from .caching import LatentCache, judged_texts, number_of_clips, open_cache, prompts_of
from .config import CACHE_DTYPES, TrainingConfig
from .defaults import with_base_defaults
from .disk import told_room
from .networks import WEIGHT_DTYPES, load_component, load_network, teacher_index
from .sources import check_sources, planned_clip_size
from .stored import TextStore, in_files
from .text import CachedTextEncoder, EncodeTexts, nbytes_of

logger = logging.getLogger(__name__)

# The type in which means and deviations are kept; None is that of the autoencoder's output.
_KEPT_AS = dict(zip(CACHE_DTYPES, (None, torch.float16, torch.bfloat16), strict=True))


def encode(config: TrainingConfig) -> Path:
    """Fill the cache that `--cache_latents` names with all that a run of this configuration would encode.

    What is there already stays; returns the folder. Several processes, as `accelerate launch` starts them, share the
    clips among them.
    """
    if config.cache_latents is None:
        raise ValueError("Say with --cache_latents in which folder to keep what is encoded.")
    config = with_accelerate_settings(dataclasses.replace(config, report_to="none"))
    accelerator = build_accelerator(config)
    base, index = teacher_index(config)
    config = with_base_defaults(config, base, index)
    check_sources(config, remote=False)
    with told_by_one(accelerator), accelerator.local_main_process_first():
        data = open_data(config, planned_clip_size(config), Coins())
    cache = fill_cache(config, base, index, data, accelerator, number_of_clips(data.videos))
    if accelerator.is_main_process:
        size = readable(sum(path.stat().st_size for path in cache.folder.glob("*.safetensors")))
        logger.info("The cache in %s has %s clips, %s.", cache.folder, f"{number_of_clips(data.videos):,}", size)
    return cache.folder


def fill_cache(
    config: TrainingConfig,
    base: BaseModel,
    index: dict[str, Any],
    data: TrainingData,
    accelerator: Accelerator,
    samples: int,
) -> LatentCache:
    """The cache with all that a run of so many samples needs; what it lacks is encoded, by all processes together."""
    with accelerator.main_process_first():
        cache = open_cache(config, base, data)
    accelerator.wait_for_everyone()  # all have seen what is there before one of them adds to it
    wanted = min(samples, number_of_clips(data.videos))
    missing = cache.clips.missing(wanted)
    if missing and len(missing) < wanted and accelerator.is_main_process:
        logger.info("Of %s clips %s are in %s already.", f"{wanted:,}", f"{wanted - len(missing):,}", cache.folder)
    with worker_deaths_told(), logging_redirect_tqdm():
        encode_clips(cache, config, base, index, data.videos, accelerator, missing)
    accelerator.wait_for_everyone()
    cache.clips.refresh()
    check_shared(cache.clips.missing(wanted), "clips", cache, accelerator)
    with logging_redirect_tqdm():
        encode_texts(cache, config, base, index, data, accelerator, wanted)
    return cache


def check_shared(lost: Sequence[Any], what: str, cache: LatentCache, accelerator: Accelerator) -> None:
    """Raise ValueError if there are some that other processes have encoded, and that this one does not see."""
    if lost:
        raise ValueError(
            f"{len(lost)} {what} are not in {cache.folder} as process {accelerator.process_index} sees it, though "
            "they were encoded: processes on several machines need a --cache_latents that they share."
        )


# --- clips -----------------------------------------------------------------------------------------------------------
def encode_clips(
    cache: LatentCache,
    config: TrainingConfig,
    base: BaseModel,
    index: dict[str, Any],
    videos: VideoDataset,
    accelerator: Accelerator,
    missing: list[int],
) -> None:
    """Encode the clips that are missing in the cache, this process its share of them.

    Each is encoded by itself: its bits depend on no clip beside it, nor on the number of processes.
    """
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if not share:
        return
    videos = copy.copy(videos)
    videos.decodes = None  # every clip, whichever samples start from it
    videos.judged_frames = cache.judged_frames
    dtype = base.vae_dtype or WEIGHT_DTYPES[config.precision]
    vae = load_network("vae", config, index, dtype).to(accelerator.device).requires_grad_(False).eval()
    workers = num_workers(config, videos, accelerator)
    loader = StepLoader(videos, [[number] for number in share], workers, pin_memory=accelerator.device.type == "cuda")

    def encoded() -> Iterator[tuple[dict[str, Any], int]]:
        for batch in tqdm(loader, total=len(share), desc="clips", disable=not accelerator.is_main_process):
            clip = encode_clip(base, vae, batch, config.cache_dtype, accelerator)
            yield clip, sum(value.nbytes for value in clip.values() if isinstance(value, torch.Tensor))

    for clips in in_files(with_room(encoded(), "clips", len(missing), cache.folder, accelerator)):
        cache.clips.write(clips)
    if told := told_skipped(set(videos.skipped)):
        logger.warning(told)


@torch.no_grad()
def encode_clip(
    base: BaseModel, vae: nn.Module, batch: dict[str, Any], cache_dtype: str, accelerator: Accelerator
) -> dict[str, Any]:
    """The only clip of a batch as a `ClipStore` keeps it."""
    pixels, dtype = to_unit_range(batch["pixels"].to(accelerator.device, non_blocking=True)), _KEPT_AS[cache_dtype]
    with accelerator.autocast():
        posterior = base.encode_posterior(vae, pixels)
    mean, deviation = (tensor[0].to("cpu", dtype) for tensor in posterior)
    frames = {"frames": batch["frames"][0]} if "frames" in batch else {}
    clip = {"index": int(batch["index"][0]), "caption": batch["caption"][0]}
    return clip | {"mean": mean, "deviation": deviation} | frames


# --- texts -----------------------------------------------------------------------------------------------------------
def encode_texts(
    cache: LatentCache,
    config: TrainingConfig,
    base: BaseModel,
    index: dict[str, Any],
    data: TrainingData,
    accelerator: Accelerator,
    wanted: int,
) -> None:
    """Encode those texts that are not in the cache; an encoder is loaded only if there are any for it."""
    captions = cache.clips.captions(wanted)

    def prompt_encoder() -> EncodeTexts:
        tokenizer, network = load_text_encoder(config, index)
        return partial(base.encode_text, tokenizer, network.to(accelerator.device))

    def judge_encoder() -> EncodeTexts:
        network = TextFeatures.from_pretrained(config.discriminator_text, dtype=WEIGHT_DTYPES[config.precision])
        network.to(accelerator.device)
        return lambda texts: {"embedding": network(texts)}

    prompts, judged = prompts_of(config, captions), judged_texts(config, data, captions)
    fill(cache.prompts, prompts, prompt_encoder, accelerator)
    fill(cache.judge, judged, judge_encoder, accelerator)
    accelerator.wait_for_everyone()
    for store, texts in ((cache.prompts, prompts), (cache.judge, judged)):
        store.refresh()
        check_shared(store.missing(texts), "texts", cache, accelerator)


def fill(
    store: TextStore, texts: Iterable[str], make_encoder: Callable[[], EncodeTexts], accelerator: Accelerator
) -> None:
    """Encode those of the texts that are not in the store, this process its share of them, each by itself."""
    missing = store.missing(texts)
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if not share:
        return
    encoder = CachedTextEncoder(make_encoder(), capacity=0, device=accelerator.device)

    def encoded() -> Iterator[tuple[tuple[str, dict], int]]:
        for text in tqdm(share, desc=f"texts ({store.kind})", disable=not accelerator.is_main_process):
            row = encoder.encoded(text)
            yield (text, row), nbytes_of(row)

    for pairs in in_files(with_room(encoded(), f"texts ({store.kind})", len(missing), store.folder, accelerator)):
        store.write(dict(pairs))


def load_text_encoder(config: TrainingConfig, index: dict[str, Any]) -> tuple[Any, nn.Module]:
    """The teacher's tokenizer and text encoder by themselves; `index` is its `model_index.json`."""
    network = load_network("text_encoder", config, index, WEIGHT_DTYPES[config.precision])
    if hasattr(network, "shared"):
        check_embeddings(network)
    return load_component("tokenizer", config, index), network.requires_grad_(False).eval()


# --- both ------------------------------------------------------------------------------------------------------------
def with_room(
    encoded: Iterable[tuple[Any, int]], what: str, count: int, folder: Path, accelerator: Accelerator
) -> Iterator[tuple[Any, int]]:
    """The same items with their bytes; by the first one it is told how much of the disk so many of them take.

    ValueError, before anything is written, if there is not so much room.
    """
    for number, (item, size) in enumerate(encoded):
        if number == 0:
            said = f"{count:,} {what} of about {readable(size)} each take {readable(count * size)} in {folder}"
            told = told_room(said, count * size, folder, "or name a --cache_latents on another disk")
            if accelerator.is_main_process:
                logger.info(told)
        yield item, size
