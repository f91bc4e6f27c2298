"""What others do to a network, and a LoRA in it: it acts, or is refused before anything is sampled."""

import pytest
import torch
from diffusers import AnimateDiffPipeline, PNDMScheduler, StableDiffusionPipeline

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler
from diffusers_mcm.lora import LoRA, lora_layers
from tests.lora.test_components import SPATIAL, make, sample
from tests.pipelines.test_animatediff import random_lora
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    SCHEDULER,
    save_tiny_base,
    save_tiny_stable_diffusion,
    tiny_components,
    tiny_image_unet,
    tiny_motion_adapter,
    tiny_unet,
)

QUERY = SPATIAL[0]
# Products of matrices that were joined, or compiled, add up in another order: float32 on values of about 1.
CLOSE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture
def pipe():
    return make(AnimateDiffMCMPipeline)


@pytest.fixture(scope="module")
def lora():
    unet = make(AnimateDiffMCMPipeline).unet
    motion = [name for name, _ in unet.named_modules() if name.endswith("motion_modules.0.proj_in")]
    return LoRA(random_lora(unet, [*SPATIAL, motion[0]], seed=1).tensors)


# --- fused projections -----------------------------------------------------------------------------------------------
def test_projections_are_fused_with_the_lora_in_them_or_not_at_all(pipe, lora):
    pipe.load_lora_weights(lora, "a")
    full = sample(pipe)
    with pytest.raises(ValueError, match="while a LoRA lies on them.*`fuse_lora..` first, or unload it"):
        pipe.fuse_qkv_projections()
    pipe.fuse_lora()
    pipe.fuse_qkv_projections()
    torch.testing.assert_close(sample(pipe), full, **CLOSE)
    for verb in (pipe.unfuse_lora, pipe.unload_lora_weights):
        with pytest.raises(ValueError, match="Cannot take the LoRA out while .* `unfuse_qkv_projections..` first"):
            verb()
    pipe.unfuse_qkv_projections()
    pipe.unload_lora_weights()
    assert not lora_layers(pipe.unet)


def test_a_lora_on_projections_that_are_not_called(pipe, lora):
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="Cannot load a LoRA while the attention's projections are fused"):
        pipe.load_lora_weights(lora, "a")
    assert pipe.get_list_adapters() == {}
    plain = sample(pipe)
    pipe.load_lora_weights(random_lora(pipe.unet, SPATIAL[1:]), "elsewhere")  # on modules that are
    assert not torch.allclose(sample(pipe), plain, rtol=1e-2)
    pipe.unload_lora_weights()
    pipe.unet.unfuse_qkv_projections()
    pipe.load_lora_weights(lora, "a")
    pipe.unet.fuse_qkv_projections()  # the network's own method, which asks nobody
    for verb in (lambda: sample(pipe), pipe.fuse_lora):
        with pytest.raises(ValueError, match=rf"such as '{QUERY}'. `unfuse_qkv_projections"):
            verb()
    pipe.disable_lora()
    torch.testing.assert_close(sample(pipe), plain, **CLOSE)


# --- weights in eight bits -------------------------------------------------------------------------------------------
def test_a_lora_on_weights_that_are_cast_layer_by_layer(pipe, lora):
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float64)
    plain = sample(pipe)
    pipe.load_lora_weights(lora, "a")
    after = sample(pipe)
    assert {layer.lora_A["a"].weight.dtype for layer in lora_layers(pipe.unet).values()} == {torch.float64}
    with pytest.raises(ValueError, match="Cannot fuse a LoRA into weights of torch.float8_e4m3fn"):
        pipe.fuse_lora()
    before = make(AnimateDiffMCMPipeline)
    before.load_lora_weights(lora, "a")
    before.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float64)
    torch.testing.assert_close(sample(before), after, **CLOSE)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain) and not torch.allclose(after, plain, rtol=1e-2)


def test_a_fused_lora_comes_out_of_weights_that_were_cast_since(pipe, lora):
    pipe.load_lora_weights(lora, "a")
    pipe.fuse_lora()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float64)
    pipe.unfuse_lora()
    expected = make(AnimateDiffMCMPipeline)
    expected.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float64)
    expected.load_lora_weights(lora, "a")
    torch.testing.assert_close(sample(pipe), sample(expected), **CLOSE)


# --- compiled --------------------------------------------------------------------------------------------------------
def every_verb(pipe, lora, compile_it):
    """Each verb acts on a network that was compiled, and run, before."""
    plain = sample(pipe)
    pipe.load_lora_weights(lora, "a")
    full = sample(pipe)
    pipe.unload_lora_weights()
    compile_it()
    torch.testing.assert_close(sample(pipe), plain, **CLOSE)
    pipe.load_lora_weights(lora, "a")
    torch.testing.assert_close(sample(pipe), full, **CLOSE)
    assert not torch.allclose(full, plain, rtol=1e-2)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), full, **CLOSE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), plain, **CLOSE)


