"""AnimateDiff's pipeline against diffusers' own, and what that offers besides."""

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler

from diffusers_mcm import AnimateDiffMCMPipeline, MCMScheduler
from diffusers_mcm.lora import LoRA, fresh_lora, lora_layers
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    EXACT,
    NUM_FRAMES,
    SIZE,
    TEXT_DIM,
    tiny_animatediff_components,
    tiny_motion_adapter,
    tiny_text_encoder,
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
    frames = pipe(PROMPT, num_frames=2).frames
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


# --- what diffusers' pipeline offers besides -------------------------------------------------------------------------
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


def test_ip_adapter(both, tmp_path):
    ours = both[0]
    plain = sample(ours)
    for pipe in both:
        give_ip_adapter(pipe)
    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    assert_same(both, ip_adapter_image_embeds=[picture])
    assert_same(both, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(picture), picture])], **GUIDED)
    assert not torch.allclose(sample(ours, ip_adapter_image_embeds=[picture]), plain)
    mask = {"ip_adapter_masks": [torch.zeros(1, 1, SIZE, SIZE)]}
    masked = sample(ours, ip_adapter_image_embeds=[picture], cross_attention_kwargs=mask)
    torch.testing.assert_close(masked, plain, **EXACT)
    with pytest.raises(ValueError, match="An IP-Adapter and a picture go together: give `ip_adapter_image`"):
        sample(ours)
    with pytest.raises(ValueError, match="An IP-Adapter cannot be saved with the pipeline; `unload_ip_adapter"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="either `ip_adapter_image` or `ip_adapter_image_embeds`"):
        sample(ours, ip_adapter_image=torch.zeros(1, 3, 8, 8), ip_adapter_image_embeds=[picture])


def test_a_picture_without_an_ip_adapter(pipe):
    with pytest.raises(ValueError, match="go together: a picture was given, but no IP-Adapter is loaded"):
        sample(pipe, ip_adapter_image_embeds=[torch.zeros(1, 1, 8)])


def test_free_noise(both):
    for pipe in both:
        pipe.enable_free_noise(context_length=4, context_stride=2)
    long = dict(num_frames=10, num_inference_steps=1)
    assert_same(both, equal=False, **long)
    assert_same(both, equal=False, prompt={0: PROMPT, 6: "a blue square"}, **long, **GUIDED)
    assert_same(both, equal=False, prompt={0: PROMPT, 9: "a blue square"}, **long)
    ours, pair = both[0], [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    latents = ours([PROMPT] * 2, generator=pair, output_type="latent", height=SIZE, width=SIZE, **long).frames
    torch.testing.assert_close(latents[:1], sample(ours, **long), **EXACT)
    with pytest.raises(ValueError, match="text for frame 12 of a clip of 10"):
        sample(ours, prompt={0: PROMPT, 12: "a blue square"}, **long)
    with pytest.raises(ValueError, match="must name a text for frame 0"):
        sample(ours, prompt={1: PROMPT}, **long)


def test_free_noise_around_a_lora(pipe):
    plain = sample(pipe)
    targets = [
        name for name in pipe.base_model.lora_target_modules(pipe.unet) if "up_blocks.1.motion_modules.0" in name
    ]
    pipe.load_lora_weights(random_lora(pipe.unet, targets), "mcm")
    pipe.set_adapters("mcm", 0.7)
    before = sample(pipe)
    pipe.fuse_lora()
    fused = sample(pipe)
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert type(pipe.unet.mid_block.motion_modules[0].transformer_blocks[0]).__name__ == "FreeNoiseTransformerBlock"
    torch.testing.assert_close(sample(pipe), fused, **EXACT)
    assert sample(pipe, num_frames=10).shape[2] == 10
    pipe.unfuse_lora()
    pipe.disable_free_noise()
    assert torch.equal(sample(pipe), before)
    pipe.unload_lora_weights()
    assert not lora_layers(pipe.unet) and torch.equal(sample(pipe), plain)
    with pytest.raises(ValueError, match="`prompt` may be a dictionary of frames only after `enable_free_noise"):
        sample(pipe, prompt={0: PROMPT})


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


def test_clip_skip_is_a_text_encoder_without_its_last_layers(pipe):
    skipped = sample(pipe, clip_skip=1)
    short = tiny_text_encoder().double()
    del short.encoder.layers[1:]
    pipe.text_encoder = short
    torch.testing.assert_close(sample(pipe), skipped, **EXACT)


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
