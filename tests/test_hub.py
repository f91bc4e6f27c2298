import json

import pytest

from diffusers_mcm import hub
from diffusers_mcm.location import Location


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A packaged folder with one model in it."""
    folder = tmp_path / "weights"
    (folder / "mcm-shapes").mkdir(parents=True)
    monkeypatch.setattr(hub, "PACKAGED_FOLDER", folder)
    return folder


def test_a_local_folder_wins_over_a_packaged_model(packaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("mcm-shapes") == str(packaged / "mcm-shapes")
    (tmp_path / "mcm-shapes").mkdir()
    assert hub.resolve("mcm-shapes") == "mcm-shapes"
    # What a configuration names was never meant to be a folder of the working directory.
    assert hub.resolve_recorded("mcm-shapes", tmp_path) == str(packaged / "mcm-shapes")


def test_hub_ids_pass_through():
    assert hub.resolve("ali-vilab/text-to-video-ms-1.7b") == "ali-vilab/text-to-video-ms-1.7b"


@pytest.mark.parametrize("name", ["no-such-thing", "./no/such/folder", "a/b/c", "/nowhere"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(FileNotFoundError, match="not a file or folder.*mcm-shapes.*'owner/name'"):
        hub.resolve(name)


def test_a_packaged_model_that_is_not_installed(packaged):
    with pytest.raises(FileNotFoundError, match="'mcm-shapes-clip' is not in this installation"):
        hub.resolve("mcm-shapes-clip")


def test_local_folders_are_recorded_relatively_and_found_again(packaged, tmp_path):
    base, lora = tmp_path / "models" / "base", tmp_path / "out" / "lora"
    base.mkdir(parents=True)
    lora.mkdir(parents=True)
    assert hub.recordable(base, lora) == "../../models/base"
    assert hub.recordable(lora / "base", lora) == "./base"  # even before it is there: never an absolute path
    (lora / "base").mkdir()
    for folder in (base, lora / "base"):
        assert hub.resolve_recorded(hub.recordable(folder, lora), lora) == str(folder)
    assert hub.recordable("owner/name", lora) == "owner/name"
    assert hub.recordable(packaged / "mcm-shapes", lora) == "mcm-shapes"


def test_a_recorded_folder_that_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError, match="recorded as '../base', but .* does not exist"):
        hub.resolve_recorded("../base", tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="recorded as '../base', beside the LoRA, which is remote"):
        hub.resolve_recorded("../base", None)


def test_read_json(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text(json.dumps({"x": 1}))
    assert Location.of(tmp_path, subfolder="sub").json("a.json") == {"x": 1}
    assert Location.of(tmp_path).json("a.json") is None
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        Location.of(tmp_path).json("a.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_that_somebody_has_edited_is_read_in_any_encoding(tmp_path, encoding):
    (tmp_path / "mcm_config.json").write_bytes('{"note": "café"}'.encode(encoding))
    assert Location.of(tmp_path).json("mcm_config.json") == {"note": "café"}
    (tmp_path / "mcm_config.json").write_bytes('{"note": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"mcm_config\.json is not valid JSON"):
        Location.of(tmp_path).json("mcm_config.json")