def test_every_verb_with_compile_around_the_network(pipe, lora):
    """What is around it, that is; tracing the whole of it takes long, and is the next test's for a part."""

    def compile_it():
        pipe.unet = torch.compile(pipe.unet, backend="eager")

    with torch.compiler.set_stance("force_eager"):
        every_verb(pipe, lora, compile_it)


def test_every_verb_on_a_component_that_was_traced(pipe):
    torch._dynamo.reset()  # or it gives up tracing code that other tests have traced too often
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    lora = random_lora(pipe.unet, ["mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2"])
    every_verb(pipe, lora, lambda: [resnet.compile(backend=backend) for resnet in pipe.unet.mid_block.resnets])
    assert len(calls) >= 2  # traced anew with the LoRA in it


def test_a_component_that_is_wrapped(pipe, lora):
    pipe.unet.down_blocks[0] = torch.compile(pipe.unet.down_blocks[0], backend="eager")
    with pytest.raises(
        ValueError, match="while 'down_blocks.0' of this UNetMotionModel is wrapped by `torch.compile`"
    ):
        pipe.load_lora_weights(lora)
    with pytest.raises(
        ValueError, match="is wrapped by `torch.compile`: load the LoRA before, or compile the module in"
    ):
        pipe.load_lora_weights({f"unet.{key}": tensor for key, tensor in lora.tensors.items()})


# --- other pipelines -------------------------------------------------------------------------------------------------
def stable_diffusion():
    scheduler = PNDMScheduler(**SCHEDULER, skip_prk_steps=True, steps_offset=1)
    components = tiny_components() | dict(unet=tiny_image_unet(), scheduler=scheduler)
    extra = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**components, **extra)


def test_from_a_stable_diffusion_pipeline(tmp_path):
    save_tiny_stable_diffusion(tmp_path / "sd")
    expected = MCMPipeline.from_pretrained(tmp_path / "sd", motion_adapter=tiny_motion_adapter())
    image = stable_diffusion()
    pipe = AnimateDiffMCMPipeline.from_pipe(image, motion_adapter=tiny_motion_adapter())
    assert isinstance(pipe.scheduler, MCMScheduler) and pipe.scheduler.config.beta_schedule == "linear"
    assert image.scheduler.config.beta_schedule == "scaled_linear" and pipe.vae is image.vae
    expected.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sample(pipe), sample(expected))
    own = MCMScheduler(**SCHEDULER)
    assert (
        AnimateDiffMCMPipeline.from_pipe(image, motion_adapter=tiny_motion_adapter(), scheduler=own).scheduler is own
    )
    image.load_lora_weights({f"unet.{k}": v for k, v in random_lora(image.unet, [QUERY]).tensors.items()})
    with pytest.raises(ValueError, match="A LoRA is loaded in the Stable Diffusion pipeline: `unload_lora_weights"):
        AnimateDiffMCMPipeline.from_pipe(image, motion_adapter=tiny_motion_adapter())


def test_to_and_from_diffusers_own_animatediff(pipe, lora):
    pipe.load_lora_weights(lora, "a")
    stock = AnimateDiffPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(stock), sample(pipe), **CLOSE)
    again = AnimateDiffMCMPipeline.from_pipe(stock)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler is pipe.scheduler and torch.equal(sample(again), sample(pipe))
    with pytest.raises(ValueError):  # a video network makes no pictures, and diffusers does not hand it on
        StableDiffusionPipeline.from_pipe(pipe)
    stock.fuse_lora()
    with pytest.raises(ValueError, match="A LoRA is fused into the weights .* by another pipeline"):
        AnimateDiffMCMPipeline.from_pipe(stock)


def test_an_image_models_betas_are_told_of(caplog):
    components = tiny_components() | dict(unet=tiny_image_unet(), motion_adapter=tiny_motion_adapter())
    AnimateDiffMCMPipeline(**components)
    assert "scaled_linear betas" in caplog.text and 'beta_schedule="linear"' in caplog.text
    caplog.clear()
    stock = AnimateDiffPipeline(**components)  # its UNet has motion modules by now
    pipe = AnimateDiffMCMPipeline.from_pipe(stock)
    assert "scaled_linear betas" in caplog.text
    caplog.clear()
    AnimateDiffMCMPipeline.from_pipe(stock, scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER))
    assert "betas" not in caplog.text and pipe.scheduler is stock.scheduler


# --- inpainting ------------------------------------------------------------------------------------------------------
def test_a_network_for_inpainting_is_refused(tmp_path):
    what = "takes 9 channels, the latents have 4: it is one for inpainting"
    save_tiny_stable_diffusion(tmp_path / "sd", unet=tiny_image_unet(in_channels=9))
    with pytest.raises(ValueError, match=what):
        MCMPipeline.from_pretrained(tmp_path / "sd", motion_adapter=tiny_motion_adapter())
    save_tiny_base(tmp_path / "ms", unet=tiny_unet(in_channels=9))
    with pytest.raises(ValueError, match=what):
        MCMPipeline.from_pretrained(tmp_path / "ms")
