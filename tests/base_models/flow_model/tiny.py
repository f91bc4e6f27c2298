"""The model's networks with random weights, as a repository on disk."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.tiny import LATENT_CHANNELS, TEXT_DIM

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Letters, with a word's first marked."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS, *(f"\u2581{letter}" for letter in _LETTERS)]
    return T5Tokenizer(vocab=[(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], extra_ids=0)


def flow_components(seed: int = 0) -> dict:
    """The components under the names that a Wan repository gives them; the teacher is sampled with another shift."""
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[-0.5, 0.25, 0.0, 0.5],
            latents_std=[0.5, 2.0, 1.0, 1.5],
            scale_factor_spatial=4,
        )
        sizes = dict(d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    networks = dict(transformer=transformer.eval(), vae=vae.eval(), text_encoder=text_encoder.eval())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return networks | dict(tokenizer=tokenizer, scheduler=scheduler)


def save_flow_base(folder: Path, seed: int = 0) -> Path:
    """The repository that `WanPipeline.save_pretrained` writes."""
    WanPipeline(**flow_components(seed)).save_pretrained(folder)
    return folder
