"""A LoRA in the denoiser: what it adds to the layers, and which layers it fits."""

import pytest
import torch

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.lora import (
    LoRA,
    add_lora,
    check_fits,
    fresh_lora,
    fused,
    load_lora_into,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    read_lora,
    set_lora_state_dict,
    take_out,
    train_only,
)
from tests.tiny import EXACT, FEW_MODULES, TEXT_DIM, randomise_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 5, TEXT_DIM, generator=generator)
    dtype = getattr(unet, "dtype", torch.float64)  # what `fused` gives is a function, here of a network in float64
    return unet(latents.to(dtype), torch.tensor([500]), embeds.to(dtype)).sample


# --- in the denoiser -------------------------------------------------------------------------------------------------
def test_a_fresh_lora_changes_nothing_and_alone_is_trainable(unet):
    before = output(unet)
    targets = MODELSCOPE.lora_target_modules(unet)
    add_lora(unet, targets, rank=2, alpha=2)
    assert MODELSCOPE.lora_target_modules(unet) == targets
    assert torch.equal(output(unet), before)
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in unet.named_parameters() if ".lora_" in name}
    assert len(trainable) == 2 * len(targets)


def test_what_of_a_lora_is_trained_and_the_rest_acts_all_the_same(unet):
    add_lora(unet, FEW_MODULES, rank=2)
    randomise_lora(unet)
    before, weights = output(unet), {key: tensor.clone() for key, tensor in lora_state_dict(unet).items()}
    train_only(unet, FEW_MODULES[:1])
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{FEW_MODULES[0]}.lora_{half}.default.weight" for half in "AB"}
    assert torch.equal(output(unet), before)
    assert all(torch.equal(weights[key], tensor) for key, tensor in lora_state_dict(unet).items())
    train_only(unet, FEW_MODULES)
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == 2 * len(FEW_MODULES)


@pytest.mark.parametrize("beside_another", [False, True])
@pytest.mark.parametrize("broken_at", [1, 2])
def test_a_lora_that_is_broken_off_on_its_way_in_is_out_again(unet, monkeypatch, beside_another, broken_at):
    lora = fresh_lora(unet, FEW_MODULES, rank=2)
    if beside_another:
        add_lora(unet, FEW_MODULES[1:], rank=2)
        randomise_lora(unet)
    before, modules = output(unet), {name: type(module) for name, module in unet.named_modules()}
    trainable = [parameter.requires_grad for parameter in unet.parameters()]
    calls = []

    def stopped(layer):
        calls.append(layer)
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        return layer.weight.dtype

    monkeypatch.setattr("diffusers_mcm.lora.layers.compute_dtype", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_lora_into(unet, lora, "other")
    assert list(getattr(unet, "peft_config", {})) == ["default"] * beside_another
    assert {name: type(module) for name, module in unet.named_modules()} == modules
    assert [parameter.requires_grad for parameter in unet.parameters()] == trainable
    assert torch.equal(output(unet), before)


def test_taking_one_of_two_out(unet):
    plain, lora = output(unet), fresh_lora(unet, FEW_MODULES[:2], rank=2)
    add_lora(unet, FEW_MODULES[1:], rank=2)
    randomise_lora(unet)
    before = output(unet)
    load_lora_into(unet, lora, "other")
    take_out(unet, ["other"], ["default"])
    assert lora_layers(unet).keys() == set(FEW_MODULES[1:]) and list(unet.peft_config) == ["default"]
    assert torch.equal(output(unet), before)
    take_out(unet, ["default"])
    assert not lora_layers(unet) and not hasattr(unet, "peft_config") and torch.equal(output(unet), plain)


def test_fresh_lora_depends_on_its_generator_and_on_nothing_else(unet):
    def draw(seed):
        return fresh_lora(unet, FEW_MODULES, rank=2, generator=torch.Generator().manual_seed(seed)).tensors

    state = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    add_lora(unet, FEW_MODULES, rank=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key], tensor) for key, tensor in lora_state_dict(unet).items())
    assert not any(torch.equal(first[key], other[key]) for key in first if ".lora_A." in key)


