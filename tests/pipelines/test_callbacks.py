"""Callbacks at the end of a step: diffusers' own, and what becomes of what they change."""

import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from diffusers_mcm import AnimateDiffMCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.lora import fresh_lora
from tests.pipelines.test_animatediff import give_ip_adapter
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    FEW_MODULES,
    NUM_FRAMES,
    SCHEDULER,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_animatediff_components,
    tiny_components,
)

PROMPTS = ["a red ring", "a blue square"]
LATENTS = (4, NUM_FRAMES, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    return ready(ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))))


@pytest.fixture
def animatediff():
    components = tiny_animatediff_components() | dict(scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER))
    return ready(AnimateDiffMCMPipeline(**components))


def ready(pipe):
    pipe.to(torch.float64)  # networks are compared: the order of float32 operations would show
    pipe.register_to_config(num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompt=PROMPTS, callback=None, names=("latents",), **options):
    options = dict(generator=torch.Generator().manual_seed(0), output_type="latent") | options
    return pipe(
        prompt, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=list(names), **options
    ).frames


def encode(pipe, prompts):
    return pipe.base_model.encode_text(pipe.tokenizer, pipe.text_encoder, prompts)["prompt_embeds"]


@torch.no_grad()
def by_hand(pipe, scales, negative=("", "")):
    """Sampling of `PROMPTS` with a guidance scale for each step, written out."""
    generator = torch.Generator().manual_seed(0)
    scheduler = MCMScheduler(**SCHEDULER)
    scheduler.set_timesteps(len(scales))
    text, negative = encode(pipe, PROMPTS), encode(pipe, list(negative))
    x = torch.randn(2, *LATENTS, generator=generator, dtype=torch.float64)
    for t, scale in zip(scheduler.timesteps, scales):
        output = pipe.unet(x, t, text).sample
        if scale > 1:
            without = pipe.unet(x, t, negative).sample
            output = without + scale * (output - without)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


CLOSE = dict(rtol=1e-6, atol=1e-6)


def chunked(pipeline, step, timestep, tensors):
    """The dynamic guidance of diffusers' documentation."""
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipeline._guidance_scale = 0.0
    return tensors


@pytest.mark.parametrize(
    "callback",
    [
        SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
        MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5)]),
        chunked,
    ],
    ids=["official", "several", "documented"],
)
def test_guidance_is_cut_off_and_every_video_keeps_its_text(pipe, callback):
    batches = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    options = dict(guidance_scale=3.0, num_inference_steps=3)
    found = sample(pipe, callback=callback, names=["prompt_embeds"], **options)
    handle.remove()
    assert batches == [4, 4, 2]
    torch.testing.assert_close(found, by_hand(pipe, [3.0, 3.0, 1.0]), **CLOSE)


def test_the_scale_may_change_from_step_to_step(pipe):
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 5.0

    torch.testing.assert_close(sample(pipe, callback=callback, guidance_scale=2.0), by_hand(pipe, [2.0, 5.0]), **CLOSE)
    with pytest.raises(ValueError, match="switched guidance on in a call without; start the call with a `guidance_sc"):
        sample(pipe, callback=callback)


def test_what_is_shown_is_the_networks_batch(pipe):
    names, seen = ["latents", "prompt_embeds", "negative_prompt_embeds"], {}
    sample(pipe, callback=lambda p, i, t, k: seen.update(k), names=names, guidance_scale=2.0, negative_prompt="dull")
    negative = encode(pipe, ["dull"] * 2)
    torch.testing.assert_close(seen["prompt_embeds"], torch.cat([negative, encode(pipe, PROMPTS)]), **CLOSE)
    torch.testing.assert_close(seen["negative_prompt_embeds"], negative, **CLOSE)
    sample(pipe, callback=lambda p, i, t, k: seen.update(k), names=names)
    assert seen["negative_prompt_embeds"] is None and len(seen["prompt_embeds"]) == 2


