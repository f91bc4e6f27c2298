import copy
import logging

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from diffusers_mcm import MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from tests.tiny import EXACT, LATENT_CHANNELS, NUM_FRAMES, SCHEDULER, SIZE, TEXT_DIM, TEXT_LENGTH, tiny_components

PROMPT = "a red circle moving left on a black background"
LATENTS = (LATENT_CHANNELS, NUM_FRAMES, SIZE // 2, SIZE // 2)


@pytest.fixture(scope="module")
def components():
    return tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))


@pytest.fixture
def pipe(components):
    pipe = ModelScopeMCMPipeline(**components, num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.scheduler = MCMScheduler(**SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def exact_pipe(components):
    """In float64, with networks of its own."""
    pipe = ModelScopeMCMPipeline(**copy.deepcopy(components), num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, prompt=PROMPT, output_type="latent", **options):
    if "generator" not in options:
        options["generator"] = generator()
    return pipe(prompt, output_type=output_type, **options).frames


class Calls:
    """Counts the calls of a module and the size of their batches."""

    def __init__(self, module):
        self.batches = []
        self.handle = module.register_forward_pre_hook(lambda _, args: self.batches.append(len(args[0])))


# --- the loop --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loop_is_multistep_consistency_sampling(pipe, steps):
    """Written out with the bare components and diffusers' LCM scheduler."""
    tokens = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    scheduler = LCMScheduler(**SCHEDULER, timestep_scaling=4.0, clip_sample=False)
    scheduler.set_timesteps(steps)
    g = generator()
    with torch.no_grad():
        embeds = pipe.text_encoder(tokens)[0]
        x = torch.randn(1, *LATENTS, generator=g)
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, embeds).sample, t, x, generator=g).prev_sample
        frames = [pipe.vae.decode(x[:, :, i] / pipe.vae.config.scaling_factor).sample[0] for i in range(NUM_FRAMES)]
    assert torch.equal(sample(pipe, num_inference_steps=steps), x)
    expected = (torch.stack(frames) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(sample(pipe, num_inference_steps=steps, output_type="pt")[0], expected)


def test_one_network_call_a_step_and_one_of_twice_the_batch_with_guidance(pipe):
    calls = Calls(pipe.unet)
    sample(pipe, num_inference_steps=3)
    sample(pipe, num_inference_steps=2, guidance_scale=3.0)
    calls.handle.remove()
    assert calls.batches == [1, 1, 1, 2, 2]


def test_guidance_against_its_formula(exact_pipe):
    pipe = exact_pipe

    def predict(prompt):
        tokens = pipe.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
        return pipe.unet(x, 999, pipe.text_encoder(tokens)[0]).sample

    x = torch.randn(1, *LATENTS, generator=generator(3)).double()
    for negative in (None, "a blue square"):
        with torch.no_grad():
            without = predict(negative or "")
            output = without + 5.0 * (predict(PROMPT) - without)
        pipe.scheduler.set_timesteps(1)
        expected = pipe.scheduler.step(output, pipe.scheduler.timesteps[0], x).denoised
        options = dict(num_inference_steps=1, guidance_scale=5.0, latents=x, negative_prompt=negative)
        torch.testing.assert_close(sample(pipe, **options), expected, **EXACT)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_sample_the_teacher(pipe, scheduler):
    pipe.scheduler = scheduler(**SCHEDULER, **({"clip_sample": False} if scheduler is DDIMScheduler else {}))
    latents = sample(pipe, num_inference_steps=3, guidance_scale=4.0)
    assert latents.shape == (1, *LATENTS) and latents.isfinite().all()
    assert torch.equal(latents, sample(pipe, num_inference_steps=3, guidance_scale=4.0))


def test_explicit_timesteps(pipe):
    pipe.scheduler.set_timesteps(2)
    explicit = sample(pipe, num_inference_steps=None, timesteps=pipe.scheduler.timesteps.tolist())
    assert torch.equal(explicit, sample(pipe, num_inference_steps=2))
    with pytest.raises(ValueError, match="either `num_inference_steps` or `timesteps`"):
        sample(pipe, num_inference_steps=2, timesteps=[999])
    pipe.scheduler = DDIMScheduler(**SCHEDULER)
    with pytest.raises(ValueError, match="DDIMScheduler takes no `timesteps`"):
        sample(pipe, timesteps=[999])


# --- batches ---------------------------------------------------------------------------------------------------------
def test_a_batch_is_its_videos_one_by_one(exact_pipe):
    pipe = exact_pipe
    prompts = [PROMPT, "a blue ring growing on a white background"]
    batch = sample(pipe, prompts, generator=[generator(0), generator(1)])
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(batch[i : i + 1], sample(pipe, prompt, generator=[generator(i)]), **EXACT)


def test_videos_of_one_prompt_follow_each_other(exact_pipe):
    pipe = exact_pipe
    prompts = [PROMPT, "a blue ring"]
    latents = torch.randn(4, *LATENTS, generator=generator(5))
    videos = sample(pipe, prompts, num_videos_per_prompt=2, latents=latents, num_inference_steps=1)
    for i, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        alone = sample(pipe, prompt, latents=latents[i : i + 1], num_inference_steps=1)
        torch.testing.assert_close(videos[i : i + 1], alone, **EXACT)


def test_prompt_embeds_do_what_the_prompt_does(pipe):
    embeds = pipe.base_model.encode_text(pipe.tokenizer, pipe.text_encoder, [PROMPT])["prompt_embeds"]
    assert torch.equal(sample(pipe, None, prompt_embeds=embeds), sample(pipe))
    negative = pipe.base_model.encode_text(pipe.tokenizer, pipe.text_encoder, ["dull"])["prompt_embeds"]
    guided = sample(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, guidance_scale=2.0)
    assert torch.equal(guided, sample(pipe, negative_prompt="dull", guidance_scale=2.0))


# --- outputs ---------------------------------------------------------------------------------------------------------
def test_output_types(pipe):
    array, tensor, pictures = (sample(pipe, output_type=kind) for kind in ("np", "pt", "pil"))
    assert array.shape == (1, NUM_FRAMES, SIZE, SIZE, 3) and 0 <= array.min() <= array.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert isinstance(pictures[0][0], PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(pictures[0][1]), (array[0, 1] * 255).round().astype(np.uint8))
    as_tuple = pipe(PROMPT, generator=generator(), output_type="np", return_dict=False)
    assert isinstance(as_tuple, tuple)
    np.testing.assert_array_equal(as_tuple[0], array)


def test_size_defaults_to_the_configuration_and_can_be_given(pipe, components):
    assert sample(pipe).shape[2:] == (NUM_FRAMES, SIZE // 2, SIZE // 2)
    assert sample(pipe, num_frames=1, height=12, width=20).shape[2:] == (1, 6, 10)
    bare = ModelScopeMCMPipeline(**components)
    assert [bare.sampling_default(name) for name in ("num_frames", "height", "width")] == [16, SIZE, SIZE]
    assert (bare.sampling_default("num_inference_steps"), bare.sampling_default("fps")) == (4, 8)


# --- callbacks -------------------------------------------------------------------------------------------------------
def test_callback_sees_and_changes_tensors(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    names = ["latents", "prompt_embeds"]
    options = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    latents = sample(pipe, num_inference_steps=2, **options)
    assert [(step, inputs) for step, _, inputs in seen] == [(0, set(names)), (1, set(names))]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert not latents.any()


def test_callback_changes_the_text(pipe):
    swapped = torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=generator(9))

    def callback(pipeline, step, timestep, tensors):
        return {"prompt_embeds": swapped}

    assert not torch.equal(sample(pipe, callback_on_step_end=callback), sample(pipe))


def test_interrupt(pipe):
    calls = Calls(pipe.unet)

    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    sample(pipe, num_inference_steps=4, callback_on_step_end=callback)
    sample(pipe, num_inference_steps=1)  # and is itself again afterwards
    calls.handle.remove()
    assert len(calls.batches) == 2


def test_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    sample(pipe, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=None), "either `prompt` or `prompt_embeds`"),
        (dict(prompt_embeds=torch.zeros(1, 2, TEXT_DIM)), "either `prompt` or `prompt_embeds`"),
        (dict(prompt=[]), "`prompt` must be a string or a list of at least one string"),
        (dict(prompt=7), "`prompt` must be a string or a list of at least one string, got 7"),
        (dict(negative_prompt=["a", "b"], guidance_scale=2.0), "2 negative prompts were given for 1 prompts"),
        (
            dict(negative_prompt="a", negative_prompt_embeds=torch.zeros(1, 2, TEXT_DIM)),
            "either `negative_prompt` or `negative_prompt_embeds`",
        ),
        (
            dict(negative_prompt_embeds=torch.zeros(1, 2, TEXT_DIM), guidance_scale=2.0),
            r"must have the same shape, got \(1, 24, 16\) and \(1, 2, 16\)",
        ),
        (dict(height=17), "`height` must be a positive multiple of 2, got 17"),
        (dict(width=0), "`width` must be a positive multiple of 2, got 0"),
        (dict(num_frames=0), "`num_frames` must be a whole number of at least 1, got 0"),
        (dict(num_inference_steps=0), "`num_inference_steps` must be a whole number of at least 1, got 0"),
        (dict(num_inference_steps=51), "51.*only 50"),
        (dict(num_videos_per_prompt=0), "`num_videos_per_prompt` must be a whole number"),
        (dict(decode_chunk_size=0), "`decode_chunk_size` must be a whole number"),
        (dict(output_type="gif"), "Unknown output_type 'gif'; valid values are np, pt, pil, latent"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "cannot get 'noise'; valid are latents, prompt_embeds"),
        (dict(latents=torch.zeros(1, 4, 4, 8, 9)), r"`latents` must have the shape \(1, 4, 4, 8, 8\)"),
        (dict(generator=[torch.Generator()] * 2), "2 generators were given for 1 videos"),
        (dict(lora_scale=0.5), "scale of 0.5 was given, but no LoRA is active"),
        (dict(cross_attention_kwargs={"scale": 0.5}), "scale of 0.5 was given, but no LoRA is active"),
        (dict(cross_attention_kwargs={"gligen": 1}), "takes only 'scale', got 'gligen'"),
        (dict(cross_attention_kwargs={"scale": 0.5}, lora_scale=0.6), "`lora_scale` is 0.6, but .* says 0.5"),
    ],
)
def test_bad_input(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **({"prompt": PROMPT} | options))


def test_a_negative_prompt_without_guidance_says_so(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        plain = sample(pipe)
        assert not caplog.records
        assert torch.equal(sample(pipe, negative_prompt="dull"), plain)
    assert "negative prompt has no effect at guidance_scale=1" in caplog.text


def test_is_an_mcm_pipeline(pipe):
    assert isinstance(pipe, MCMPipeline)
    assert type(pipe).__module__ == "diffusers_mcm.pipelines.modelscope"
