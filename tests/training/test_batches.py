"""A run goes on with the data it was begun with, or not at all: the order of the samples hangs on their number."""

import shutil

import pytest
import torch
from accelerate import Accelerator

from diffusers_mcm.data import VideoDataset, film
from diffusers_mcm.distillation.draws import Coins
from diffusers_mcm.training.batches import build_batches, choose_image_text, open_data
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.resuming import check_data, check_same_everywhere
from tests.tiny import NUM_FRAMES

from ..data.conftest import write_tar
from .world import CAPTIONS, tiny_config


@pytest.fixture
def tars(world, tmp_path):
    """The world's videos, one in each tar."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        with open(f"{world['video_data']}/{number}.mp4", "rb") as file:
            write_tar(folder / f"{number}.tar", {f"{number}.mp4": file.read(), f"{number}.txt": caption})
    return folder


@pytest.fixture
def begun(world, tmp_path, tars):
    """A run with a checkpoint of its first step; what makes it go on."""

    def config(**options):
        fixed = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, checkpointing_steps=1)
        return tiny_config(world, tmp_path / "out", **(fixed | dict(video_data=str(tars)) | options))

    Trainer(config(max_train_steps=1)).train()
    return lambda **options: Trainer(config(resume_from_checkpoint="latest", **options)).batches


def test_a_shard_that_broke_meanwhile_is_an_error_that_names_it(tars, begun):
    begun()
    (tars / "1.tar").write_bytes(b"")
    number = len(CAPTIONS)
    message = rf"(?s)number of videos was {number}, is {number - 1}; order of videos .*cannot be used now:\n  .*1\.tar"
    with pytest.raises(ValueError, match=message):
        begun()


def test_as_many_other_videos_are_an_error(tars, begun):
    (tars / "0.tar").rename(tars / "9.tar")
    with pytest.raises(ValueError, match="its data have changed and .*: order of videos was .*another --output_dir"):
        begun()


def test_data_that_only_moved_are_the_same(tars, begun, tmp_path):
    moved = shutil.copytree(tars, tmp_path / "elsewhere")
    begun(video_data=str(moved))


def test_a_checkpoint_that_knew_the_number_only_is_gone_on_with(tars, begun, tmp_path):
    file = tmp_path / "out" / "checkpoint-1" / STATE_FILE
    state = torch.load(file, weights_only=True)
    state["data_sizes"] = {"number of videos": len(CAPTIONS)}
    torch.save(state, file)
    begun()
    check_data({}, {"number of videos": 3}, tmp_path, [])


def own_frames(world, tmp_path, **options):
    """The batches of a run without image data, and the films that are read for each of them."""
    config = tiny_config(world | dict(image_data=None), tmp_path, max_train_steps=4, **options)
    data = open_data(config, (NUM_FRAMES, 16, 16), Coins(config.lambda_real, config.train_batch_size))
    return config, data, build_batches(config, data, 0, Accelerator(cpu=True))


def test_without_image_data_the_judged_frames_are_those_of_the_clips(world, tmp_path, monkeypatch):
    opened = []
    original = film.open_film
    for module in ("diffusers_mcm.data.video", "diffusers_mcm.data.film"):
        monkeypatch.setattr(f"{module}.open_film", lambda media: opened.append(media["path"]) or original(media))
    config, data, batches = own_frames(world, tmp_path, train_batch_size=2)
    assert data.image_text == ("own", "images are frames of the videos", 1.0) and batches.images is None
    for number, batch in enumerate(batches, 1):
        starts = [data.videos.decodes(index) for index in batch.indices]
        assert sum(starts) == 1 and len(opened) == 2 * number  # one film for each sample
        assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
        for place, is_decoded in enumerate(starts):
            clip, frames = batch.pixels[place], batch.images[2 * place : 2 * place + 2]
            assert clip.any() == is_decoded and frames.any()
            if is_decoded:
                assert all(any(torch.equal(frame, clip[:, time]) for time in range(NUM_FRAMES)) for frame in frames)
        assert batch.real_texts == batch.fake_texts == [caption for caption in batch.captions for _ in range(2)]


@pytest.mark.parametrize(("share", "batch_size"), [(0.25, 4), (0.5, 1), (0.0, 2), (1.0, 2)])
def test_the_clips_that_are_decoded_are_those_of_the_coins(world, tmp_path, share, batch_size):
    """Those that `Student.encode_real` encodes, however a step is split."""
    accumulation = 4 // batch_size
    options = dict(train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    coins = Coins(share, 4)
    config = tiny_config(world, tmp_path, max_train_steps=4, lambda_adv=0.0, image_data=None, **options)
    data = open_data(config, (NUM_FRAMES, 16, 16), coins)
    for batch in build_batches(config, data, 0, Accelerator(cpu=True)):
        drawn = coins.draw(config.seed, batch.indices) < share
        assert [bool(clip.any()) for clip in batch.pixels] == drawn.tolist() and batch.images is None


@pytest.mark.parametrize("options", [dict(expert="low_noise"), dict(lambda_change=0.5)])
def test_all_clips_are_decoded_where_the_students_own_samples_need_the_real_ones(world, tmp_path, options):
    """The later expert noises real clips for its own samples; heads for changes compare with those of real clips."""
    config = tiny_config(world, tmp_path, max_train_steps=4, train_batch_size=2, lambda_real=0.5, **options)
    data = open_data(config, (NUM_FRAMES, 16, 16), Coins(0.5, 2))
    assert all(clip.any() for batch in build_batches(config, data, 0, Accelerator(cpu=True)) for clip in batch.pixels)


def test_captions_that_are_far_away_are_not_compared(world):
    near, far = VideoDataset(world["video_data"], num_frames=2), VideoDataset(world["video_data"], num_frames=2)
    far.rows.far_captions = True
    assert choose_image_text("auto", far, near)[:2] == ("none", "captions in remote tars are not compared")


def test_as_many_workers_as_asked_for_or_as_suit_the_machine(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "diffusers_mcm.training.batches.default_workers", lambda size, processes: asked.append((size, processes)) or 5
    )
    config = tiny_config(world, tmp_path, dataloader_num_workers=None, train_batch_size=2)
    data = open_data(config, (NUM_FRAMES, 16, 16), Coins())
    batches = build_batches(config, data, 0, Accelerator(cpu=True))
    assert (batches.videos.num_workers, batches.images.num_workers) == (5, 2)
    assert asked == [(2 * 3 * NUM_FRAMES * 16 * 16, 1)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    build_batches(config, data, 0, Accelerator(cpu=True))
    assert asked[-1][1] == 8
    config = tiny_config(world, tmp_path, dataloader_num_workers=3)
    batches = build_batches(config, data, 0, Accelerator(cpu=True))
    assert (batches.videos.num_workers, batches.images.num_workers) == (3, 3)


def test_the_world_in_folders_tells_its_order(world, tmp_path):
    from diffusers_mcm.data.sources import IMAGES, VIDEOS, open_rows

    orders = {open_rows(world[name], kind).order() for name, kind in (("video_data", VIDEOS), ("image_data", IMAGES))}
    assert len(orders) == 2 and None not in orders


def test_processes_that_see_other_data_are_told_which():
    same = {"number of videos": 5, "order of videos": "ab"}
    check_same_everywhere([same, dict(same)])
    with pytest.raises(
        ValueError, match="Process 2 sees other data than process 0: number of videos was 5, is 4 there"
    ):
        check_same_everywhere([same, same, {**same, "number of videos": 4}])
