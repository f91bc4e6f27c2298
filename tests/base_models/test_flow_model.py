"""A base model that differs in everything is two files and a row each: nothing else has to change.

Its files are `flow_model/base_model.py` and `flow_model/pipeline.py`. They are not in the package, which therefore
cannot know of them; the row is put in the table here.
"""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import BASE_MODELS, infer_base_model
from diffusers_mcm.formats.description import describe
from diffusers_mcm.lora import WEIGHTS_NAME, add_lora
from tests.tiny import EXACT, SIZE, randomise_lora, save_lora, save_tiny_base

from .flow_model.base_model import MASK, TEXT_LENGTH, FlowConsistencyScheduler, FlowPath
from .flow_model.pipeline import FlowMCMPipeline
from .flow_model.tiny import flow_components, save_flow_base

FLOW = FlowMCMPipeline.base_model
NUM_FRAMES = 9  # three of the latents


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(BASE_MODELS, FLOW.name, FLOW)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_flow_base(tmp_path_factory.mktemp("flow") / "base")


@pytest.fixture
def lora(base, tmp_path):
    """A LoRA folder beside its base model, for a student of shift 3."""
    transformer = flow_components()["transformer"]
    add_lora(transformer, FLOW.lora_target_modules(transformer), rank=2, alpha=2)
    randomise_lora(transformer)
    options = dict(repository=base, scheduler=FlowConsistencyScheduler(shift=3.0), sampling={"fps": 5})
    return save_lora(tmp_path / "lora", transformer, FLOW, **options)


@pytest.fixture
def pipe(base):
    return quiet(MCMPipeline.from_pretrained(base, dtype=torch.float64))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    options = dict(num_frames=NUM_FRAMES, num_inference_steps=2, guidance_scale=2.0, output_type="pt") | options
    return quiet(pipe)("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


def noise(seed=0, batch=2, frames=3, dtype=torch.float32):
    return torch.randn(batch, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- loading, sampling, saving ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1.0), (2, 3.0), (4, 1.0)])
def test_it_samples_what_diffusers_own_pipeline_does(base, steps, guidance_scale):
    """With the scheduler of this model in it. Both add noise from the global generator: theirs cannot be told one."""
    pipe = quiet(MCMPipeline.from_pretrained(base))
    theirs = WanPipeline(**pipe.components)
    options = dict(prompt=["a red ring", "a square"], negative_prompt=FLOW.negative_prompt, height=SIZE, width=SIZE)
    options |= dict(num_frames=NUM_FRAMES, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt")
    options["latents"] = noise()
    torch.manual_seed(1)
    video = pipe(**options | ({} if guidance_scale > 1 else {"negative_prompt": None})).frames
    torch.manual_seed(1)
    expected = quiet(theirs)(**options, max_sequence_length=TEXT_LENGTH).frames
    assert video.shape == (2, NUM_FRAMES, 3, SIZE, SIZE)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-4)
    assert type(pipe.scheduler) is FlowConsistencyScheduler


def test_a_row_is_enough_to_load_sample_and_save(base, lora, tmp_path):
    assert len(load_file(lora / WEIGHTS_NAME)) == 2 * 2 * 10  # both matrices of two blocks' ten projections
    assert all(key.startswith("transformer.blocks.") for key in load_file(lora / WEIGHTS_NAME))
    pipe = MCMPipeline.from_pretrained(lora)
    assert type(pipe) is FlowMCMPipeline and pipe.get_list_adapters() == {"transformer": ["mcm"]}
    assert type(pipe.scheduler) is FlowConsistencyScheduler and pipe.scheduler.config.shift == 3.0
    assert [pipe.sampling_default(name) for name in ("fps", "num_frames")] == [5, 9]
    video = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any(".lora_" in key or ".base_layer." in key for key in weights)
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(sample(again), video) and again.scheduler.config.shift == 3.0
    pipe.save_mcm_lora(tmp_path / "again")
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "again", base_model=base)), video)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), video, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), video)
    pipe.disable_lora()
    assert not torch.allclose(sample(pipe), video)
    pipe.unload_lora_weights()
    stock = MCMPipeline.from_pretrained(base)
    assert stock.scheduler.config.shift == 5.0  # whatever the teacher is sampled with: 3
    stock.scheduler = pipe.scheduler
    assert torch.equal(sample(stock), sample(pipe))


