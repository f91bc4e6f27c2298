"""A denoiser, and a LoRA for it in a folder."""

import pytest

from diffusers_mcm.base_models import get_base_model
from tests.tiny import save_tiny_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


@pytest.fixture
def unet():
    return tiny_unet().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    modules = MODELSCOPE.lora_target_modules(tiny_unet())
    return save_tiny_lora(tmp_path_factory.mktemp("lora"), base="owner/base", revision="abc", modules=modules)
