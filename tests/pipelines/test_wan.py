"""`WanMCMPipeline` against diffusers' `WanPipeline` on the same tiny random components."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
)
from safetensors.torch import load_file

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, WanMCMPipeline, WanTI2VMCMPipeline, get_base_model
from diffusers_mcm.formats.description import describe
from diffusers_mcm.lora import WEIGHTS_NAME, add_lora
from tests.pipelines.hooks import record_calls
from tests.tiny import assert_close_in_parts_of_the_largest, randomise_lora, save_lora
from tests.tiny_wan import CHANNELS, NUM_FRAMES, SIZE, save_wan_base, tiny_wan_transformer, wan_components

WAN = get_base_model("wan")
ROUNDING = dict(rtol=0, atol=1e-6)  # of latents in float32; what a decoder of random weights makes of it is more

CLASSES = {"wan": WanMCMPipeline, "wan-ti2v": WanTI2VMCMPipeline}


@pytest.fixture(scope="module", params=["wan", "wan-ti2v"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    return {kind: save_wan_base(folder / kind, kind) for kind in CLASSES}


@pytest.fixture
def lora(bases, tmp_path):
    """A LoRA folder beside its base model, for a student of shift 3."""
    transformer = tiny_wan_transformer()
    add_lora(transformer, WAN.lora_target_modules(transformer), rank=2, alpha=2)
    randomise_lora(transformer)
    sampling = dict(fps=5, num_frames=5, height=SIZE, width=SIZE)
    options = dict(repository=bases["wan"], scheduler=MCMFlowScheduler(shift=3.0), sampling=sampling)
    return save_lora(tmp_path / "lora", transformer, WAN, **options)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    components = wan_components() | dict(scheduler=MCMFlowScheduler())
    return quiet(WanMCMPipeline(**components, height=SIZE, width=SIZE, num_frames=5))


def sample(pipe, **options):
    """Latents, unless something else is asked for."""
    options = dict(num_inference_steps=2, output_type="latent", height=SIZE, width=SIZE, num_frames=5) | options
    return quiet(pipe)("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


def start(kind, frames=3, batch=2):
    size = 4 if kind == "wan" else 2
    return torch.randn(batch, CHANNELS[kind], frames, size, size, generator=torch.Generator().manual_seed(0))


# --- as diffusers' own pipeline samples ------------------------------------------------------------------------------
def both(bases, kind, scheduler, steps, guidance_scale, output_type="latent", dtype=torch.float32):
    """Ours and theirs with one scheduler; noise is added from the global generator, for theirs cannot be told one."""
    pipe = quiet(MCMPipeline.from_pretrained(bases[kind], dtype=dtype))
    assert type(pipe) is CLASSES[kind]
    if scheduler is not None:
        pipe.scheduler = scheduler
    theirs = quiet(WanPipeline(**pipe.components, expand_timesteps=kind == "wan-ti2v"))
    options = dict(prompt=["a red ring", "a square"], height=SIZE, width=SIZE, num_frames=NUM_FRAMES)
    options |= dict(num_inference_steps=steps, guidance_scale=guidance_scale, latents=start(kind))
    if guidance_scale > 1:
        options["negative_prompt"] = ["a still", "red"]
    options["output_type"] = output_type
    torch.manual_seed(1)
    video = pipe(**options).frames
    torch.manual_seed(1)
    return video, theirs(**options).frames


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1.0), (4, 1.0), (2, 3.0)])
def test_our_scheduler_is_a_drop_in_for_diffusers_own_pipeline(bases, kind, steps, guidance_scale):
    # To TI2V theirs gives a timestep for each token: the same, but rounded otherwise, and guidance multiplies that.
    close = ROUNDING if kind == "wan" else dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(*both(bases, kind, None, steps, guidance_scale), **close)


def test_what_is_decoded_is_a_video_of_diffusers_own_pipeline(bases, kind):
    video, expected = both(bases, kind, None, 1, 1.0, output_type="pt")
    assert video.shape == (2, NUM_FRAMES, 3, SIZE, SIZE)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_diffusers_own_schedulers_and_guidance_sample_the_same(bases, kind, scheduler):
    """The networks in float64, where nothing of the way to round is seen; their latents are float32 at first."""
    latents, expected = both(bases, kind, scheduler, 3, 5.0, dtype=torch.float64)
    assert_close_in_parts_of_the_largest(latents.double(), expected.double())


def test_guidance_leads_away_from_wans_own_negative_prompt(bases, pipe):
    video = sample(pipe, guidance_scale=3.0)
    assert torch.equal(video, sample(pipe, guidance_scale=3.0, negative_prompt=WAN.negative_prompt))
    assert not torch.equal(video, sample(pipe, guidance_scale=3.0, negative_prompt=""))
    assert not torch.allclose(video, sample(pipe, guidance_scale=1.0))


def test_steps_without_fresh_noise(pipe):
    stochastic = sample(pipe, num_inference_steps=4)
    pipe.scheduler = MCMFlowScheduler.from_config(pipe.scheduler.config, stochastic=False)
    deterministic = sample(pipe, num_inference_steps=4)
    assert not torch.allclose(stochastic, deterministic)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # and so it does not shift once more

    def set_timesteps(steps, device, set_sigmas=pipe.scheduler.set_timesteps):
        set_sigmas(sigmas=[1.0, 0.9375, 5 / 6, 0.625], device=device)

    pipe.scheduler.set_timesteps = set_timesteps
    torch.testing.assert_close(sample(pipe, num_inference_steps=4), deterministic, rtol=0, atol=1e-5)


def test_timesteps_can_be_given(pipe):
    video = sample(pipe, num_inference_steps=4)
    given = sample(pipe, num_inference_steps=None, timesteps=[1000, 937.5, 2500 / 3, 625])
    torch.testing.assert_close(given, video, rtol=0, atol=1e-5)


def test_half_precision_networks_are_given_float32_latents_and_exact_times(bases, monkeypatch):
    pipe, given = MCMPipeline.from_pretrained(bases["wan"], dtype=torch.bfloat16), []
    original = WAN.denoise

    def denoise(denoiser, latents, timesteps, text):
        output = original(denoiser, latents, timesteps, text)
        given.append((denoiser.dtype, text["prompt_embeds"].dtype, latents.dtype, output.dtype, timesteps))
        return output

    monkeypatch.setattr(pipe.base_model, "denoise", denoise, raising=False)
    video = sample(pipe, num_inference_steps=4)
    assert {each[:4] for each in given} == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    times = torch.stack([each[4] for each in given])  # bfloat16 has no 937.5
    torch.testing.assert_close(times, torch.tensor([[1000.0], [937.5], [2500 / 3], [625.0]]))
    exact = sample(MCMPipeline.from_pretrained(bases["wan"]), num_inference_steps=4)
    assert 0 < (video.float() - exact).norm() / exact.norm() < 0.02


# --- loading and saving ----------------------------------------------------------------------------------------------
def test_a_lora_is_loaded_saved_and_fused(bases, lora, tmp_path):
    assert len(load_file(lora / WEIGHTS_NAME)) == 2 * 2 * 10  # both matrices of two blocks' ten projections
    assert all(key.startswith("transformer.blocks.") for key in load_file(lora / WEIGHTS_NAME))
    pipe = MCMPipeline.from_pretrained(lora)
    assert type(pipe) is WanMCMPipeline and pipe.get_list_adapters() == {"transformer": ["mcm"]}
    assert type(pipe.scheduler) is MCMFlowScheduler and pipe.scheduler.config.shift == 3.0
    assert [pipe.sampling_default(name) for name in ("fps", "num_frames")] == [5, 5]
    video = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any(".lora_" in key or ".base_layer." in key for key in weights)
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(sample(again), video) and again.scheduler.config.shift == 3.0
    pipe.save_mcm_lora(tmp_path / "again")
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "again", base_model=bases["wan"])), video)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), video, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), video)
    pipe.disable_lora()
    assert not torch.allclose(sample(pipe), video)
    pipe.unload_lora_weights()
    stock = MCMPipeline.from_pretrained(bases["wan"])
    assert stock.scheduler.config.shift == 5.0  # whatever the teacher is sampled with: 3
    stock.scheduler = pipe.scheduler
    assert torch.equal(sample(stock), sample(pipe))


def test_the_lora_does_the_same_in_diffusers_own_pipeline(bases, lora):
    pipe = quiet(MCMPipeline.from_pretrained(lora))
    theirs = quiet(WanPipeline.from_pretrained(bases["wan"]))
    theirs.scheduler = pipe.scheduler
    theirs.load_lora_weights(lora)
    options = dict(num_inference_steps=2, height=SIZE, width=SIZE, num_frames=5, output_type="latent")
    options["latents"] = start("wan", frames=2, batch=1)
    torch.manual_seed(1)
    video = pipe("a red ring", **options).frames
    torch.manual_seed(1)
    torch.testing.assert_close(video, theirs("a red ring", guidance_scale=1.0, **options).frames, **ROUNDING)


def test_a_saved_pipeline_knows_which_wan_it_is(bases, tmp_path):
    pipe = MCMPipeline.from_pretrained(bases["wan-ti2v"])
    pipe.save_pretrained(tmp_path / "saved")
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is WanTI2VMCMPipeline and again.sampling_default("fps") == 24
    assert torch.equal(sample(again), sample(pipe))
    made = WanTI2VMCMPipeline(**wan_components("wan-ti2v"))
    assert made.config.expand_timesteps is True and WanMCMPipeline(**wan_components()).config.expand_timesteps is False


def test_what_a_file_says_of_itself(lora):
    about = describe(lora)
    assert (about["base_model"], about["layout"], about["targets"]) == ("wan", "diffusers", 20)
    assert (about["modules"]["to_q"], about["modules"]["ffn.net.0.proj"], about["modules"]["ffn.net.2"]) == (4, 2, 2)
    settings = dict(num_inference_steps=4, num_frames=5, height=SIZE, width=SIZE, fps=5, guidance_scale=1.0)
    assert about["settings"] == settings | dict(shift=3.0, original_inference_steps=48)


# --- what saves time and memory --------------------------------------------------------------------------------------
def test_caches_are_told_the_timestep(pipe):
    """As diffusers' documentation has it."""
    expected = sample(pipe, guidance_scale=3.0, num_inference_steps=4)
    seen = []
    pyramid = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 1001),
        cross_attention_timestep_skip_range=(100, 1001),
        current_timestep_callback=lambda: seen.append(pipe.current_timestep) or pipe.current_timestep,
    )
    pipe.transformer.enable_cache(pyramid)
    assert not torch.allclose(sample(pipe, guidance_scale=3.0, num_inference_steps=4), expected)
    assert list(dict.fromkeys(map(float, seen))) == pipe.scheduler.timesteps.tolist() and pipe.current_timestep is None
    with pytest.raises(ZeroDivisionError):
        sample(pipe, callback_on_step_end=lambda *_: 1 // 0)
    assert pipe.current_timestep is None


def test_caches_keep_the_two_halves_of_guidance_apart(pipe):
    """With a threshold of 0 nothing is left out; with a high one, after a first step, all blocks but the first."""
    expected = sample(pipe, guidance_scale=3.0, num_inference_steps=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(sample(pipe, guidance_scale=3.0, num_inference_steps=4), expected, **ROUNDING)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached = sample(pipe, guidance_scale=3.0, num_inference_steps=4)
    assert not torch.allclose(cached, expected)
    theirs = quiet(WanPipeline(**pipe.components))
    options = dict(num_inference_steps=4, guidance_scale=3.0, negative_prompt=WAN.negative_prompt)
    options |= dict(
        output_type="latent", height=SIZE, width=SIZE, num_frames=5, latents=start("wan", frames=2, batch=1)
    )
    torch.manual_seed(1)
    video = pipe("a red ring", **options).frames
    torch.manual_seed(1)
    torch.testing.assert_close(video, theirs("a red ring", **options).frames, **ROUNDING)


def test_the_vae_decodes_in_tiles(pipe, monkeypatch):
    whole, tiles = sample(pipe, output_type="pt"), []
    pipe.vae.enable_tiling(16, 16, 8, 8)
    tiled_decode = AutoencoderKLWan.tiled_decode

    def counted(self, z, return_dict=True):
        tiles.append(z.shape)
        return tiled_decode(self, z, return_dict)

    monkeypatch.setattr(AutoencoderKLWan, "tiled_decode", counted)
    video = sample(pipe, output_type="pt")
    assert tiles == [(1, 16, 2, 4, 4)] and video.shape == whole.shape and not torch.equal(video, whole)


def test_hooks_run_for_every_component_in_the_order_of_the_offload(pipe):
    """Encoding and decoding go through the entrances that accelerate's hooks guard."""
    order = record_calls(pipe, "text_encoder", "transformer", "vae")
    sample(pipe, output_type="pt")
    assert order == ["text_encoder", "transformer", "transformer", "vae"]
    assert list(dict.fromkeys(order)) == pipe.model_cpu_offload_seq.split("->")


def test_sequential_offload_makes_the_same_video(pipe):
    """With every weight away until its layer runs, as `enable_sequential_cpu_offload` has it."""
    from accelerate import cpu_offload

    expected = sample(pipe, num_frames=1, output_type="pt")
    for name in ("text_encoder", "transformer", "vae"):
        cpu_offload(getattr(pipe, name), "cpu")
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert torch.equal(sample(pipe, num_frames=1, output_type="pt"), expected)


def test_a_text_encoder_that_was_loaded_without_its_embeddings_is_refused():
    components = wan_components()
    read = components["text_encoder"].encoder.embed_tokens
    read.weight = torch.nn.Parameter(read.weight.clone())
    WanMCMPipeline(**components)  # untied, but the same
    read.weight.data.zero_()
    with pytest.raises(ValueError, match="whose `encoder.embed_tokens` are its `shared` embeddings; got others. This"):
        WanMCMPipeline(**components)


# --- what a caller gives ---------------------------------------------------------------------------------------------
def test_another_number_of_frames_is_refused(pipe):
    with pytest.raises(ValueError, match="one more than a multiple of 4, such as 13 or 17; got 16"):
        pipe("a ring", num_frames=16)


def test_embeddings_that_a_caller_or_callback_gives(pipe):
    options = dict(num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    video = sample(pipe, guidance_scale=2.0)
    embeds, negative = pipe.encode_prompt("a red ring", do_classifier_free_guidance=True)

    def given(**texts):
        return pipe(generator=torch.Generator().manual_seed(0), **options, **texts).frames

    assert torch.equal(given(prompt_embeds=embeds, negative_prompt_embeds=negative), video)
    short = given(prompt_embeds=embeds[:, :20], negative_prompt_embeds=negative)  # there are zeros after the text
    assert torch.equal(short, video)
    with pytest.raises(ValueError, match=r"shape \(batch, length, 32\)"):
        given(prompt_embeds=embeds[..., :8])
    seen = []

    def shorter(pipe, i, t, tensors):
        seen.append(t)
        return {"prompt_embeds": tensors["prompt_embeds"][:, :8]}

    names = dict(callback_on_step_end=shorter, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    cut = given(prompt_embeds=embeds, negative_prompt_embeds=negative, **names)
    assert [float(t) for t in seen] == pytest.approx([1000.0, 2500 / 3]) and not torch.equal(cut, video)
