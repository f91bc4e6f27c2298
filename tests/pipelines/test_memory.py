"""What saves memory, and that it makes the same video. Tolerances are in the brightness of a pixel, 0 to 1."""

import pytest
import torch

from diffusers_mcm import MCMScheduler, ModelScopeMCMPipeline
from tests.pipelines.hooks import record_calls
from tests.tiny import NUM_FRAMES, SCHEDULER, tiny_components

PROMPT = "a red circle moving left on a black background"
LEVEL = 1 / 255  # what eight bits tell apart


@pytest.fixture
def pipe():
    components = tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER))
    pipe = ModelScopeMCMPipeline(**components, num_frames=NUM_FRAMES, num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, output_type="pt", **options):
    return pipe(PROMPT, output_type=output_type, generator=torch.Generator().manual_seed(0), **options).frames


# --- precision -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "most", "mean"),
    [(torch.float16, LEVEL, LEVEL / 10), (torch.bfloat16, 8 * LEVEL, LEVEL)],
    ids=["float16", "bfloat16"],
)
def test_half_precision_makes_the_same_video(pipe, dtype, most, mean):
    """From the same noise."""
    whole = sample(pipe)
    pipe.to(dtype=dtype)
    assert sample(pipe, "latent").dtype == dtype
    assert sample(pipe, "np").dtype == "float32"
    difference = (sample(pipe).float() - whole).abs()
    assert 0 < difference.max() < most
    assert difference.mean() < mean
    assert whole.std() > 0.1  # there is something to see


# A frame in float32 is rounded otherwise in a batch of another size: 6e-8, as often as the decoder has layers.
ROUNDING = dict(atol=1e-5, rtol=0)


# --- decoding --------------------------------------------------------------------------------------------------------
def decoded_at_a_time(pipe):
    """The batches that the decoder itself gets."""
    sizes = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_chunked_decoding_makes_the_same_video(pipe):
    sizes = decoded_at_a_time(pipe)
    whole = sample(pipe, decode_chunk_size=None)
    torch.testing.assert_close(sample(pipe, decode_chunk_size=3), whole, **ROUNDING)
    assert sizes == [4, 3, 1]


def test_vae_slicing_makes_the_same_video(pipe):
    sizes = decoded_at_a_time(pipe)
    whole = sample(pipe)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(sample(pipe), whole, **ROUNDING)
    assert sizes == [4, 1, 1, 1, 1]


# --- offloading ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_needs_an_accelerator(pipe, verb, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu")
    with pytest.raises(RuntimeError, match=f"`{verb}` requires accelerator, but not found"):
        getattr(pipe, verb)()


def test_hooks_run_for_every_component_in_the_order_of_the_offload(pipe):
    """Decoding and encoding go through the entrances that accelerate's hooks guard."""
    order = record_calls(pipe, "text_encoder", "unet", "vae")
    sample(pipe, num_inference_steps=2)
    assert order == pipe.model_cpu_offload_seq.replace("unet", "unet->unet").split("->")


def test_model_offload_fetches_each_component_when_it_is_needed(pipe, monkeypatch):
    """The real hooks, with `cpu:0` in the role of the accelerator. (They leave out the way back during a call, for
    they see that the weights are in host memory; that at the end of a call is gone.)"""
    expected = sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(getattr(pipe, name)): name for name in ("text_encoder", "unet", "vae")}
    fetched, there = [], set()
    move = torch.nn.Module.to

    def to(module, device, *arguments, **options):
        name = names.get(id(module))
        if name and str(device) == "cpu:0":
            fetched.append(name)
            there.add(name)
        elif name:
            there.discard(name)
        return move(module, device, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert torch.equal(sample(pipe), expected)
    assert list(dict.fromkeys(fetched)) == pipe.model_cpu_offload_seq.split("->")
    assert not there


def test_sequential_offload_makes_the_same_video(pipe):
    """With every weight away until its layer runs, as `enable_sequential_cpu_offload` has it."""
    from accelerate import cpu_offload

    expected = sample(pipe, num_frames=1)
    for name in ("text_encoder", "unet", "vae"):
        cpu_offload(getattr(pipe, name), "cpu")
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())
    assert torch.equal(sample(pipe, num_frames=1), expected)