def test_lora_is_w_plus_scaled_b_a(unet):
    """Against the definition, on a linear layer and on a convolution."""
    add_lora(unet, FEW_MODULES, rank=3, alpha=6)
    randomise_lora(unet)
    tensors = lora_state_dict(unet)
    for name, x in (
        ("transformer_in.proj_in", torch.randn(2, 5, 8)),
        ("mid_block.resnets.0.conv1", torch.randn(2, 16, 4, 4)),
    ):
        layer = lora_layers(unet)[name]
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        base = layer.get_base_layer()
        delta = 2.0 * torch.tensordot(up.flatten(1), down, dims=1)
        with torch.no_grad():
            if delta.ndim == 2:
                expected = torch.nn.functional.linear(x, base.weight + delta, base.bias)
            else:
                expected = torch.nn.functional.conv2d(x, base.weight + delta, base.bias, padding=1)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_lora_disabled_is_the_base_bit_for_bit(unet):
    before = output(unet)
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    randomise_lora(unet)
    adapted = output(unet)
    assert not torch.allclose(adapted, before)
    with pytest.raises(RuntimeError, match="inside"):
        with lora_disabled(unet):
            assert torch.equal(output(unet), before)
            assert any(parameter.requires_grad for parameter in unet.parameters())
            raise RuntimeError("inside")
    assert torch.equal(output(unet), adapted)


def test_set_lora_state_dict_takes_exactly_its_own_keys(unet):
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    saved = {key: torch.randn_like(tensor) for key, tensor in lora_state_dict(unet).items()}
    set_lora_state_dict(unet, saved)
    assert all(torch.equal(saved[key], tensor) for key, tensor in lora_state_dict(unet).items())
    key = next(iter(saved))
    with pytest.raises(ValueError, match="1 LoRA tensors differ in name or shape"):
        set_lora_state_dict(unet, {k: v for k, v in saved.items() if k != key})
    with pytest.raises(ValueError, match="1 LoRA tensors differ in name or shape"):
        set_lora_state_dict(unet, saved | {key: saved[key][:1]})


def test_unknown_adapter(unet):
    with pytest.raises(ValueError, match="no adapter named 'mine' in the denoiser. Loaded: none"):
        lora_state_dict(unet, "mine")


# --- what does not fit -----------------------------------------------------------------------------------------------
def assert_untouched(unet):
    assert not lora_layers(unet) and not hasattr(unet, "peft_config")


def test_keys_that_match_nothing_or_in_part(folder, unet):
    lora = read_lora(folder)
    count = len(lora.modules)
    everything = LoRA({f"elsewhere.{key}": tensor for key, tensor in lora.tensors.items()}, source="mine")
    with pytest.raises(
        ValueError, match=rf"mine does not fit.*{count} of its {count} modules do not exist.*elsewhere"
    ):
        load_lora_into(unet, everything)
    lora.tensors["mid_block.motion.proj.lora_A.weight"] = torch.zeros(4, 8)
    with pytest.raises(
        ValueError, match=rf"1 of its {count + 1} modules do not exist there, such as 'mid_block.motion"
    ):
        load_lora_into(unet, lora)
    assert_untouched(unet)


def test_another_width(folder):
    wide = tiny_unet(block_out_channels=(8, 32))
    with pytest.raises(ValueError, match=r"has a weight of shape \(.*made for another base model"):
        check_fits(wide, read_lora(folder))


def test_a_module_that_takes_no_lora(unet):
    lora = LoRA({"conv_norm_out.lora_A.weight": torch.zeros(2, 8), "conv_norm_out.lora_B.weight": torch.zeros(8, 2)})
    with pytest.raises(ValueError, match="conv_norm_out is a GroupNorm, which takes no LoRA"):
        load_lora_into(unet, lora)


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a\\b"])
def test_bad_adapter_names(folder, unet, name):
    with pytest.raises(ValueError, match="must not be empty or contain a dot or slash"):
        load_lora_into(unet, read_lora(folder), name)


def test_an_adapter_name_twice(folder, unet):
    load_lora_into(unet, read_lora(folder), "a")
    with pytest.raises(ValueError, match="An adapter named 'a' is loaded already"):
        load_lora_into(unet, read_lora(folder), "a")


def test_targets_that_do_not_exist(unet):
    with pytest.raises(ValueError, match="modules that do not exist: .'nowhere'"):
        add_lora(unet, ["nowhere"])
    with pytest.raises(ValueError, match="none were named"):
        add_lora(unet, [])


@pytest.mark.parametrize("alpha", [2, 6])
def test_fused_is_the_adapted_network_and_leaves_it_alone(alpha):
    unet = tiny_unet().requires_grad_(False)
    add_lora(unet, MODELSCOPE.lora_target_modules(unet), rank=2, alpha=alpha)
    randomise_lora(unet)
    unet.double()
    adapted, call = output(unet), fused(unet)
    torch.testing.assert_close(output(call), adapted, **EXACT)
    assert torch.equal(output(unet), adapted)
    for tensor in lora_state_dict(unet).values():
        tensor.zero_()
    assert not torch.allclose(output(unet), adapted, atol=1e-3)
    torch.testing.assert_close(output(call), adapted, **EXACT)  # the sums were made once
