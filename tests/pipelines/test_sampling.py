"""The steps of a call are public, and called as in diffusers."""

import pytest
from diffusers import TCDScheduler

from diffusers_mcm import AnimateDiffMCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from tests.tiny import (
    NUM_FRAMES,
    SCHEDULER,
    SIZE,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_animatediff_components,
    tiny_components,
)

PROMPT = "a red ring"


@pytest.fixture
def modelscope():
    return ready(ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))))


@pytest.fixture
def animatediff():
    return ready(AnimateDiffMCMPipeline(**tiny_animatediff_components()))


def ready(pipe):
    pipe.register_to_config(num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_encode_prompt_checks_what_it_is_given(animatediff, modelscope):
    for each in (animatediff, modelscope):
        with pytest.raises(ValueError, match="`prompt` must be a string or a list of at least one string, got 7"):
            each.encode_prompt(7)
        with pytest.raises(ValueError, match="A LoRA scale of 0.5 was given, but no LoRA is active"):
            each.encode_prompt(PROMPT, lora_scale=0.5)
        with pytest.raises(ValueError, match="2 negative prompts were given for 1 prompts"):
            each.encode_prompt(PROMPT, do_classifier_free_guidance=True, negative_prompt=["", ""])
    animatediff.enable_free_noise(context_length=4)
    assert animatediff.encode_prompt({0: PROMPT, 3: "dull"}, num_frames=6)[0].shape == (1, 6, TEXT_LENGTH, TEXT_DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(height=SIZE + 1), "`height` must be a positive multiple of 2, got 17"),
        (dict(callback_steps=0), "`callback_steps` must be a whole number of at least 1, got 0"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "callback cannot get 'noise'; valid are latents, prompt"),
        (dict(negative_prompt=3), "`negative_prompt` must be a string or a list of at least one string, got 3"),
        (dict(num_frames=0), "`num_frames` must be a whole number of at least 1, got 0"),
    ],
)
def test_check_inputs(modelscope, animatediff, options, message):
    for each in (modelscope, animatediff):
        each.check_inputs(PROMPT, SIZE, SIZE, 1)
        with pytest.raises(ValueError, match=message):
            each.check_inputs(**dict(prompt=PROMPT, height=SIZE, width=SIZE) | options)


def test_a_scheduler_keeps_its_own_eta(modelscope):
    modelscope.scheduler, given = TCDScheduler(**SCHEDULER), []
    step = modelscope.scheduler.step

    def watched(output, t, x, eta=0.3, generator=None, return_dict=True):
        given.append(eta)
        return step(output, t, x, eta=eta, generator=generator, return_dict=return_dict)

    modelscope.scheduler.step = watched
    modelscope(PROMPT, output_type="latent")
    assert given == [0.3, 0.3]
