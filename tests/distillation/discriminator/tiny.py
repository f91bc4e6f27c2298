"""Tiny random frozen networks and a discriminator made of them."""

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

from diffusers_mcm.distillation.discriminator import Discriminator, DiscriminatorHeads
from diffusers_mcm.features import PatchFeatures, TextFeatures
from tests.tiny import TEXT_LENGTH, tiny_tokenizer

BLOCKS = (0, 2, 3)
IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
FEATURE_DIM = 16
TEXT_DIM = 12


def tiny_dinov2(**overrides) -> Dinov2Model:
    config = dict(
        hidden_size=FEATURE_DIM,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_range=0.3,  # or the tokens of every image would be nearly alike
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dinov2Model(Dinov2Config(**(config | overrides))).eval()


def tiny_clip_config(**overrides) -> CLIPTextConfig:
    tokenizer = tiny_tokenizer()
    config = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_DIM,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextConfig(**(config | overrides))


def tiny_clip_text() -> CLIPTextModelWithProjection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModelWithProjection(tiny_clip_config()).eval()


def tiny_heads(seed: int = 0) -> DiscriminatorHeads:
    return DiscriminatorHeads(len(BLOCKS), FEATURE_DIM, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def tiny_discriminator(judges_changes: bool = False) -> Discriminator:
    text = TextFeatures(tiny_clip_text(), tiny_tokenizer())
    change_heads = tiny_heads(1) if judges_changes else None
    return Discriminator(PatchFeatures(tiny_dinov2(), BLOCKS), tiny_heads(), text, change_heads=change_heads)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
