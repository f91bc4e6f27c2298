"""What AnimateDiff's pipeline offers besides: IP-Adapter, FreeNoise, clip skip, texts for frames."""

import pytest
import torch

from diffusers_mcm.lora import lora_layers
from tests.pipelines import test_animatediff
from tests.pipelines.test_animatediff import GUIDED, PROMPT, assert_same, give_ip_adapter, random_lora, sample
from tests.tiny import (
    EXACT,
    SIZE,
    tiny_text_encoder,
)

pipe, both = test_animatediff.pipe, test_animatediff.both


def test_ip_adapter(both, tmp_path):
    ours = both[0]
    plain = sample(ours)
    for pipe in both:
        give_ip_adapter(pipe)
    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    assert_same(both, ip_adapter_image_embeds=[picture])
    assert_same(both, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(picture), picture])], **GUIDED)
    assert not torch.allclose(sample(ours, ip_adapter_image_embeds=[picture]), plain)
    mask = {"ip_adapter_masks": [torch.zeros(1, 1, SIZE, SIZE)]}
    masked = sample(ours, ip_adapter_image_embeds=[picture], cross_attention_kwargs=mask)
    torch.testing.assert_close(masked, plain, **EXACT)
    with pytest.raises(ValueError, match="An IP-Adapter and a picture go together: give `ip_adapter_image`"):
        sample(ours)
    with pytest.raises(ValueError, match="An IP-Adapter cannot be saved with the pipeline; `unload_ip_adapter"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="either `ip_adapter_image` or `ip_adapter_image_embeds`"):
        sample(ours, ip_adapter_image=torch.zeros(1, 3, 8, 8), ip_adapter_image_embeds=[picture])


def test_a_picture_without_an_ip_adapter(pipe):
    with pytest.raises(ValueError, match="go together: a picture was given, but no IP-Adapter is loaded"):
        sample(pipe, ip_adapter_image_embeds=[torch.zeros(1, 1, 8)])


def test_free_noise(both):
    for pipe in both:
        pipe.enable_free_noise(context_length=4, context_stride=2)
    long = dict(num_frames=10, num_inference_steps=1)
    assert_same(both, equal=False, **long)
    assert_same(both, equal=False, prompt={0: PROMPT, 6: "a blue square"}, **long, **GUIDED)
    assert_same(both, equal=False, prompt={0: PROMPT, 9: "a blue square"}, **long)
    ours, pair = both[0], [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    latents = ours([PROMPT] * 2, generator=pair, output_type="latent", height=SIZE, width=SIZE, **long).frames
    torch.testing.assert_close(latents[:1], sample(ours, **long), **EXACT)
    with pytest.raises(ValueError, match="text for frame 12 of a clip of 10"):
        sample(ours, prompt={0: PROMPT, 12: "a blue square"}, **long)
    with pytest.raises(ValueError, match="must name a text for frame 0"):
        sample(ours, prompt={1: PROMPT}, **long)


def test_free_noise_around_a_lora(pipe):
    plain = sample(pipe)
    targets = [
        name for name in pipe.base_model.lora_target_modules(pipe.unet) if "up_blocks.1.motion_modules.0" in name
    ]
    pipe.load_lora_weights(random_lora(pipe.unet, targets), "mcm")
    pipe.set_adapters("mcm", 0.7)
    before = sample(pipe)
    pipe.fuse_lora()
    fused = sample(pipe)
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert type(pipe.unet.mid_block.motion_modules[0].transformer_blocks[0]).__name__ == "FreeNoiseTransformerBlock"
    torch.testing.assert_close(sample(pipe), fused, **EXACT)
    assert sample(pipe, num_frames=10).shape[2] == 10
    pipe.unfuse_lora()
    pipe.disable_free_noise()
    assert torch.equal(sample(pipe), before)
    pipe.unload_lora_weights()
    assert not lora_layers(pipe.unet) and torch.equal(sample(pipe), plain)
    with pytest.raises(ValueError, match="`prompt` may be a dictionary of frames only after `enable_free_noise"):
        sample(pipe, prompt={0: PROMPT})


def test_clip_skip_is_a_text_encoder_without_its_last_layers(pipe):
    skipped = sample(pipe, clip_skip=1)
    short = tiny_text_encoder().double()
    del short.encoder.layers[1:]
    pipe.text_encoder = short
    torch.testing.assert_close(sample(pipe), skipped, **EXACT)
