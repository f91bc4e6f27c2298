"""A LoRA that is fused: the same to rounding, and exactly undone."""

import copy

import pytest
import torch

from diffusers_mcm import ModelScopeMCMPipeline
from diffusers_mcm.lora import lora_layers
from tests.pipelines import test_adapters
from tests.pipelines.test_adapters import for_the_text_encoder, make_pipe, sample, some_lora
from tests.tiny import EXACT, FEW_MODULES, NUM_FRAMES

plain, pipe = test_adapters.plain, test_adapters.pipe


@pytest.mark.parametrize("lora_scale", [1.0, 0.4])
def test_fusing_is_the_lora_to_rounding_and_unfusing_is_exact(pipe, plain, lora_scale):
    modules = {name: type(module) for name, module in pipe.unet.named_modules()}
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.set_adapters("a", 0.8)
    adapted = sample(pipe)
    pipe.fuse_lora(lora_scale=lora_scale)
    # the point of fusing: what runs is the base model's own
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == modules
    fused = sample(pipe)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), adapted)
    torch.testing.assert_close(fused, sample(pipe, lora_scale=lora_scale), **EXACT)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


def test_fusing_one_of_two(pipe):
    pipe.load_lora_weights(some_lora(pipe, 1), "a")
    pipe.load_lora_weights(some_lora(pipe, 2), "b")
    pipe.set_adapters("b")
    expected = sample(pipe)
    pipe.set_adapters("a")
    adapted = sample(pipe)
    pipe.fuse_lora("b")
    assert pipe.get_active_adapters() == ["b"]
    torch.testing.assert_close(sample(pipe), expected, **EXACT)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), adapted)


def only(lora, modules):
    """The LoRA's part on these modules."""
    lora.tensors = {key: tensor for key, tensor in lora.tensors.items() if key.startswith(tuple(modules))}
    return lora


def test_what_is_not_fused_is_off_where_nothing_is_fused_too(pipe):
    pipe.load_lora_weights(only(some_lora(pipe, 1), FEW_MODULES[:2]), "a")
    alone = sample(pipe)
    pipe.load_lora_weights(only(some_lora(pipe, 2), FEW_MODULES[1:]), "b")
    both = sample(pipe)
    pipe.fuse_lora("a")
    assert pipe.get_active_adapters() == ["a"]
    torch.testing.assert_close(sample(pipe), alone, **EXACT)
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["a", "b"] and torch.equal(sample(pipe), both)


def test_fusing_that_is_broken_off_leaves_nothing_behind(pipe, plain, monkeypatch):
    pipe.load_lora_weights(some_lora(pipe), "a")
    adapted = sample(pipe)

    def out_of_memory(**_):
        raise torch.OutOfMemoryError("no memory left")

    last = list(lora_layers(pipe.unet).values())[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "merge", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.fuse_lora()
    assert pipe.num_fused_loras == 0 and torch.equal(sample(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


def test_unfusing_in_half_precision_is_exact_too(pipe):
    pipe.to(dtype=torch.bfloat16)
    weight = pipe.unet.transformer_in.proj_in.weight.clone()
    pipe.load_lora_weights(some_lora(pipe))
    pipe.fuse_lora()
    assert not torch.equal(pipe.unet.transformer_in.proj_in.weight, weight)
    pipe.unfuse_lora()
    assert torch.equal(pipe.unet.transformer_in.proj_in.base_layer.weight, weight)


def test_a_fused_pipeline_may_move_before_it_is_unfused(pipe):
    pipe.load_lora_weights(some_lora(pipe))
    pipe.fuse_lora()
    pipe.to(dtype=torch.bfloat16)
    pipe.unfuse_lora()
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}
    assert len(lora_layers(pipe.unet)) > 0 and sample(pipe) is not None


def test_while_fused_nothing_is_silently_ignored(pipe):
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.fuse_lora()
    for change in (
        lambda: sample(pipe, lora_scale=0.5),
        lambda: pipe.set_adapters("a", 0.5),
        lambda: pipe.load_lora_weights(some_lora(pipe), "b"),
        lambda: pipe.delete_adapters("a"),
        pipe.disable_lora,
        pipe.fuse_lora,
    ):
        with pytest.raises(ValueError, match=r"while a LoRA \(a\) is fused into the weights; `unfuse_lora\(\)` first"):
            change()


# --- networks that pipelines share -----------------------------------------------------------------------------------
ELSEWHERE = "A LoRA is fused into the weights of this {} by another pipeline .* `unfuse_lora..` there first"


def fused_into_both(pipe):
    """A pipeline with a LoRA in its denoiser and in its text encoder."""
    both = {f"unet.{key}": tensor for key, tensor in some_lora(pipe).tensors.items()} | for_the_text_encoder(pipe)
    pipe.load_lora_weights(both, "style")
    pipe.fuse_lora()
    return pipe


def test_a_fused_lora_in_a_shared_network_is_noticed(pipe, plain):
    """Either network for itself carries a part of it; together they have the state to take it out."""
    fused = fused_into_both(pipe)
    for name, own in (("text_encoder", "CLIPTextModel"), ("unet", "UNet3DConditionModel")):
        fresh = make_pipe()
        with pytest.raises(ValueError, match=ELSEWHERE.format(own)):
            ModelScopeMCMPipeline(**fresh.components | {name: fused.components[name]})
    both = ModelScopeMCMPipeline(**fused.components, num_frames=NUM_FRAMES)
    assert both.fused_loras == {"style"} and torch.equal(sample(both), sample(fused))
    both.unload_lora_weights()
    assert torch.equal(sample(fused), plain)
    ModelScopeMCMPipeline(**make_pipe().components | {"text_encoder": fused.text_encoder})  # is free again


def test_a_fused_lora_in_a_network_beside_one_that_was_exchanged_is_noticed(pipe, tmp_path):
    encoder = fused_into_both(pipe).text_encoder
    pipe.text_encoder = make_pipe().text_encoder
    with pytest.raises(ValueError, match=ELSEWHERE.format("UNet3DConditionModel")):
        pipe.unfuse_lora()
    pipe.unet, pipe.text_encoder = make_pipe().unet, encoder
    for verb in (lambda: pipe.load_lora_weights(some_lora(pipe)), lambda: pipe.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=ELSEWHERE.format("CLIPTextModel")):
            verb()
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_fused_pipeline_stands_for_itself(pipe, plain):
    copied = copy.deepcopy(fused_into_both(pipe))
    copied.unload_lora_weights()
    assert torch.equal(sample(copied), plain)
    assert pipe.fused_loras == {"style"} and not torch.equal(sample(pipe), plain)


# --- what cannot be fused --------------------------------------------------------------------------------------------
def test_a_broken_lora_is_not_fused(pipe, plain):
    lora = some_lora(pipe)
    lora.tensors[f"{FEW_MODULES[-1]}.lora_B.weight"].fill_(float("nan"))
    pipe.load_lora_weights(lora, "a")
    with pytest.raises(ValueError, match="NaNs detected.*a seems to be broken"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


def test_nothing_to_fuse(pipe):
    with pytest.raises(ValueError, match="no active LoRA to fuse"):
        pipe.fuse_lora()
    pipe.load_lora_weights(some_lora(pipe), "a")
    pipe.disable_lora()
    with pytest.raises(ValueError, match="no active LoRA to fuse"):
        pipe.fuse_lora("a")
