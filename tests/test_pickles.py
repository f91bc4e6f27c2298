"""Weights that reading could make run code are never read, and the error says how to convert them."""

import pickle
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.features import PatchFeatures, TextFeatures
from diffusers_mcm.lora import WEIGHTS_NAME, read_lora
from tests.distillation.discriminator.tiny import tiny_clip_text, tiny_dinov2
from tests.hub_server import hub_server
from tests.tiny import save_tiny_base, save_tiny_lora, tiny_tokenizer


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def bomb(path):
    path.write_bytes(pickle.dumps(Bomb()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    save_tiny_lora(folder / "lora", base=folder / "base")
    return folder


NEVER = "pickled weights are not read, for they can run code. Convert them: python -c"


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.pth", "lora.ckpt"])
def test_a_pickled_lora_is_refused_as_file_by_name_and_where_it_is_alone(tmp_path, name):
    bomb(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} of .* is not a .safetensors file; {NEVER}"):
        MCMPipeline.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} of .* is not a .safetensors file; {NEVER}"):
        read_lora(tmp_path, weight_name=name)
    with pytest.raises(FileNotFoundError, match=f"No LoRA in .* There is {name}, but {NEVER}"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match=f"holds neither .* There is {name}, but {NEVER}"):
        MCMPipeline.from_pretrained(tmp_path)


def test_a_pickled_lora_on_the_hub_is_not_even_fetched(tmp_path):
    (tmp_path / "owner" / "lora" / "sub").mkdir(parents=True)
    bomb(tmp_path / "owner" / "lora" / "sub" / "adapter_model.bin")
    with hub_server(tmp_path) as server:
        options = dict(subfolder="sub", cache_dir=tmp_path / "cache")
        with pytest.raises(ValueError, match=f"holds neither .* There is adapter_model.bin, but {NEVER}"):
            MCMPipeline.from_pretrained("owner/lora", **options)
        with pytest.raises(ValueError, match=f"adapter_model.bin of owner/lora is not a .safetensors file; {NEVER}"):
            read_lora("owner/lora", weight_name="adapter_model.bin", **options)
        assert not [request for request in server.requests if request.endswith(".bin")]


def run_what_is_printed(error):
    """In a shell, as a user would."""
    arguments = re.search(r"python( -c .*)", str(error))[1]
    subprocess.run(f"{shlex.quote(sys.executable)}{arguments}", shell=True, check=True)


@pytest.mark.parametrize("name", ['it\'s a "style" $HOME.bin', "two words.PT"])
def test_the_printed_command_takes_any_name_and_what_is_in_checkpoints(tmp_path, name):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"unet.a.lora_A.weight": whole, "unet.b.lora_A.weight": whole, "unet.c.lora_A.weight": whole.T}
    nested = {"unet": {"a": {"lora_A.weight": whole}, "b.lora_A.weight": whole}, "unet.c.lora_A.weight": whole.T}
    wrapped = {"epoch": 3, "state_dict": {"model": tensors}, "optimizer": {"x": whole}}
    torch.save(nested if name.endswith("bin") else wrapped, tmp_path / name)  # tensors that share their memory
    with pytest.raises(ValueError, match="pickled weights are not read") as error:
        read_lora(tmp_path / name)
    run_what_is_printed(error.value)
    converted = load_file((tmp_path / name).with_suffix(".safetensors"))
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[key], tensors[key]) for key in tensors)


def test_a_component_is_converted_to_the_name_that_is_looked_for(world, tmp_path):
    base = shutil.copytree(world / "base", tmp_path / "base")
    path = base / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(OSError, match="has no safetensors weights") as error:
        MCMPipeline.from_pretrained(base)
    run_what_is_printed(error.value)
    MCMPipeline.from_pretrained(base)


def test_the_way_to_convert_works(world, tmp_path):
    tensors = load_file(world / "lora" / WEIGHTS_NAME)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(FileNotFoundError) as error:
        read_lora(tmp_path)
    run_what_is_printed(error.value)
    converted = load_file(tmp_path / WEIGHTS_NAME)
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[key], tensors[key]) for key in tensors)
    assert read_lora(tmp_path).modules == read_lora(world / "lora").modules


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_a_base_model_with_a_pickled_component_is_refused(world, tmp_path, component, name):
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / component / f"{name}.safetensors").unlink()
    bomb(base / component / ("pytorch_model.bin" if name == "model" else f"{name}.bin"))
    with pytest.raises(OSError, match=f"has no safetensors weights .*, and {NEVER}"):
        MCMPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match="`use_safetensors=False` was given, but pickled weights are not read"):
        MCMPipeline.from_pretrained(base, use_safetensors=False)


def test_the_discriminators_networks_are_not_unpickled(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "features")
    tiny_clip_text().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    for folder, network in ((tmp_path / "features", PatchFeatures), (tmp_path / "clip", TextFeatures)):
        (folder / "model.safetensors").unlink()
        bomb(folder / "pytorch_model.bin")
        with pytest.raises(OSError, match=f"has no safetensors weights .*, and {NEVER}"):
            network.from_pretrained(str(folder))


def test_a_checkpoint_that_is_more_than_tensors_is_refused(tmp_path):
    from diffusers_mcm.training.checkpoint import STATE_FILE, load_checkpoint

    bomb(tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path)
