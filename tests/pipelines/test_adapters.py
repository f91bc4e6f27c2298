"""The LoRA verbs of a pipeline."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm import MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.lora import add_lora, fresh_lora, lora_layers, read_lora
from diffusers_mcm.pipelines import adapters
from tests.tiny import (
    EXACT,
    FEW_MODULES,
    NUM_FRAMES,
    SCHEDULER,
    TEXT_DIM,
    randomise_lora,
    save_tiny_lora,
    tiny_components,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_lora(tmp_path_factory.mktemp("lora"), base="owner/base")


@pytest.fixture(scope="module")
def plain():
    """The base model's own video."""
    return sample(make_pipe())


@pytest.fixture
def pipe():
    return make_pipe()


def make_pipe():
    pipe = ModelScopeMCMPipeline(
        **tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER)), num_frames=NUM_FRAMES
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float64)


def some_lora(pipe, seed=0, rank=2, alpha=2.0, scale=0.5):
    """A LoRA on a few modules, with an effect."""
    generator = torch.Generator().manual_seed(seed)
    lora = fresh_lora(pipe.unet, FEW_MODULES, rank=rank, alpha=alpha, generator=generator)
    for key, tensor in lora.tensors.items():
        if ".lora_B." in key:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return lora


def sample(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red ring", num_inference_steps=1, generator=generator, output_type="latent", **options).frames


def scaled(lora, factor):
    """The same LoRA with its B times `factor`: what a strength should amount to."""
    for key in lora.tensors:
        if ".lora_B." in key:
            lora.tensors[key] = lora.tensors[key].double() * factor
    return lora


# --- strength --------------------------------------------------------------------------------------------------------
def test_every_way_to_give_a_strength_has_the_same_effect(pipe):
    pipe.load_lora_weights(scaled(some_lora(pipe), 0.3))
    expected = sample(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(some_lora(pipe), "a")
    full = sample(pipe)
    assert not torch.allclose(full, expected, rtol=1e-2)
    torch.testing.assert_close(sample(pipe, lora_scale=0.3), expected, **EXACT)
    torch.testing.assert_close(sample(pipe, cross_attention_kwargs={"scale": 0.3}), expected, **EXACT)
    assert torch.equal(sample(pipe), full)
    pipe.set_adapters("a", 0.3)
    torch.testing.assert_close(sample(pipe), expected, **EXACT)
    pipe.set_adapters("a", 0.6)
    torch.testing.assert_close(sample(pipe, lora_scale=0.5), expected, **EXACT)


def test_strength_zero_is_the_base(pipe, plain):
    pipe.load_lora_weights(some_lora(pipe), "a")
    assert torch.equal(sample(pipe, lora_scale=0.0), plain)
    pipe.set_adapters("a", 0.7)
    weighted = sample(pipe)
    assert torch.equal(sample(pipe, lora_scale=0), plain)
    assert torch.equal(sample(pipe), weighted)  # the weight survived the zero


def test_the_scale_is_put_back_after_an_error(pipe):
    pipe.load_lora_weights(some_lora(pipe))
    before = sample(pipe)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(pipe, lora_scale=0.1, callback_on_step_end=fail)
    assert torch.equal(sample(pipe), before)


def test_two_adapters_add_up(pipe):
    first, second = some_lora(pipe, 1), some_lora(pipe, 2, rank=3, alpha=3.0)
    both = {name: second.tensors[name] for name in second.tensors}
    for name in FEW_MODULES:
        a, b = (f"{name}.lora_{half}.weight" for half in "AB")
        both[a] = torch.cat([first.tensors[a] * 0.5, second.tensors[a] * 2.0])
        both[b] = torch.cat([first.tensors[b], second.tensors[b]], dim=1)
    sum_of_both = some_lora(pipe)
    sum_of_both.tensors, sum_of_both.alpha = both, 5.0
    pipe.load_lora_weights(sum_of_both)
    expected = sample(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(first, "first")
    pipe.load_lora_weights(second, "second")
    assert pipe.get_active_adapters() == ["first", "second"]
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    torch.testing.assert_close(sample(pipe), expected, **EXACT)
    pipe.set_adapters("second")
    assert pipe.get_active_adapters() == ["second"]
    alone = sample(pipe)
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"unet": ["second"]}
    assert torch.equal(sample(pipe), alone)


def test_disable_and_enable(pipe, plain):
    pipe.load_lora_weights(some_lora(pipe), "a")
    adapted = sample(pipe)
    pipe.disable_lora()
    assert pipe.get_active_adapters() == []
    assert torch.equal(sample(pipe), plain)
    with pytest.raises(ValueError, match="scale of 0.5 was given, but no LoRA is active"):
        sample(pipe, lora_scale=0.5)
    pipe.load_lora_weights(some_lora(pipe, 1), "b")  # switched off means off, for newcomers too
    assert torch.equal(sample(pipe), plain)
    pipe.delete_adapters("b")
    pipe.enable_lora()
    assert torch.equal(sample(pipe), adapted)


# --- unload, fuse, unfuse --------------------------------------------------------------------------------------------
def test_unload_restores_the_base_bit_for_bit(pipe, plain, folder):
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(folder)
    assert not torch.allclose(sample(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)
    assert not lora_layers(pipe.unet) and pipe.get_list_adapters() == {}
    after = pipe.unet.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    pipe.unload_lora_weights()  # nothing left, nothing happens


def test_an_mcm_lora_is_switched_on_and_sampled_in_few_steps(pipe):
    """Whatever was set before, and though the LoRA, like those of PEFT, names no scheduler."""
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.disable_lora()
    pipe.scheduler = DDIMScheduler(**SCHEDULER | dict(beta_end=0.02))
    pipe.load_mcm_lora(some_lora(pipe, 1))
    assert pipe.get_active_adapters() == ["mcm"]
    assert type(pipe.scheduler) is MCMScheduler
    assert (pipe.scheduler.config.timestep_scaling, pipe.scheduler.config.beta_end) == (4.0, 0.02)


# --- errors ----------------------------------------------------------------------------------------------------------
def test_unknown_adapters(pipe):
    with pytest.raises(ValueError, match="No adapter named 'x' is loaded. Loaded adapters: none"):
        pipe.set_adapters("x")
    pipe.load_lora_weights(some_lora(pipe), "a")
    for verb in (pipe.set_adapters, pipe.fuse_lora, pipe.delete_adapters):
        with pytest.raises(ValueError, match="No adapter named 'x' is loaded. Loaded adapters: a"):
            verb(["a", "x"])
    with pytest.raises(ValueError, match="named twice"):
        pipe.set_adapters(["a", "a"])
    with pytest.raises(ValueError, match="1 adapters were named, but 2 weights given"):
        pipe.set_adapters(["a"], [1.0, 2.0])


def test_a_lora_for_another_base_model(pipe, folder, plain):
    lora = read_lora(folder)
    lora.settings = replace(lora.settings, base_model="animatediff")
    with pytest.raises(ValueError, match="made for base model 'animatediff'; this is 'modelscope'"):
        pipe.load_lora_weights(lora)
    assert torch.equal(sample(pipe), plain)


def for_the_text_encoder(pipe):
    """The keys of a LoRA on a layer of it."""
    name = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
    sizes = {"A": (2, TEXT_DIM), "B": (TEXT_DIM, 2)}
    return {f"text_encoder.{name}.lora_{half}.weight": torch.ones(sizes[half]) for half in "AB"}


@pytest.mark.parametrize("switched_on", [True, False])
def test_a_lora_that_is_broken_off_on_its_way_in_is_out_again(pipe, plain, monkeypatch, switched_on):
    """Of a LoRA with layers for two networks the part that was in already goes, too."""
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.set_adapters("a", 0.7)
    if not switched_on:
        pipe.disable_lora()
    before = sample(pipe)
    both = {f"unet.{key}": tensor for key, tensor in some_lora(pipe, 1).tensors.items()} | for_the_text_encoder(pipe)
    load = adapters.load_lora_into

    def stopped(network, lora, name):
        if network is pipe.text_encoder:
            raise KeyboardInterrupt
        load(network, lora, name)

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "load_lora_into", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipe.load_lora_weights(both, "b")
    assert pipe.get_list_adapters() == {"unet": ["a"]} and pipe._adapters.weights == {"a": 0.7}
    assert pipe.get_active_adapters() == ["a"] * switched_on and torch.equal(sample(pipe), before)
    pipe.load_lora_weights(both, "b")
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["b"]}
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


def test_loading_under_a_name_that_is_taken_leaves_what_has_it(pipe):
    pipe.load_mcm_lora(some_lora(pipe), "a")
    before = sample(pipe)
    for load in (pipe.load_lora_weights, pipe.load_mcm_lora):
        with pytest.raises(ValueError, match="An adapter named 'a' is loaded already; give another name, or unload"):
            load(some_lora(pipe, 1), "a")
    assert pipe.get_active_adapters() == ["a"] and torch.equal(sample(pipe), before)


def test_offloaded_weights(pipe):
    pipe.unet.conv_in.to("meta")
    with pytest.raises(ValueError, match="load the LoRA before enabling the offload"):
        pipe.load_lora_weights(some_lora(pipe))
    pipe = make_pipe()
    pipe.load_lora_weights(some_lora(pipe))
    pipe.unet.conv_in.to("meta")
    with pytest.raises(ValueError, match="; fuse the LoRA before enabling the offload"):
        pipe.fuse_lora()
    pipe = make_pipe()
    lora = some_lora(pipe)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="; unfuse the LoRA before enabling the offload"):
        pipe.unfuse_lora()
    extracted = pipe._extract("default")["unet"].tensors  # is still there to be saved
    assert all(torch.equal(extracted[key], tensor) for key, tensor in lora.tensors.items())


def test_a_student_in_training_stays_trainable():
    """A pipeline around it, for validation, neither freezes the LoRA nor forgets its strength."""
    components = tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))
    add_lora(components["unet"], FEW_MODULES, rank=2, alpha=2)
    randomise_lora(components["unet"])
    pipe = ModelScopeMCMPipeline(**components, num_frames=NUM_FRAMES)
    trainable = [name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(FEW_MODULES) and all(".lora_" in name for name in trainable)
    assert pipe.get_active_adapters() == ["default"]
    assert not torch.equal(sample(pipe), sample(pipe, lora_scale=0.5))
    pipe.set_adapters("default", 0.5)
    assert len([p for p in pipe.unet.parameters() if p.requires_grad]) == len(trainable)
