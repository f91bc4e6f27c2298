"""The methods that the figures compare: samplers, noise and batches."""

import numpy as np

from diffusers_mcm.lora import lora_layers
from diffusers_mcm.shapes.methods import MCM_METHODS, TEACHER_METHODS, Networks
from tests.tiny import save_tiny_lora


def test_every_method_starts_a_seed_from_the_same_noise(tiny_base):
    networks = Networks({"teacher": tiny_base, "mcm": tiny_base})
    starts = {}
    for method in (TEACHER_METHODS[1], TEACHER_METHODS[2], MCM_METHODS[0]):
        pipeline = networks.pipeline(method.network)
        seen = []
        handle = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # noqa: B023
        networks.sample(method, ["a red ring", "a blue circle"], [0, 1])
        handle.remove()
        starts[method.name] = seen[0][:2].numpy()
        assert len(seen) == method.steps
    first, *others = starts.values()
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)


def test_a_lora_is_fused(tiny_base, tmp_path):
    lora = save_tiny_lora(tmp_path, base=tiny_base)
    pipeline = Networks({"mcm": str(lora)}).pipeline("mcm")
    assert pipeline.fused_loras == {"mcm"} and not lora_layers(pipeline.unet)


def test_batches_and_single_videos_agree(tiny_base):
    networks = Networks({"mcm": tiny_base})
    both = networks.sample(MCM_METHODS[1], ["a red ring", "a blue circle"], [3, 4])
    (alone,), seconds = networks.timed(MCM_METHODS[1], ["a blue circle"], [4])
    assert both.dtype == np.uint8 and both.shape[0] == 2 and seconds > 0
    assert np.abs(both[1].astype(int) - alone).max() <= 1
