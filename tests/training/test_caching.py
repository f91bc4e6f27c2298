import pytest
import torch
from accelerate import Accelerator

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.distillation.clips import EncodedClips
from diffusers_mcm.distillation.draws import Coins
from diffusers_mcm.training.batches import build_batches, open_data
from diffusers_mcm.training.caching import CachedVideos, judged_texts, open_cache, prompts_of
from tests.tiny import NUM_FRAMES, SIZE

from .world import CAPTIONS, tiny_config

BASE = get_base_model("modelscope")


@pytest.fixture
def opened(world, tmp_path):
    """The configuration, the data and a new cache of a run."""

    def make(**options):
        given = dict(cache_latents=str(tmp_path / "cache"), windows_per_clip=2, train_batch_size=2, max_train_steps=6)
        config = tiny_config(world, tmp_path / "out", **(given | options))
        data = open_data(config, (NUM_FRAMES, SIZE, SIZE), Coins(config.lambda_real, config.train_batch_size))
        return config, data, open_cache(config, BASE, data)

    return make


def fill(cache, videos, numbers, frames=0):
    """Latents that say which clip they are of."""
    for number in numbers:
        mean = torch.full((4, NUM_FRAMES, 8, 8), float(number + 1))
        judged = {"frames": torch.full((frames, 3, SIZE, SIZE), number, dtype=torch.uint8)} if frames else {}
        caption = videos.read(number)[0]["caption"]
        cache.clips.write([dict(index=number, caption=caption, mean=mean, deviation=mean / 2, **judged)])
    cache.clips.refresh()


def test_a_cache_of_another_run_is_refused(opened):
    for _ in range(2):
        opened()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        opened(seed=1)


def test_a_file_in_the_folders_place_is_told(opened, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match="--cache_latents takes a folder, new or with what .*cache is a file"):
        opened()


def test_clips_have_judged_frames_in_all_files_or_in_none(opened):
    """A run that judges none adds clips to a cache that has such: the next one that does needs theirs too."""
    assert opened(image_data=None)[2].judged_frames == 2
    assert opened()[2].judged_frames == 2


def test_what_needs_pixels_of_clips_is_refused(opened):
    with pytest.raises(ValueError, match="--lambda_change 0.5 compares with frames of the real clips"):
        opened(lambda_change=0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_videos(opened, workers):
    """Over three epochs of two windows: captions, judged frames, and which clips are read; films are not opened."""
    config, data, cache = opened(image_data=None, dataloader_num_workers=workers)
    fill(cache, data.videos, range(8), frames=2)
    accelerator = Accelerator(cpu=True)
    encoded = build_batches(config, data, 0, accelerator, CachedVideos(data.videos, cache.clips))
    seen = []
    for batch, plain in zip(encoded, build_batches(config, data, 0, accelerator), strict=True):
        assert batch.captions == plain.captions and batch.indices == plain.indices
        assert batch.real_texts == plain.real_texts
        clips = batch.pixels
        assert isinstance(clips, EncodedClips) and clips.num_frames == NUM_FRAMES
        for place, index in enumerate(batch.indices):
            number = data.videos.key(index)
            starts = data.videos.decodes(index)
            assert starts == bool(plain.pixels[place].any())
            assert clips.mean[place].unique().tolist() == [number + 1 if starts else 0]
            assert torch.equal(clips.deviation[place] * 2, clips.mean[place])
            assert batch.images[2 * place].unique().tolist() == [number]
            seen.append(number)
    assert sorted(seen[:8]) == list(range(8)) and sorted(seen[8:]) == list(range(4))


def test_the_texts_of_a_run(world, opened):
    config, data, _ = opened()
    assert prompts_of(config, {"a"}) == {"a", ""}
    config, data, _ = opened(validation_prompts=("b",), negative_prompt="blurred")
    assert prompts_of(config, {"a"}) == {"a", "b", "blurred"}
    assert judged_texts(config, data, {"a"}) == {""} and data.image_text.choice == "none"
    config, data, _ = opened(image_text="own")
    assert judged_texts(config, data, {"a"}) == {"a", "", *(f"{caption}, sharp" for caption in CAPTIONS)}
    config, data, _ = opened(lambda_adv=0.0, image_data=None)
    assert judged_texts(config, data, {"a"}) == set()