def test_rows_do_not_take_each_others_models(base, lora, tmp_path):
    save_tiny_base(tmp_path / "modelscope")
    for folder, name in ((base, "flow"), (tmp_path / "modelscope", "modelscope")):
        assert infer_base_model(model_index=json.loads((folder / "model_index.json").read_text())).name == name
    with pytest.raises(ValueError, match="made for base model 'flow'; this is 'modelscope'"):
        MCMPipeline.from_pretrained(tmp_path / "modelscope", lora=lora)
    modules = [key.removeprefix("transformer.") for key in load_file(lora / WEIGHTS_NAME)]
    assert infer_base_model(lora_modules=modules) is FLOW


def test_what_a_file_says_of_itself(lora):
    about = describe(lora)
    assert (about["base_model"], about["layout"], about["targets"]) == ("flow", "diffusers", 20)
    settings = dict(num_inference_steps=4, num_frames=9, height=16, width=16, fps=5, guidance_scale=1.0)
    assert about["settings"] == settings | dict(shift=3.0, original_inference_steps=48)


def test_a_half_precision_network_is_given_float32_latents_and_exact_times(base, monkeypatch):
    pipe, given = MCMPipeline.from_pretrained(base, dtype=torch.bfloat16), []
    original = FLOW.denoise

    def denoise(denoiser, latents, timesteps, text):
        output = original(denoiser, latents, timesteps, text)
        given.append((denoiser.dtype, text["prompt_embeds"].dtype, latents.dtype, output.dtype, timesteps))
        return output

    monkeypatch.setattr(FLOW, "denoise", denoise, raising=False)
    video = sample(pipe, num_inference_steps=4)
    assert {each[:4] for each in given} == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    times = torch.stack([each[4] for each in given])  # bfloat16 has no 937.5
    torch.testing.assert_close(times, torch.tensor([[1000.0], [937.5], [2500 / 3], [625.0]]).expand(4, 2))
    exact = sample(MCMPipeline.from_pretrained(base), num_inference_steps=4)
    torch.testing.assert_close(video.float(), exact, rtol=0, atol=0.02)


