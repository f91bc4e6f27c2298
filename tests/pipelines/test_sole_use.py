"""A pipeline samples for one thread at a time, and so does whatever shares its components."""

import copy
import pickle
import threading

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm import AnimateDiffMCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.lora import fresh_lora
from diffusers_mcm.pipelines import sole_use
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    FEW_MODULES,
    NUM_FRAMES,
    SCHEDULER,
    tiny_animatediff_components,
    tiny_components,
)


@pytest.fixture(scope="module")
def pipe():
    pipe = ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER)))
    lora = fresh_lora(pipe.unet, FEW_MODULES, rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0))
    for tensor in lora.tensors.values():
        tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    pipe.load_lora_weights(lora, "a")
    return ready(pipe)


@pytest.fixture(scope="module")
def animatediff():
    components = tiny_animatediff_components() | dict(scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER))
    return ready(AnimateDiffMCMPipeline(**components))


def ready(pipe):
    pipe.register_to_config(num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    return pipe("a red ring", generator=torch.Generator().manual_seed(0), output_type="latent", **options).frames


def in_another_thread(function):
    """What it returns there, or the error that it ends in."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:  # handed on
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def while_sampling(pipe, function, **options):
    """The result of a function that is called in the middle of sampling, and the video."""
    found = []

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            found.append(function())

    video = sample(pipe, callback_on_step_end=callback, **options)
    return found[0], video


OTHER_THREAD = "Another thread is using this pipeline"


@pytest.mark.parametrize("kind", ["pipe", "animatediff"])
def test_a_second_call_fails_and_the_first_is_what_it_would_have_been(kind, request):
    pipe = request.getfixturevalue(kind)
    alone = sample(pipe)
    different = dict(num_inference_steps=4, guidance_scale=5.0) | (dict(clip_skip=1) if kind == "animatediff" else {})
    error, video = while_sampling(pipe, lambda: in_another_thread(lambda: sample(pipe, **different)))
    assert isinstance(error, RuntimeError) and str(error).startswith(OTHER_THREAD)
    assert "threading.Lock" in str(error) and "copy.deepcopy(pipe)" in str(error)
    assert torch.equal(video, alone)
    assert torch.equal(in_another_thread(lambda: sample(pipe)), alone)  # once the first is done
    assert not sole_use._uses


def test_verbs_of_another_thread(pipe, tmp_path):
    alone = sample(pipe)
    verbs = {
        "set_adapters": lambda: pipe.set_adapters("a", 0.1),
        "fuse_lora": pipe.fuse_lora,
        "unload_lora_weights": pipe.unload_lora_weights,
        "disable_lora": pipe.disable_lora,
        "load_lora_weights": lambda: pipe.load_lora_weights(tmp_path),
        "delete_adapters": lambda: pipe.delete_adapters("a"),
        "save_pretrained": lambda: pipe.save_pretrained(tmp_path),  # which takes the LoRA out for a moment
        "save_mcm_lora": lambda: pipe.save_mcm_lora(tmp_path),
        "to": lambda: pipe.to(torch.float16),
    }
    errors, video = while_sampling(pipe, lambda: {name: in_another_thread(verb) for name, verb in verbs.items()})
    assert {name for name, error in errors.items() if not str(error).startswith(OTHER_THREAD)} == set()
    assert torch.equal(video, alone) and torch.equal(sample(pipe), alone) and not list(tmp_path.iterdir())


def test_verbs_of_animatediff(animatediff):
    verbs = {
        "enable_free_noise": animatediff.enable_free_noise,
        "enable_free_init": animatediff.enable_free_init,
        "set_ip_adapter_scale": lambda: animatediff.set_ip_adapter_scale(0.5),
        "enable_freeu": lambda: animatediff.enable_freeu(1, 1, 1, 1),
    }
    errors, _ = while_sampling(animatediff, lambda: {name: in_another_thread(v) for name, v in verbs.items()})
    assert {name for name, error in errors.items() if not str(error).startswith(OTHER_THREAD)} == set()


def test_looking_and_interrupting_need_no_leave(pipe):
    def look():
        pipe._interrupt = True
        return pipe.get_active_adapters(), pipe.guidance_scale, pipe.num_timesteps

    seen, _ = while_sampling(pipe, lambda: in_another_thread(look), num_inference_steps=3)
    assert seen == (["a"], 1.0, 3)


@pytest.mark.parametrize("share", ["components", "from_pipe", "the network alone"])
def test_pipelines_that_share_a_network(pipe, share):
    alone = sample(pipe, lora_scale=0.5)
    if share == "from_pipe":
        other = type(pipe).from_pipe(pipe)
    elif share == "components":
        other = type(pipe)(**pipe.components)
    else:
        other = type(pipe)(**tiny_components(1) | dict(unet=pipe.unet, scheduler=DDIMScheduler(**SCHEDULER)))
    ready(other)
    error, video = while_sampling(
        pipe, lambda: in_another_thread(lambda: sample(other, lora_scale=0.1)), lora_scale=0.5
    )
    assert isinstance(error, RuntimeError) and "(or another one that shares its" in str(error)
    assert torch.equal(video, alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_is_free(pipe, duplicate):
    """Made in the middle of a call, too."""
    alone = sample(pipe)
    other, video = while_sampling(pipe, lambda: duplicate(pipe))
    assert torch.equal(video, alone)
    copied, video = while_sampling(pipe, lambda: in_another_thread(lambda: sample(other)))
    assert torch.equal(video, alone) and torch.equal(copied, alone)


@pytest.mark.parametrize("kind", ["pipe", "animatediff"])
def test_a_call_inside_a_call(kind, request):
    pipe = request.getfixturevalue(kind)
    alone = sample(pipe, guidance_scale=2.0)

    def nested():
        with pytest.raises(RuntimeError, match="This pipeline is sampling: a callback cannot start another call"):
            sample(pipe)
        return pipe.guidance_scale

    found, video = while_sampling(pipe, nested, guidance_scale=2.0)
    assert found == 2.0 and torch.equal(video, alone)


def test_an_error_frees_the_pipeline(pipe):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample(pipe, callback_on_step_end=fail)
    with pytest.raises(ValueError, match="`guidance_scale`"):
        sample(pipe, guidance_scale=None)
    assert not sole_use._uses
    assert isinstance(in_another_thread(lambda: sample(pipe)), torch.Tensor)
