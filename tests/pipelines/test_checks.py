"""Arguments of the wrong kind are refused before the network runs, and so is what is not finite, after."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.pipelines import checks
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    NUM_FRAMES,
    SCHEDULER,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_animatediff_components,
    tiny_components,
)

PROMPT = "a red ring"
LATENTS = (1, 4, NUM_FRAMES, 8, 8)
NAN = float("nan")


@pytest.fixture(scope="module")
def modelscope():
    return ready(ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))))


@pytest.fixture(scope="module")
def animatediff():
    components = tiny_animatediff_components() | dict(scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER))
    return ready(AnimateDiffMCMPipeline(**components))


def ready(pipe):
    pipe.register_to_config(num_frames=NUM_FRAMES, num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompt=PROMPT, **options):
    options = dict(generator=torch.Generator().manual_seed(0), output_type="latent") | options
    return pipe(prompt, **options).frames


def embeds(*shape, **options):
    return torch.zeros(*shape or (1, TEXT_LENGTH, TEXT_DIM), **options)


def refused_before_sampling(pipe, options, message):
    calls = []
    handle = pipe.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            sample(pipe, **options)
    finally:
        handle.remove()
    assert not calls


WRONG = [
    (dict(generator=42), "`generator` must be a torch.Generator or a list .*, got 42; torch.Generator.*manual_seed"),
    (dict(generator="cuda"), "`generator` must be a torch.Generator or a list of one for each video, got 'cuda'"),
    (dict(generator=[7]), "`generator` must be a torch.Generator or a list of one for each video, got 7"),
    (dict(generator=(torch.Generator(),) * 2), "2 generators were given for 1 videos"),
    (dict(guidance_scale=None), "`guidance_scale` must be a finite number, got None"),
    (dict(guidance_scale="7.5"), "`guidance_scale` must be a finite number, got '7.5'"),
    (dict(guidance_scale=NAN), "`guidance_scale` must be a finite number, got nan"),
    (dict(guidance_scale=True), "`guidance_scale` must be a finite number, got True"),
    (dict(guidance_scale=torch.ones(2)), r"`guidance_scale` must be .*, got a Tensor of shape \(2,\)"),
    (dict(lora_scale="0.5"), "`lora_scale` must be a finite number, got '0.5'"),
    (dict(lora_scale=float("inf")), "`lora_scale` must be a finite number, got inf"),
    (dict(cross_attention_kwargs={"scale": NAN}), r"`cross_attention_kwargs\['scale'\]` must be a finite number"),
    (dict(cross_attention_kwargs=0.5), "`cross_attention_kwargs` must be a dictionary, got 0.5"),
    (dict(num_frames=4.0), "`num_frames` must be a whole number, got 4.0"),
    (dict(num_frames=True), "`num_frames` must be a whole number, got True"),
    (dict(height="16"), "`height` must be a whole number, got '16'"),
    (dict(width=NAN), "`width` must be a whole number, got nan"),
    (dict(num_inference_steps=-1), "`num_inference_steps` must be a whole number of at least 1, got -1"),
    (dict(num_inference_steps=2.0), "`num_inference_steps` must be a whole number of at least 1, got 2.0"),
    (dict(num_videos_per_prompt=None), "`num_videos_per_prompt` must be a whole number of at least 1, got None"),
    (dict(decode_chunk_size=2.5), "`decode_chunk_size` must be a whole number of at least 1, got 2.5"),
    (dict(output_type=["np"]), r"Unknown output_type \['np'\]; valid values are np"),
    (dict(timesteps=500), "`timesteps` must be a list of at least one timestep, got 500"),
    (dict(timesteps=[]), r"`timesteps` must be a list of at least one timestep, got \[\]"),
    (dict(timesteps="999"), "`timesteps` must be a list of at least one timestep, got '999'"),
    (dict(timesteps=[499, 999]), r"`timesteps` must be descending, got \[499, 999\]"),
    (dict(timesteps=[999, "a"]), "`timesteps` must be a finite number, got 'a'"),
    (dict(prompt=[PROMPT, 3]), "`prompt` must be a string or a list of at least one string"),
    (dict(negative_prompt=3), "`negative_prompt` must be a string or a list of at least one string, got 3"),
    (
        dict(prompt=None, prompt_embeds=embeds(1, TEXT_LENGTH, 7)),
        r"`prompt_embeds` must have .* length, 16\), got \(1",
    ),
    (dict(prompt=None, prompt_embeds=embeds(TEXT_LENGTH, TEXT_DIM)), r"`prompt_embeds` must have the shape \(batch"),
    (dict(prompt=None, prompt_embeds=embeds(0, TEXT_LENGTH, TEXT_DIM)), r"must have the shape .*, got \(0, 24, 16\)"),
    (dict(prompt=None, prompt_embeds=embeds().numpy()), "`prompt_embeds` must be a tensor .*, got a ndarray of shape"),
    (dict(prompt=None, prompt_embeds=embeds(dtype=torch.long)), "`prompt_embeds` must .* numbers, got .* torch.int64"),
    (dict(prompt=None, prompt_embeds=embeds() + NAN), "`prompt_embeds` holds 384 values of 384 that are NaN or inf"),
    (dict(negative_prompt_embeds=[0.0], guidance_scale=2.0), r"`negative_prompt_embeds` must be a tensor .* \[0.0\]"),
    (dict(latents=np.zeros(LATENTS)), r"`latents` must be a tensor \(1, 4, 4, 8, 8\) of .*, got a ndarray"),
    (dict(latents=torch.zeros(LATENTS[1:])), r"`latents` must have the shape \(1, 4, 4, 8, 8\), got \(4, 4, 8, 8\)"),
    (dict(latents=torch.zeros(LATENTS, dtype=torch.int)), "`latents` must be a tensor .* floating-point"),
    (dict(latents=torch.full(LATENTS, NAN)), "`latents` holds 1024 values of 1024 that are NaN or infinite"),
    (dict(callback_on_step_end="print"), "`callback_on_step_end` must be a function, got 'print'"),
    (dict(callback_on_step_end_tensor_inputs="latents"), "must be a list of names, got 'latents'"),
]


@pytest.mark.parametrize("kind", ["modelscope", "animatediff"])
def test_arguments_of_the_wrong_kind(kind, request):
    pipe = request.getfixturevalue(kind)
    for options, message in WRONG:
        refused_before_sampling(pipe, options, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_skip=3), "`clip_skip` must be at most 2, the layers of the text encoder, got 3"),
        (dict(clip_skip=-1), "`clip_skip` must be a whole number of at least 0, got -1"),
        (dict(clip_skip=1.0), "`clip_skip` must be a whole number of at least 0, got 1.0"),
        (dict(eta=1.5), "`eta` must lie between 0 and 1, got 1.5"),
        (dict(eta=None), "`eta` must be a finite number, got None"),
        (
            dict(prompt=None, prompt_embeds=embeds(1, 3, TEXT_LENGTH, TEXT_DIM)),
            "`prompt_embeds` has texts for 3 frames of a clip of 4",
        ),
    ],
)
def test_animatediffs_own_arguments(animatediff, options, message):
    refused_before_sampling(animatediff, options, message)


def test_numbers_of_numpy_and_torch_are_numbers(modelscope):
    plain = sample(modelscope, guidance_scale=3.0, num_inference_steps=2)
    for kind in (np.float32, torch.tensor):
        assert torch.equal(sample(modelscope, guidance_scale=kind(3.0), num_inference_steps=2), plain)
    numbers = dict(num_frames=np.int64(NUM_FRAMES), height=np.int32(16), width=torch.tensor(16))
    assert torch.equal(sample(modelscope, guidance_scale=3.0, num_inference_steps=np.int64(2), **numbers), plain)
    pair = sample(modelscope, [PROMPT] * 2, generator=tuple(torch.Generator().manual_seed(i) for i in (0, 1)))
    assert len(pair) == 2
    for timesteps in ([999, 499], (999, 499), np.array([999, 499]), torch.tensor([999, 499])):
        assert checks.timesteps_list(timesteps) == [999, 499]
    with pytest.raises(ValueError, match="`timesteps` must be descending"):  # which not every scheduler checks
        modelscope.scheduler, own = EulerDiscreteScheduler(**SCHEDULER), modelscope.scheduler
        try:
            sample(modelscope, timesteps=[10, 900])
        finally:
            modelscope.scheduler = own


def test_a_generator_of_another_device_is_named():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="`generator` is on cuda:0, the pipeline on cpu; it may also be on the cpu"):
        checks.generators(Elsewhere(), 1, torch.device("cpu"))


def test_verbs_of_the_wrong_kind(modelscope):
    for wrong in (42, None, NAN):
        for verb in (modelscope.set_adapters, modelscope.delete_adapters):
            with pytest.raises(TypeError, match="`adapter_names` must be a name or a list of names, got"):
                verb(wrong)
        for verb in (modelscope.load_lora_weights, modelscope.load_mcm_lora, type(modelscope).from_pretrained):
            with pytest.raises(TypeError, match="Expected a path, a packaged model or a Hub repository .* got"):
                verb(wrong)
    with pytest.raises(TypeError, match="Expected a path, .* got ") as told:
        modelscope.load_mcm_lora({f"unet.{i}.lora_A.weight": torch.zeros(100, 100) for i in range(100)})
    assert len(str(told.value)) < 400
    with pytest.raises(TypeError, match="`adapter_names` must be a name or a list of names, got 42"):
        modelscope.fuse_lora(42)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("wrong", ["float16", 16, torch.int8])
def test_a_type_that_is_none_is_not_taken_for_float32(name, wrong):
    with pytest.raises(ValueError, match="`dtype` must be a floating-point type such as torch.float16, got"):
        MCMPipeline.from_pretrained("mcm-shapes", **{name: wrong})


def test_adapter_weights(modelscope):
    from diffusers_mcm.lora import fresh_lora
    from tests.tiny import FEW_MODULES

    modelscope.load_lora_weights(fresh_lora(modelscope.unet, FEW_MODULES, rank=2, alpha=2.0), "a")
    scales = lambda: {layer.scaling["a"] for layer in modelscope._layers.values()}  # noqa: E731
    weights = (np.float32(0.5), torch.tensor(0.5), [np.float64(0.5)], np.array([0.5]), {"unet": np.float32(0.5)})
    for weight in weights:
        modelscope.set_adapters("a")
        modelscope.set_adapters("a", weight)
        assert scales() == {0.5}
    for weight in (NAN, "0.5", [None], {"unet": "x"}):
        with pytest.raises(ValueError, match="`adapter_weights.*` must be a finite number"):
            modelscope.set_adapters("a", weight)
    with pytest.raises(ValueError, match="`lora_scale` must be a finite number, got nan"):
        modelscope.fuse_lora(lora_scale=NAN)
    assert scales() == {0.5} and not modelscope.fused_loras
    modelscope.unload_lora_weights()


# --- FreeNoise -------------------------------------------------------------------------------------------------------
def test_free_noise_on_a_clip_shorter_than_its_window_is_plain_sampling(animatediff):
    plain = sample(animatediff, num_frames=5)
    animatediff.enable_free_noise(context_length=None, context_stride=4)  # the model's own, 8
    try:
        # one window, whose weights cancel: only the order of float32 operations differs
        torch.testing.assert_close(sample(animatediff, num_frames=5), plain, rtol=1e-3, atol=1e-3)
        longer = sample(animatediff, num_frames=10)
        sample(animatediff, num_frames=5)
        assert torch.equal(sample(animatediff, num_frames=10), longer)  # the window is as long as before
        refused_before_sampling(animatediff, dict(num_frames=10, latents=torch.zeros(1, 4, 8, 8, 8)), "have the shape")
        animatediff.enable_free_noise(context_length=4, noise_type="repeat_context")
        noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        twice = sample(animatediff, num_frames=8, latents=torch.cat([noise, noise], 2))
        assert torch.equal(sample(animatediff, num_frames=8, latents=noise), twice)
    finally:
        animatediff.disable_free_noise()


# --- what was sampled ------------------------------------------------------------------------------------------------
@pytest.fixture
def broken(request):
    """Set a weight of a network to NaN, until the test ends."""

    def break_it(network):
        parameter = next(network.parameters())
        before = parameter.data.clone()
        parameter.data.fill_(NAN)
        request.addfinalizer(lambda: parameter.data.copy_(before))

    return break_it


def test_finite_is_every_value_and_not_their_sum():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((2, 70_000), torch.finfo(dtype).max, dtype=dtype)
        assert checks.all_finite(largest) and checks.all_finite(-largest)
        for value in (NAN, float("inf"), -float("inf")):
            spoilt = torch.zeros(2, 3, dtype=dtype)
            spoilt[1, 2] = value
            assert not checks.all_finite(spoilt)
            largest[0, 0] = value
            assert not checks.all_finite(largest)
            spoilt[0, 0] = -value
            assert not checks.all_finite(spoilt)


@pytest.mark.parametrize("output_type", ["latent", "np", "pil", "pt"])
def test_latents_that_are_not_finite(modelscope, broken, output_type):
    broken(modelscope.unet)
    with pytest.raises(ValueError, match=r"latents hold 1024 values of 1024 that are NaN .*`lora_scale`.*\(float32\)"):
        sample(modelscope, output_type=output_type)


def test_a_vae_that_overflows(modelscope, broken):
    broken(modelscope.vae.decoder)
    with pytest.raises(ValueError, match=r"frames hold 3072 values of 3072 .* though the latents are finite.*vae.to"):
        sample(modelscope, output_type="np")
    assert sample(modelscope).isfinite().all()


def test_float16_overflow_is_told():
    pipe = ready(ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))))
    pipe.vae.decoder.conv_out.weight.data *= 1e6  # still finite in float32
    assert np.isfinite(sample(pipe, output_type="np")).all()
    pipe.vae.to(torch.float16)
    with pytest.raises(ValueError, match=r"the VAE overflows its type \(float16\)"):
        sample(pipe, output_type="np")