def test_diffusers_own_flow_scheduler_samples_too(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    fine = sample(pipe, num_inference_steps=40)
    coarse = sample(pipe, num_inference_steps=20)
    assert fine.shape == (1, NUM_FRAMES, 3, SIZE, SIZE)
    assert 0 < (fine - coarse).abs().max() < 0.05 < (fine - sample(pipe, num_inference_steps=1)).abs().max()


# --- the noise path --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [20, 48, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 17.0])
def test_the_grid_is_shifted_and_a_step_back_lands_on_it(shift, steps):
    path, u = FlowPath(shift), torch.arange(1, steps + 1, dtype=torch.float64) / steps
    grid = path.solver_timesteps(steps)
    expected = (1000 * shift * u / (1 + (shift - 1) * u)).float()
    assert torch.equal(grid, expected) and grid[-1] == path.terminal_timestep
    assert torch.equal(path.previous_timestep(grid, steps), torch.cat([torch.zeros(1), grid[:-1]]))


def test_the_path_of_a_normal_distribution():
    """Of x_0 ~ N(0, s²) the flow is known: x_t is as many deviations from 0 all along its way, and so is where the
    solver's steps lead to, more exactly the more there are."""
    path, s, x = FlowPath(5.0), 0.7, noise(dtype=torch.float64)

    def deviation(t):
        alpha, sigma = path.coefficients(t.double())
        return (alpha**2 * s**2 + sigma**2).sqrt()

    def velocity(x_t, t):  # E[ε − x_0 | x_t]
        alpha, sigma = (each[:, None, None, None, None] for each in path.coefficients(t.double()))
        return x_t * (sigma - alpha * s**2) / (alpha**2 * s**2 + sigma**2)

    errors = []
    for steps in (50, 100):
        x_t, t = x, torch.full((len(x),), 1000.0)
        for _ in range(steps // 2):
            before, output = t, velocity(x_t, t)
            t = path.previous_timestep(t, steps)
            x_t = path.step(path.predict_x0(output, x_t, before), path.predict_noise(output, x_t, before), t)
        exact = x * (deviation(t) / deviation(torch.full_like(t, 1000.0)))[:, None, None, None, None]
        errors.append(float((x_t - exact).norm() / exact.norm()))
    assert errors[0] < 0.02 and errors[1] == pytest.approx(errors[0] / 2, rel=0.2)


# --- the tensors -----------------------------------------------------------------------------------------------------
def test_frames_are_counted_in_pixels_not_in_latents(pipe):
    size = dict(height=SIZE, width=SIZE)
    assert FLOW.latent_shape(pipe.transformer, pipe.vae, num_frames=9, **size) == (4, 3, 4, 4)
    for frames in (0, 8, 10):
        with pytest.raises(ValueError, match=f"one more than a multiple of 4, got {frames}"):
            pipe("a ring", num_frames=frames)
    latents = 0.1 * noise(dtype=torch.float64)
    latents.requires_grad_()
    video = FLOW.decode_video(pipe.vae, latents)
    assert video.shape == (2, 3, 9, SIZE, SIZE) and video.abs().max() < 1  # or the clamp would show
    indices = torch.tensor([[0, 4], [2, 8]])
    frames = FLOW.decode_frames(pipe.vae, latents, indices)
    expected = torch.stack([video[b, :, i] for b, row in enumerate(indices.tolist()) for i in row])
    torch.testing.assert_close(frames, expected, **EXACT)
    (gradient,) = torch.autograd.grad(frames[1].sum(), latents)  # frame 4 of the first clip
    assert gradient[0, :, :2].any(dim=1).any() and not gradient[0, :, 2].any() and not gradient[1].any()


def test_latents_have_the_vaes_mean_and_deviation(pipe):
    pixels = torch.rand(1, 3, 5, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    posterior = pipe.vae.encode(pixels).latent_dist
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(4, 1, 1, 1) for name in ("mean", "std"))
    e = noise(batch=1, frames=2)
    torch.testing.assert_close(FLOW.encode_video(pipe.vae, pixels), (posterior.mean - mean) / std, **EXACT)
    drawn = (posterior.mean + posterior.std * e - mean) / std
    torch.testing.assert_close(FLOW.encode_video(pipe.vae, pixels, e), drawn, **EXACT)


# --- the text and its mask -------------------------------------------------------------------------------------------
def test_the_mask_goes_with_the_text(pipe):
    text = FLOW.encode_text(pipe.tokenizer, pipe.text_encoder, ["a", "a ring"])
    assert text[MASK].shape == (2, TEXT_LENGTH) and text[MASK].sum(1).tolist() == [2, 6]  # pieces, and the end
    latents, t = noise(dtype=torch.float64), torch.tensor([937.5, 625.0])
    outputs = [
        FLOW.denoise(pipe.transformer, latents, t, text | {MASK: mask})
        for mask in (text[MASK], text[MASK] & (torch.arange(TEXT_LENGTH) < 1))
    ]
    assert ((outputs[0] - outputs[1]).flatten(1).abs().amax(1) > 0).all()


def test_embeddings_that_a_caller_or_callback_gives_get_their_mask(pipe):
    video, other = sample(pipe), sample(pipe, negative_prompt="a square")
    embeds, negative = pipe.encode_prompt("a red ring", do_classifier_free_guidance=True)

    def given(**texts):
        options = dict(num_frames=NUM_FRAMES, num_inference_steps=2, guidance_scale=2.0, output_type="pt")
        return pipe(generator=torch.Generator().manual_seed(0), **options, **texts).frames

    assert torch.equal(given(prompt_embeds=embeds, negative_prompt_embeds=negative), video)
    assert not torch.allclose(video, other)
    with pytest.raises(ValueError, match=r"shape \(batch, length, 16\)"):
        given(prompt_embeds=embeds[..., :8])
    seen = []

    def shorter(pipe, i, t, tensors):
        seen.append(t)
        return {"prompt_embeds": tensors["prompt_embeds"][:, :8]}

    short = given(
        prompt_embeds=embeds,
        callback_on_step_end=shorter,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert [float(t) for t in seen] == pytest.approx([1000.0, 2500 / 3]) and not torch.equal(short, video)
