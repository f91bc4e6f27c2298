"""Wan with random weights, as a repository on disk: the sizes are those of diffusers' own tests of `WanPipeline`."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

SIZE = 32  # pixels; latents are 4 x 4, or 2 x 2 of TI2V
NUM_FRAMES = 9  # three of the latents
CHANNELS = {"wan": 16, "wan-ti2v": 48, "wan-a14b": 16}
BOUNDARY = 0.875  # where the two experts of Wan 2.2 A14B meet
TEXT_DIM = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VAE = dict(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
_VAES = {
    "wan": _VAE | dict(z_dim=16),
    "wan-a14b": _VAE | dict(z_dim=16),
    "wan-ti2v": _VAE
    | dict(z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2, scale_factor_spatial=16),
}


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Letters, with a word's first marked."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS, *(f"\u2581{letter}" for letter in _LETTERS), "&", ";"]
    return T5Tokenizer(vocab=[(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], extra_ids=0)


def tiny_wan_transformer(kind: str = "wan", seed: int = 0, **overrides) -> WanTransformer3DModel:
    sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_dim=TEXT_DIM)
    channels = dict(in_channels=CHANNELS[kind], out_channels=CHANNELS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**(sizes | channels | dict(rope_max_seq_len=32) | overrides)).eval()


def tiny_wan_vae(kind: str = "wan", seed: int = 0) -> AutoencoderKLWan:
    channels = CHANNELS[kind]
    statistics = dict(
        latents_mean=torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=torch.linspace(0.5, 2.0, channels).tolist(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**(_VAES[kind] | statistics)).eval()


def wan_components(kind: str = "wan", seed: int = 0) -> dict:
    """The components under the names that a Wan repository gives them; the teacher is sampled with another shift."""
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = dict(d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes)).eval()
    second = dict(transformer_2=tiny_wan_transformer(kind, seed + 1)) if kind == "wan-a14b" else {}
    return second | dict(
        transformer=tiny_wan_transformer(kind, seed),
        vae=tiny_wan_vae(kind, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def save_wan_base(folder: Path, kind: str = "wan", seed: int = 0) -> Path:
    """The repository that `WanPipeline.save_pretrained` writes."""
    settings = dict(expand_timesteps=kind == "wan-ti2v", boundary_ratio=BOUNDARY if kind == "wan-a14b" else None)
    WanPipeline(**wan_components(kind, seed), **settings).save_pretrained(folder)
    return folder
