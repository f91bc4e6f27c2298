"""AnimateDiff's pipeline against diffusers' own, and what that offers besides."""

import contextlib
import copy
import inspect

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler
from diffusers.utils import export_to_gif
from PIL import Image

from diffusers_mcm import AnimateDiffMCMPipeline, MCMScheduler
from diffusers_mcm.lora import LoRA, fresh_lora
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    EXACT,
    NUM_FRAMES,
    SIZE,
    TEXT_DIM,
    tiny_animatediff_components,
    tiny_motion_adapter,
)

PROMPT = "a red ring"
DDIM = dict(ANIMATEDIFF_SCHEDULER, clip_sample=False, steps_offset=1)
GUIDED = dict(guidance_scale=7.5, negative_prompt="a blue square")


@pytest.fixture
def pipe():
    pipe = AnimateDiffMCMPipeline(
        **tiny_animatediff_components() | dict(scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER))
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float64)


@pytest.fixture
def both():
    """Our pipeline and diffusers', each with networks of its own, on DDIM."""
    ours = AnimateDiffMCMPipeline(**tiny_animatediff_components())
    stock = AnimateDiffPipeline(**tiny_animatediff_components(), motion_adapter=tiny_motion_adapter())
    for pipe in (ours, stock):
        pipe.scheduler = DDIMScheduler(**DDIM)
        pipe.set_progress_bar_config(disable=True)
        for network in (pipe.unet, pipe.text_encoder):
            network.requires_grad_(False)  # which decides torch's choice of a matrix product
        pipe.to(dtype=torch.float64)
    return ours, stock


def sample(pipe, prompt=PROMPT, **options):
    size = dict(num_frames=NUM_FRAMES, height=SIZE, width=SIZE, num_inference_steps=2, guidance_scale=1.0)
    options = dict(size, output_type="latent") | options
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **options).frames


def assert_same(both, equal=True, **options):
    ours, stock = (sample(pipe, **options) for pipe in both)
    if equal:
        assert torch.equal(ours, stock)
    else:
        close = EXACT if stock.dtype == torch.float64 else dict(rtol=1e-6, atol=1e-6)  # diffusers' pixels are float32
        torch.testing.assert_close(ours.to(stock.dtype), stock, **close)


def give_ip_adapter(pipe):
    """A random IP-Adapter in the UNet."""
    generator, state = torch.Generator().manual_seed(0), {}
    attention = [name for name in pipe.unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    for i, name in enumerate(attention):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for half in "kv":
            key = f"{2 * i + 1}.to_{half}_ip.weight"
            state[key] = torch.randn(width, TEXT_DIM, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * TEXT_DIM, 8, generator=generator),
        "proj.bias": torch.zeros(4 * TEXT_DIM),
        "norm.weight": torch.ones(TEXT_DIM),
        "norm.bias": torch.zeros(TEXT_DIM),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])


# --- the same as diffusers' pipeline ---------------------------------------------------------------------------------
def test_latents_are_those_of_diffusers(both):
    assert_same(both)
    assert_same(both, **GUIDED)
    assert_same(both, guidance_scale=3.0, prompt=[PROMPT, "a green ring"], negative_prompt=["", "dull"])
    assert_same(both, eta=0.7)
    assert_same(both, equal=False, output_type="pt", **GUIDED)


def test_ours_with_the_mcm_scheduler_in_diffusers_pipeline(both):
    for pipe in both:
        pipe.scheduler = MCMScheduler(**ANIMATEDIFF_SCHEDULER)
    assert_same(both, num_inference_steps=4)


def test_four_steps_and_no_guidance_unless_told_otherwise(pipe):
    batches = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    frames = pipe(PROMPT, num_frames=2, output_type="np").frames
    sample(pipe, **GUIDED)
    handle.remove()
    assert batches == [1, 1, 1, 1, 2, 2]
    assert frames.shape == (1, 2, SIZE, SIZE, 3)


def test_several_videos_for_a_prompt(pipe):
    """diffusers makes one, whatever is asked for."""
    latents = torch.randn(2, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=1)
    pair = sample(pipe, num_videos_per_prompt=2, latents=latents, **options)
    for i in range(2):
        alone = sample(pipe, latents=latents[i : i + 1], **options)
        torch.testing.assert_close(pair[i : i + 1], alone, **EXACT)


# --- the same arguments ----------------------------------------------------------------------------------------------
def arguments(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]


