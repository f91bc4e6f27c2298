import pytest
import torch

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.lora import add_lora, fused, lora_state_dict
from tests.tiny import EXACT, TEXT_DIM, randomise_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 5, TEXT_DIM, generator=generator)
    return unet(latents.double(), torch.tensor([500]), embeds.double()).sample


@pytest.mark.parametrize("alpha", [2, 6])
def test_fused_is_the_adapted_network_and_leaves_it_alone(alpha):
    unet = tiny_unet().requires_grad_(False)
    add_lora(unet, MODELSCOPE.lora_target_modules(unet), rank=2, alpha=alpha)
    randomise_lora(unet)
    unet.double()
    adapted, call = output(unet), fused(unet)
    torch.testing.assert_close(output(call), adapted, **EXACT)
    assert torch.equal(output(unet), adapted)
    for tensor in lora_state_dict(unet).values():
        tensor.zero_()
    assert not torch.allclose(output(unet), adapted, atol=1e-3)
    torch.testing.assert_close(output(call), adapted, **EXACT)  # the sums were made once
