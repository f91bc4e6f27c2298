"""`mcm_config.json`: read, written, moved, and made fit for others to see."""

import ast
import json
from pathlib import Path

import pytest

from diffusers_mcm.location import Location
from diffusers_mcm.settings import CONFIG_NAME, SAMPLING_KEYS, Sample, SamplingDefaults, Settings

PACKAGE = Path(__file__).parents[1] / "diffusers_mcm"
CONTENT = {
    "base_model": "animatediff",
    "base_model_repository": "../base",
    "base_model_revision": None,
    "extra_repositories": {"motion_adapter": "./adapter"},
    "sampling": {"num_inference_steps": 2, "num_frames": 4, "height": 16, "width": 24, "fps": 8},
    "training": {"steps": 70, "video_data": "../../alice/videos", "seed": 0},
    "sample": {"file": "sample.mp4", "prompt": "a cat"},
}


def test_a_file_survives_being_read_and_written_with_what_a_later_version_has_added(tmp_path):
    later = CONTENT | {
        "shift": 5,
        "sampling": CONTENT["sampling"] | {"sampler": "euler"},
        "sample": CONTENT["sample"] | {"seed": 1},
    }
    Settings.from_dict(later).write(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == later
    assert Settings.read(Location.of(tmp_path)) == Settings.from_dict(later)


def test_what_old_files_lack_or_have_as_null_is_not_known():
    for content in ({}, {"sampling": None, "training": None, "extra_repositories": None, "sample": None}):
        settings = Settings.from_dict(content)
        assert not settings and settings.to_dict() == {} and settings.steps == 4
        assert settings.sampling.known() == {} and settings.training_rows() == {} and settings.prompt is None
    assert Settings.from_dict({"base_model": "modelscope"}).to_dict()["sampling"] == {}


def test_there_may_be_no_file(tmp_path):
    assert Settings.read(Location.of(tmp_path)) is None


def test_paths_are_relative_to_the_folder_and_ids_stay(tmp_path):
    old, new = tmp_path / "loras" / "old", tmp_path / "new"
    for folder in (old / "adapter", tmp_path / "loras" / "base", new):
        folder.mkdir(parents=True)
    absolute = Settings.from_dict(CONTENT).absolute(old)
    assert absolute.base_model_repository == str(tmp_path / "loras" / "base")
    moved = absolute.recorded_in(new)
    assert moved.base_model_repository == "../loras/base"
    assert moved.extra_repositories == {"motion_adapter": "../loras/old/adapter"}
    assert moved.absolute(new).recorded_in(old) == Settings.from_dict(CONTENT)
    assert Settings.from_dict(CONTENT).moved(old, new) == moved and moved.moved(None, old) == moved
    ids = Settings(base_model_repository="owner/base", extra_repositories={"motion_adapter": "owner/adapter"})
    assert ids.absolute(old).recorded_in(new) == ids.moved(old, new) == ids and not ids.is_local and moved.is_local


def test_others_see_no_paths():
    settings = Settings.from_dict(CONTENT | {"base_model_repository": "owner/base", "extra_repositories": {}})
    assert settings.public().training == {"steps": 70, "video_data": "videos", "seed": 0}
    assert settings.training_rows()["videos"] == ["videos"]
    with pytest.raises(ValueError, match="The base model is recorded as the local folder '../base'"):
        Settings.from_dict(CONTENT).public()


def test_a_call_has_the_same_defaults_under_the_same_names():
    sampling = SamplingDefaults.from_dict(CONTENT["sampling"])
    assert sampling.known() == CONTENT["sampling"] and set(SAMPLING_KEYS) == set(CONTENT["sampling"])
    assert Settings(sample=Sample("a.mp4", "a dog")).prompt == "a dog"


def test_nothing_else_knows_the_keys():
    keys = {"base_model_repository", "base_model_revision", "sampling", "training"}
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "settings.py"}:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        subscripts = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
        gets = [
            node.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
            if node.func.attr in ("get", "pop")
        ]
        used = {node.value for node in subscripts + gets if isinstance(node, ast.Constant)}
        assert not used & keys, path


def test_the_expert_and_the_boundary_of_a_model_with_two(tmp_path):
    settings = Settings(base_model="wan-a14b", expert="low_noise", boundary=0.875)
    settings.write(tmp_path)
    assert Settings.read(Location.of(tmp_path)) == settings
    assert not {"expert", "boundary"} & Settings(base_model="wan").to_dict().keys()
    with pytest.raises(ValueError, match="`expert` in mcm_config.json must be high_noise or low_noise, not 'high'"):
        Settings.from_dict({"expert": "high"})
