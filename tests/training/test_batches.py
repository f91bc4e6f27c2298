"""A run goes on with the data it was begun with, or not at all: the order of the samples hangs on their number."""

import shutil

import pytest
import torch

from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.resuming import check_data, check_same_everywhere

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
