"""LoRA verbs on networks whose weights are offloaded: they do what they say, or refuse."""

import pytest
import torch

from diffusers_mcm.pipelines.offload import is_changeable, is_in_groups, is_on_disk, is_readable
from tests.pipelines import test_adapters
from tests.pipelines.test_adapters import for_the_text_encoder, make_pipe, sample, some_lora

plain, pipe = test_adapters.plain, test_adapters.pipe
CPU = torch.device("cpu")


def to_disk(network, folder):
    network.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder / "away"))


def streamed(network, folder):
    """In groups, on a stream, as far as that goes without an accelerator: the copies that a stream would bring."""
    network.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    for module in network.modules():
        if (hooks := getattr(module, "_diffusers_hook", None)) and (hook := hooks.get_hook("group_offloading")):
            hook.group.stream = object()


def one_by_one(network, folder):
    """As `enable_sequential_cpu_offload` has it."""
    from accelerate import cpu_offload

    cpu_offload(network, CPU)


def refused(what, component="unet"):
    return pytest.raises(
        ValueError, match=f"The {component}'s weights are offloaded; {what} before enabling the offload"
    )


@pytest.mark.parametrize(
    ("offload", "readable", "changeable"),
    [(to_disk, False, False), (streamed, True, False), (one_by_one, False, False)],
)
def test_where_weights_can_be_read_and_changed(pipe, tmp_path, offload, readable, changeable):
    assert is_readable(pipe.unet) and is_changeable(pipe.unet) and not is_in_groups(pipe.unet)
    offload(pipe.unet, tmp_path)
    assert (is_readable(pipe.unet), is_changeable(pipe.unet)) == (readable, changeable)
    assert (is_on_disk(pipe.unet), is_in_groups(pipe.unet)) == (offload is to_disk, offload is not one_by_one)
    assert is_changeable(pipe.text_encoder)


@pytest.mark.parametrize("offload", [to_disk, streamed, one_by_one])
def test_what_would_be_lost_is_refused(pipe, tmp_path, offload):
    """That a LoRA is loaded, fused, or taken out of the weights that it is fused into."""
    lora, fused = some_lora(pipe), make_pipe()
    for each in (pipe, fused):
        each.load_lora_weights(lora, "a")
    fused.fuse_lora()
    for each in (pipe, fused):
        offload(each.unet, tmp_path)
    with refused("fuse the LoRA"):
        pipe.fuse_lora()
    with refused("load the LoRA"):
        pipe.load_lora_weights(some_lora(pipe, 1), "b")
    for verb in (fused.unfuse_lora, fused.unload_lora_weights):
        with refused("unfuse the LoRA"):
            verb()
    assert pipe.get_active_adapters() == ["a"] and fused.fused_loras == {"a"}


@pytest.mark.parametrize("offload", [to_disk, one_by_one])
def test_what_goes_on_with_weights_that_are_away(pipe, plain, tmp_path, offload):
    """A LoRA that was loaded before acts, is weighed, and goes; what is fused stays fused."""
    pipe.load_lora_weights(some_lora(pipe), "a")
    adapted = sample(pipe)
    fused = make_pipe()
    fused.load_lora_weights(some_lora(pipe), "a")
    fused.fuse_lora()
    summed = sample(fused)
    for name, each in (("pipe", pipe), ("fused", fused)):
        offload(each.unet, tmp_path / name)
    assert torch.equal(sample(pipe), adapted) and torch.equal(sample(fused), summed)
    pipe.set_adapters("a", 0.5)
    assert not torch.equal(sample(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("offload", [to_disk, one_by_one])
def test_weights_that_are_away_are_not_saved(pipe, tmp_path, offload):
    lora = some_lora(pipe)
    pipe.load_lora_weights(lora, "a")
    offload(pipe.unet, tmp_path)
    message = "The unet's weights are offloaded, the LoRA's with them; save it before enabling the offload"
    for save in (lambda: pipe.save_mcm_lora(tmp_path / "lora"), lambda: pipe.push_to_hub("me/lora")):
        with pytest.raises(ValueError, match=message):
            save()
    with refused("save the pipeline"):
        pipe.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "lora").exists() and not (tmp_path / "whole").exists()
    fused = make_pipe()
    fused.load_lora_weights(lora, "a")
    fused.fuse_lora()
    offload(fused.unet, tmp_path / "fused")
    extracted = fused._extract("a")["unet"].tensors  # which is not in the network
    assert all(torch.equal(extracted[key], tensor) for key, tensor in lora.tensors.items())
    with refused("save the pipeline"):
        fused.save_pretrained(tmp_path / "whole")


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_no_component_is_saved_while_it_is_away(pipe, tmp_path, name):
    one_by_one(getattr(pipe, name), tmp_path)
    with refused("save the pipeline", name):
        pipe.save_pretrained(tmp_path / "whole")


def test_a_text_encoder_that_is_away(pipe, tmp_path):
    """It stands in the way of LoRAs with layers for it, and of no others."""
    one_by_one(pipe.text_encoder, tmp_path)
    both = {f"unet.{key}": tensor for key, tensor in some_lora(pipe).tensors.items()} | for_the_text_encoder(pipe)
    with refused("load the LoRA", "text_encoder"):
        pipe.load_lora_weights(both, "style")
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")  # the real hooks, with the processor in the role of an accelerator


def in_memory(pipe):
    pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [model_offload, in_memory])
def test_weights_in_host_memory_are_changed_and_saved_as_ever(pipe, plain, tmp_path, offload):
    other = make_pipe()
    other.load_lora_weights(some_lora(pipe), "a")
    adapted = sample(other)
    other.fuse_lora()
    fused = sample(other)
    offload(pipe)
    pipe.load_lora_weights(some_lora(pipe), "a")
    assert torch.equal(sample(pipe), adapted)
    pipe.fuse_lora()
    assert torch.equal(sample(pipe), fused)
    pipe.save_mcm_lora(tmp_path / "lora")
    pipe.save_pretrained(tmp_path / "whole")
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)