STEPS = ("encode_prompt", "check_inputs", "prepare_latents", "decode_latents")
OURS = {"timesteps", "lora_scale", "num_frames"}  # what a call, or a step of it, takes besides


@pytest.mark.parametrize("name", ["__call__", *STEPS])
def test_animatediff_takes_its_parents_arguments_in_their_order(name):
    theirs = arguments(getattr(AnimateDiffPipeline, name))
    ours = arguments(getattr(AnimateDiffMCMPipeline, name))
    assert ours[: len(theirs)] == theirs and set(ours[len(theirs) :]) <= OURS


def test_pictures_by_default_as_in_diffusers(pipe, tmp_path):
    theirs, ours = (inspect.signature(each.__call__) for each in (AnimateDiffPipeline, AnimateDiffMCMPipeline))
    assert ours.parameters["output_type"].default == theirs.parameters["output_type"].default == "pil"
    export_to_gif(pipe(PROMPT, 3, num_inference_steps=1).frames[0], str(tmp_path / "ring.gif"))
    with Image.open(tmp_path / "ring.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (SIZE, SIZE)


def test_encode_prompt_is_diffusers(both):
    for guided in (False, True):
        options = ([PROMPT, "a blue square"], "cpu", 2, guided, ["", "dull"])
        ours, theirs = (each.encode_prompt(*options) for each in both)
        assert torch.equal(ours[0], theirs[0]) and len(ours[0]) == 4
        assert torch.equal(ours[1], theirs[1]) if guided else ours[1] is theirs[1] is None


# --- what diffusers' pipeline offers besides -------------------------------------------------------------------------


def test_free_init(both):
    for pipe in both:
        pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    assert_same(both)


def test_free_u_and_textual_inversion(both):
    for pipe in both:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        pipe.load_textual_inversion({"<style>": torch.ones(2, TEXT_DIM)})
    assert_same(both, prompt="a red <style> ring")
    assert not torch.equal(sample(both[0], prompt="a red <style> ring"), sample(both[0], prompt="a red ring"))


def test_nothing_of_a_call_stays_on_the_pipeline(pipe):
    give_ip_adapter(pipe)
    picture = torch.randn(1, 1, 8).double()
    before, seen = set(vars(pipe)), []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline.clip_skip, set(pipeline.cross_attention_kwargs)))

    masks = {"ip_adapter_masks": [torch.ones(1, 1, SIZE, SIZE)]}
    options = dict(eta=0.5, clip_skip=1, cross_attention_kwargs=masks, callback_on_step_end=callback)
    sample(pipe, ip_adapter_image_embeds=[picture], **options)
    assert seen == [(1, {"ip_adapter_masks"})] * 2  # diffusers' properties tell a callback what is asked for
    assert pipe.clip_skip is None and pipe.cross_attention_kwargs is None
    kept = {name: value for name, value in vars(pipe).items() if name not in before}
    assert not any(value is not None for value in kept.values())


def test_a_call_that_fails_leaves_the_next_as_it_was(pipe):
    plain = sample(pipe)

    def callback(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        sample(pipe, clip_skip=1, callback_on_step_end=callback, **GUIDED)
    assert pipe.clip_skip is None
    assert torch.equal(sample(pipe), plain) and torch.equal(sample(copy.deepcopy(pipe)), plain)


# --- motion LoRAs ----------------------------------------------------------------------------------------------------
def random_lora(network, targets, seed=0, rank=2, alpha=2.0) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    lora = fresh_lora(network, targets, rank=rank, alpha=alpha, generator=generator)
    for tensor in lora.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return lora


def test_a_motion_lora_as_on_the_hub(both, tmp_path):
    from safetensors.torch import save_file

    ours, stock = both
    targets = [name for name in ours.base_model.lora_target_modules(ours.unet) if name.endswith(("to_q", "to_v"))]
    lora = random_lora(ours.unet, [name for name in targets if "motion_modules" in name])
    tensors = {
        f"unet.{key}".replace(".to_", ".processor.to_")
        .replace(".lora_A.", "_lora.down.")
        .replace(".lora_B.", "_lora.up."): tensor
        for key, tensor in lora.tensors.items()
    }
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    halves = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(halves, tmp_path / "diffusion_pytorch_model.fp16.safetensors")  # a variant makes no choice needed
    plain = sample(ours)
    for pipe in both:
        pipe.load_lora_weights(tmp_path, adapter_name="zoom-out")
        pipe.set_adapters(["zoom-out"], [0.6])
    assert not torch.allclose(sample(ours), plain)
    assert_same(both, equal=False)
