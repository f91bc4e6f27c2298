"""Where a LoRA is found: whatever its file is called, in a folder or on the Hub."""

import shutil

import pytest
import torch

from diffusers_mcm import MCMPipeline
from diffusers_mcm.location import Location
from diffusers_mcm.lora import MOTION_HEAD_NAME, WEIGHTS_NAME, read_lora
from tests.hub_server import hub_server
from tests.tiny import save_tiny_base, save_tiny_lora


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    return save_tiny_lora(folder / "lora", base=folder / "base") / WEIGHTS_NAME


def place(lora, folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(lora, folder / name)
    return folder


@pytest.mark.parametrize("name", ["watercolour.safetensors", "W.SAFETENSORS", "w.sft"])
def test_a_folder_with_one_file_of_its_own_name(lora, tmp_path, name):
    folder = place(lora, tmp_path / "style", name, MOTION_HEAD_NAME, "._copy.safetensors")
    expected = read_lora(lora).tensors
    for found in (read_lora(folder), read_lora(folder / name), read_lora(folder, weight_name=name)):
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[key], expected[key]) for key in expected)


def test_a_pipeline_of_it(lora, tmp_path):
    folder = place(lora, tmp_path / "style", "watercolour.safetensors")
    assert MCMPipeline.from_pretrained(folder, base_model=lora.parents[1] / "base").get_active_adapters() == ["mcm"]


def test_several_files_are_named(lora, tmp_path):
    place(lora, tmp_path, "a.safetensors", "b.sft")
    with pytest.raises(ValueError, match="several files in .*: a.safetensors, b.sft; name one with `weight_name`"):
        read_lora(tmp_path)
    assert read_lora(tmp_path, weight_name="b.sft").tensors
    place(lora, tmp_path, WEIGHTS_NAME)  # a usual name is what is meant
    assert read_lora(tmp_path).source == str(tmp_path / WEIGHTS_NAME)


def test_no_file_of_a_whole_pipeline_is_taken_for_a_lora(lora, tmp_path):
    (place(lora, tmp_path, "v1-5.safetensors") / "model_index.json").write_text("{}")
    assert Location.of(tmp_path).find_lora_file() is None


def test_on_the_hub_and_then_offline(lora, tmp_path):
    place(lora, tmp_path / "owner" / "style", "watercolour.safetensors")
    place(lora, tmp_path / "owner" / "style" / "more", "a.SAFETENSORS", "b.safetensors")
    options = dict(cache_dir=tmp_path / "cache")
    with hub_server(tmp_path):
        expected = read_lora("owner/style", **options).source
        with pytest.raises(ValueError, match="owner/style .subfolder 'more'.: a.SAFETENSORS, b.safetensors; name one"):
            read_lora("owner/style", subfolder="more", **options)
        assert read_lora("owner/style", subfolder="more", weight_name="a.SAFETENSORS", **options).tensors
    assert expected.endswith("watercolour.safetensors")
    assert read_lora("owner/style", local_files_only=True, **options).source == expected