def test_the_negative_text_changes_however_it_is_changed(pipe):
    dull = encode(pipe, ["dull"] * 2)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    both = torch.cat([dull, encode(pipe, PROMPTS)])
    expected = None
    for change in (
        lambda tensors: {"negative_prompt_embeds": dull},
        lambda tensors: tensors | {"negative_prompt_embeds": dull},
        lambda tensors: {"prompt_embeds": both},
        lambda tensors: tensors["negative_prompt_embeds"].copy_(dull) is None or None,  # in place
    ):
        callback = lambda p, i, t, tensors: change(tensors)  # noqa: E731, B023
        found = sample(pipe, callback=callback, names=names, guidance_scale=4.0)
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(expected, sample(pipe, guidance_scale=4.0), **CLOSE)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (7, "callback must return a dictionary of tensors or None, got 7"),
        ({"latent": torch.zeros(1)}, "callback returned 'latent'; valid are latents, prompt_embeds"),
        ({"latents": None}, r"must return `latents` as a tensor of shape \(2, 4, 4, 8, 8\), got None"),
        (
            {"latents": torch.zeros(1, *LATENTS)},
            r"must return `latents` as a tensor of shape \(2, .* \(1, 4, 4, 8, 8\)",
        ),
        (
            {"prompt_embeds": torch.zeros(1, TEXT_LENGTH, TEXT_DIM)},
            r"must return `prompt_embeds` as a tensor of shape \(2, length, 16\), got a Tensor of shape \(1, 24, 16\)",
        ),
        ({"prompt_embeds": torch.zeros(2, TEXT_LENGTH, 7)}, r"tensor of shape \(2, length, 16\), got .* \(2, 24, 7\)"),
        ({"negative_prompt_embeds": torch.zeros(2, TEXT_LENGTH, TEXT_DIM)}, "but the call has no guidance; start it"),
    ],
)
def test_what_a_callback_cannot_return(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, callback=lambda *_: returned)


def test_not_finite_latents_of_a_callback_are_told(pipe):
    with pytest.raises(ValueError, match="latents hold .* a callback that returned such values"):
        sample(pipe, callback=lambda p, i, t, k: {"latents": k["latents"] * float("inf")})


def test_callbacks_of_other_models_are_refused(pipe):
    with pytest.raises(ValueError, match="callback cannot get 'add_text_embeds'; valid are latents, prompt_embeds"):
        sample(pipe, callback=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))
    with pytest.raises(ValueError, match="IPAdapterScaleCutoffCallback needs an IP-Adapter, which ModelScopeMCMPip"):
        sample(pipe, callback=MultiPipelineCallbacks([IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)]))


def test_animatediff_with_an_ip_adapter(animatediff):
    give_ip_adapter(animatediff)
    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1))
    both = dict(ip_adapter_image_embeds=[torch.cat([torch.zeros_like(picture), picture])], guidance_scale=3.0)
    plain = sample(animatediff, **both)
    cutoff = MultiPipelineCallbacks(
        [SDCFGCutoffCallback(cutoff_step_ratio=0.0), IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.0)]
    )
    found = sample(animatediff, callback=cutoff, **both)
    assert found.isfinite().all() and not torch.allclose(found, plain, **CLOSE)
    scales = {p.scale[0] for p in animatediff.unet.attn_processors.values() if hasattr(p, "scale")}
    assert scales == {0.0}
    with pytest.raises(ValueError, match=r"`ip_adapter_image_embeds` must be of the shape \(2, .*negative first, got"):
        sample(animatediff, ip_adapter_image_embeds=[picture], guidance_scale=3.0)
    with pytest.raises(ValueError, match="`ip_adapter_image_embeds` must be a list of one tensor .*, got a Tensor"):
        sample(animatediff, ip_adapter_image_embeds=picture)
    with pytest.raises(ValueError, match="a list of one for each of the 1 IP-Adapters, got 2"):
        sample(animatediff, ip_adapter_image_embeds=[picture, picture])
    with pytest.raises(ValueError, match="`ip_adapter_image` needs an `image_encoder` and a `feature_extractor`"):
        sample(animatediff, ip_adapter_image=torch.zeros(1, 3, 8, 8))


