"""The steps of a ModelScope call are those of diffusers, and one by one they are the call."""

import pytest
import torch
from diffusers import TextToVideoSDPipeline

from diffusers_mcm import MCMScheduler, ModelScopeMCMPipeline
from tests.pipelines.test_animatediff import STEPS, arguments
from tests.pipelines.test_sampling import ready
from tests.tiny import (
    NUM_FRAMES,
    SCHEDULER,
    SIZE,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_components,
)

PROMPT = "a red ring"


@pytest.fixture
def modelscope():
    return ready(ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))))


@pytest.mark.parametrize("name", STEPS)
def test_modelscopes_steps_are_those_of_diffusers(name):
    theirs = arguments(getattr(TextToVideoSDPipeline, name))
    ours = arguments(getattr(ModelScopeMCMPipeline, name))
    assert ours[: len(theirs)] == theirs


def test_the_steps_one_by_one_are_a_call(modelscope):
    pipe, generator = modelscope, torch.Generator().manual_seed(0)
    embeds, negative = pipe.encode_prompt(PROMPT)
    assert negative is None and embeds.shape == (1, TEXT_LENGTH, TEXT_DIM)
    noise = pipe.prepare_latents(1, 4, NUM_FRAMES, SIZE, SIZE, torch.float16, "cpu", generator)
    assert noise.dtype == torch.float32
    options = dict(prompt_embeds=embeds, num_inference_steps=1)
    latents = pipe(**options, latents=noise, output_type="latent").frames
    whole = {}
    for kind in ("latent", "pt"):
        generator = torch.Generator().manual_seed(0)
        whole[kind] = pipe(PROMPT, generator=generator, num_inference_steps=1, output_type=kind).frames
    assert torch.equal(latents, whole["latent"])
    pixels = (pipe.decode_latents(latents, 3) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(pixels, whole["pt"])
