import hashlib
import json

import pytest
import torch
from diffusers import UNet3DConditionModel

from diffusers_mcm.base_models import BASE_MODELS, get_base_model, infer_base_model
from diffusers_mcm.base_models.base import BaseModel
from diffusers_mcm.lora import fresh_lora
from tests.tiny import (
    NUM_FRAMES,
    TEXT_DIM,
    TEXT_LENGTH,
    tiny_unet,
    tiny_vae,
)

MODELSCOPE = get_base_model("modelscope")


@pytest.fixture(scope="module")
def vae():
    return tiny_vae().requires_grad_(False).double()


@pytest.fixture(scope="module")
def full_size_unet():
    with torch.device("meta"):
        return UNet3DConditionModel(sample_size=32)  # the defaults are ModelScope's configuration


def test_table():
    assert all(isinstance(model, BaseModel) and name == model.name for name, model in BASE_MODELS.items())
    with pytest.raises(ValueError, match="Unknown base model 'sora'. Known base models: animatediff, modelscope"):
        get_base_model("sora")


def test_lora_targets_are_those_of_the_released_adapters(full_size_unet):
    assert sum(parameter.numel() for parameter in full_size_unet.parameters()) == 1_411_233_860
    targets = MODELSCOPE.lora_target_modules(full_size_unet)
    kinds = [type(full_size_unet.get_submodule(name)).__name__ for name in targets]
    assert (len(targets), kinds.count("Linear"), kinds.count("Conv2d")) == (482, 418, 64)
    with torch.device("meta"):
        tensors = fresh_lora(full_size_unet, targets, rank=64).tensors
    assert len(tensors) == 964 and sum(tensor.numel() for tensor in tensors.values()) == 96_022_528
    # A digest of the released adapters' keys and shapes.
    layout = sorted((f"base_model.model.{key}", list(tensor.shape)) for key, tensor in tensors.items())
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    assert digest == "b087f1860273652022b181bb8067ca67b61a2662b1c74e81f39f353c36a39559"


def test_recognises_its_own_lora_and_repository():
    unet = tiny_unet()
    assert infer_base_model(lora_modules=MODELSCOPE.lora_target_modules(unet)) is MODELSCOPE
    with pytest.raises(ValueError, match="modelscope.*'blocks.0.attn.to_q'"):
        infer_base_model(lora_modules=["blocks.0.attn.to_q"])
    with pytest.raises(ValueError, match="CogVideoXPipeline.*CogVideoXTransformer3DModel.*Supported: modelscope"):
        infer_base_model(
            model_index={
                "_class_name": "CogVideoXPipeline",
                "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            }
        )


def test_denoise_is_the_networks_output():
    unet = tiny_unet()
    latents, embeds, t = (
        torch.randn(2, 4, NUM_FRAMES, 8, 8),
        torch.randn(2, TEXT_LENGTH, TEXT_DIM),
        torch.tensor([9, 99]),
    )
    with torch.no_grad():
        output = MODELSCOPE.denoise(unet, latents, t, {"prompt_embeds": embeds})
        assert torch.equal(output, unet(latents, t, embeds).sample)
