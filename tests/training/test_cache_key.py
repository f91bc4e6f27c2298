import json
import os
import shutil
from pathlib import Path

import pytest

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.data import VideoDataset
from diffusers_mcm.data.rows import FolderRows
from diffusers_mcm.location import Location
from diffusers_mcm.training import cache_key as module
from diffusers_mcm.training.cache_key import cache_key, check_key, read_key, write_key

from .world import tiny_config


@pytest.fixture
def own_world(world, tmp_path):
    """A copy, of which things may be changed."""
    copies = {
        name: shutil.copytree(world[name], tmp_path / name) for name in world if "data" in name or "model" in name
    }
    copies["discriminator_text"] = shutil.copytree(world["discriminator_text"], tmp_path / "clip")
    return world | {name: str(path) for name, path in copies.items()}


def key_of(world, tmp_path, known=None, judged_frames=0, **options):
    config = tiny_config(world, tmp_path / "out", **{"windows_per_clip": 1, **options})
    sizes = dict(num_frames=config.num_frames, height=config.height, width=config.width, seed=config.seed)
    videos = VideoDataset(config.video_data, frame_interval=1, judged_frames=judged_frames, **sizes)
    return cache_key(config, get_base_model("modelscope"), videos, known or {})


def test_nothing_has_changed_if_all_is_as_it_was_or_lies_elsewhere(world, own_world, tmp_path):
    then = key_of(world, tmp_path)
    write_key(tmp_path / "cache", then)
    assert read_key(tmp_path / "cache") == then and read_key(tmp_path) is None
    check_key(tmp_path, then, key_of(own_world, tmp_path))


def test_a_part_that_only_one_has_does_not_count(world, tmp_path):
    plain, judged = key_of(world, tmp_path, lambda_adv=0.0, image_data=None), key_of(world, tmp_path)
    assert plain.keys() == {"clips", "prompt"} and judged.keys() == {"clips", "prompt", "judge"}
    check_key(tmp_path, plain, judged)
    check_key(tmp_path, judged, plain)


def test_judged_frames_that_a_run_does_not_need_may_be_there(world, tmp_path):
    without, frames = (key_of(world, tmp_path, judged_frames=number) for number in (0, 2))
    check_key(tmp_path, frames, without)
    with pytest.raises(ValueError, match="judged frames of a clip was 0, is 2"):
        check_key(tmp_path, without, frames)


def test_more_windows_are_added_to_those_that_are_there(world, tmp_path):
    check_key(tmp_path, key_of(world, tmp_path), key_of(world, tmp_path, windows_per_clip=4))


def test_data_that_do_not_tell_their_files_are_known_by_their_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(FolderRows, "order", lambda self: None)
    then = key_of(world, tmp_path)
    check_key(tmp_path, then, key_of(world, tmp_path))
    copy = shutil.copytree(world["video_data"], tmp_path / "other")
    with pytest.raises(ValueError, match="source of videos was .*/videos, is .*/other"):
        check_key(tmp_path, then, key_of(world | {"video_data": str(copy)}, tmp_path))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(height=24), "height was 16, is 24"),
        (dict(seed=1), "seed was 0, is 1"),
        (dict(cache_dtype="bf16"), "cache_dtype was exact, is bf16"),
        (dict(variant="fp16"), "variant was None, is fp16"),
        (dict(mixed_precision="bf16"), "than this run needs: mixed_precision was no, is bf16. Go"),  # once
    ],
)
def test_settings_that_have_changed_are_named(world, tmp_path, options, told):
    with pytest.raises(ValueError, match=rf"{told}.*back to that, or make another cache in another folder"):
        check_key(tmp_path, key_of(world, tmp_path), key_of(world, tmp_path, **options))


def append(path):
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("source", "file", "told"),
    [
        (
            "pretrained_teacher_model",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.* another",
        ),
        ("pretrained_teacher_model", "text_encoder/config.json", "text_encoder/config.json is another"),
        ("pretrained_teacher_model", "tokenizer/tokenizer.json", "tokenizer/tokenizer.json is another"),
        ("discriminator_text", "model.safetensors", "model.safetensors is another"),
        ("video_data", "0.mp4", "captions and sizes of videos was "),
    ],
)
def test_files_that_have_changed_are_named(own_world, tmp_path, source, file, told):
    then = key_of(own_world, tmp_path)
    append(Path(own_world[source], file))
    with pytest.raises(ValueError, match=f"something else than this run needs: {told}"):
        check_key(tmp_path, then, key_of(own_world, tmp_path, known=then))


def test_a_file_with_the_size_and_time_of_before_is_not_summed_again(world, tmp_path, monkeypatch):
    then = key_of(world, tmp_path)
    monkeypatch.setattr(module, "sha256", lambda path: 1 / 0)
    assert key_of(world, tmp_path, known=then) == then


def test_a_sum_stands_for_the_file_of_that_name_alone(own_world, tmp_path):
    """An archive may give all files one time, and parts of large weights are of one size."""
    for number in range(2):
        path = Path(own_world["pretrained_teacher_model"], "vae", f"{number}.safetensors")
        path.write_text(str(number))
        os.utime(path, ns=(10**18, 10**18))
    then = key_of(own_world, tmp_path)
    assert key_of(own_world, tmp_path, known=then) == then


def test_of_a_repository_the_commit_counts(tmp_path, monkeypatch):
    path = tmp_path / "snapshots" / "abc" / "vae" / "config.json"
    monkeypatch.setattr(Location, "file", lambda self, name: path)
    there = Location("owner/name", remote=True)
    assert module._networks(there, ("vae",), {}) == {"owner/name": "abc"} and there.version() == "abc"


def test_a_cache_of_another_version_is_refused(tmp_path):
    (tmp_path / "cache.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="cache that another version of diffusers-mcm has made: take another folder"):
        read_key(tmp_path)
