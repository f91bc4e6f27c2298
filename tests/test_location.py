"""Where files are: one rule for what a name means, and what is found there."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_mcm.location import PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Location, check_whole


def test_what_is_here_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location.of("owner/name").remote
    (tmp_path / "owner" / "name").mkdir(parents=True)
    location = Location.of("owner/name", subfolder="", revision="v1", token="t")
    assert location.is_folder and not location.remote and not location.is_file
    assert location.arguments == {"revision": "v1", "token": "t"} and Location.of(location) is location
    assert not Location("owner/name", remote=True).is_folder  # where a repository is meant, whatever lies here


def test_a_slip_of_the_pen_is_no_option(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(TypeError, match="Unknown option 'weigth_name' .* there are subfolder, revision, weight_name"):
        Location.of(tmp_path, weigth_name="b.safetensors")
    with pytest.raises(ValueError, match="`use_safetensors=False` was given, but pickled weights are not read"):
        Location.of("owner/name", use_safetensors=False)
    # what diffusers' verbs take besides
    given = Location.of("owner/name", use_safetensors=True, low_cpu_mem_usage=True, local_files_only=True)
    assert given == Location.of("owner/name", use_safetensors=None, local_files_only=True)


def test_the_place_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.json").write_text('{"y": 1}')
    location = Location.of(tmp_path, subfolder="a")
    assert location.inside("b").subfolder == "a/b" and str(location) == f"{tmp_path} (subfolder 'a')"
    assert location.inside("b").json("x.json") == {"y": 1} and location.json("x.json") is None
    assert location.files() == ["a/b/x.json"] and location.fetched() is location


def test_a_file_lies_in_a_folder(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"")
    location = Location.of(path, subfolder="passed over")
    assert location.is_file and location.around() == Location(str(tmp_path), weight_name="mine.safetensors")
    assert location.lora_file() == path
    with pytest.raises(ValueError, match="is a file; expected a folder or a repository with x.json in it"):
        location.file("x.json")


def test_the_file_of_a_lora(tmp_path):
    location = Location.of(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"No LoRA in .*: there is no {WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME}"):
        location.lora_file()
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert location.find_lora_file() == tmp_path / "b.safetensors"  # the only one
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="several files in .*; name one with `weight_name`"):
        location.lora_file()
    (tmp_path / PEFT_WEIGHTS_NAME).write_bytes(b"")
    assert location.lora_file() == tmp_path / PEFT_WEIGHTS_NAME
    assert Location.of(tmp_path, weight_name="a.safetensors").lora_file() == tmp_path / "a.safetensors"


def test_a_network_whose_weights_were_not_all_read(tmp_path):
    """What carries no marks of transformers is not judged, nor what is no network."""
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    check_whole(CLIPTextModel.from_pretrained(tmp_path), "a")
    check_whole(CLIPTextModel(config), "a")
    check_whole("a tokenizer", "a")
    kept = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "fc1" not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    made_up = CLIPTextModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^here does not hold all weights of a CLIPTextModel: .*fc1.bias, .*random.$"):
        check_whole(made_up, "here")