# --- LoRA verbs ------------------------------------------------------------------------------------------------------
@pytest.fixture
def adapted(pipe):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        lora = fresh_lora(pipe.unet, FEW_MODULES, rank=2, alpha=2.0, generator=generator)
        for tensor in lora.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        pipe.load_lora_weights(lora, name)
    pipe.set_adapters("a")
    yield pipe
    pipe.unload_lora_weights()


@pytest.mark.parametrize("lora_scale", [None, 0.5, 0.0])
@pytest.mark.parametrize(
    "change",
    [lambda p: p.set_adapters("a", 0.3), lambda p: p.set_adapters("b", 2.0), lambda p: p.disable_lora()],
    ids=["weight", "other", "off"],
)
def test_a_verb_in_a_callback_acts_from_then_on(adapted, change, lora_scale):
    """The second of two steps is the network's own answer at the strength that the callback chose."""
    seen = {}

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            change(pipeline)
            seen.update(tensors)

    found = sample(adapted, PROMPTS[0], callback, lora_scale=lora_scale)
    scaled = {name: 1.0 if lora_scale is None else lora_scale for name in adapted.get_active_adapters()}
    scheduler = MCMScheduler(**SCHEDULER)
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(1)
    t, x, text = scheduler.timesteps[1], seen["latents"], encode(adapted, PROMPTS[:1])
    weights = {name: adapted._adapters.weights[name] * scale for name, scale in scaled.items()}
    with torch.no_grad():
        if weights:
            adapted.set_adapters(list(weights), list(weights.values()))
        expected = scheduler.step(adapted.unet(x, t, text).sample, t, x).prev_sample
    torch.testing.assert_close(found, expected, **CLOSE)


def test_an_adapter_that_comes_in_a_call_under_an_old_name_does_not_keep_its_scale(adapted):
    adapted.delete_adapters("b")
    lora = adapted._extract("a")["unet"]
    plain = sample(adapted, PROMPTS[0])

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            pipeline.delete_adapters("a")
            pipeline.load_lora_weights(lora, "a")

    sample(adapted, PROMPTS[0], callback, lora_scale=0.5)
    assert torch.equal(sample(adapted, PROMPTS[0]), plain)


def test_a_callback_cannot_bring_another_schedule(adapted):
    lora = fresh_lora(adapted.unet, FEW_MODULES, rank=2, alpha=2.0)
    before = adapted.scheduler
    with pytest.raises(ValueError, match="in a callback use `load_lora_weights` and `set_adapters`"):
        sample(adapted, callback=lambda p, i, t, k: p.load_mcm_lora(lora, "c"))
    assert adapted.scheduler is before and adapted.get_active_adapters() == ["a"]
    adapted.load_mcm_lora(lora, "c")  # after the call it may


def test_what_a_callback_chose_stays_after_the_call(adapted):
    adapted.set_adapters("a", 0.3)
    expected = sample(adapted)
    adapted.set_adapters("a")
    sample(adapted, callback=lambda p, i, t, k: p.set_adapters("a", 0.3), lora_scale=0.5)
    assert torch.equal(sample(adapted), expected)
    sample(adapted, callback=lambda p, i, t, k: p.delete_adapters("a") if i == 0 else None, lora_scale=0.5)
    assert all("a" not in layer.scaling for layer in adapted._layers.values())
    with pytest.raises(ValueError, match="Cannot fuse the LoRA in a call that has a `lora_scale`; fuse it before"):
        adapted.set_adapters("b")
        sample(adapted, callback=lambda p, i, t, k: p.fuse_lora(), lora_scale=0.5)
    assert not adapted.fused_loras
