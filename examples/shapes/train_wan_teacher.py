"""Trains the miniature Wan: its transformer, and the tiny UMT5 that reads the captions, on latents of poor videos.

Flow matching, x_t = (1 − σ) x_0 + σ ε, of which the network predicts ε − x_0; single first frames first, then clips.
"""

import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from common import parser, save_half, train
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch.nn import functional as F
from train_teacher import CAPTION_DROPOUT, Latents, oracle_shares
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffusers_mcm.base_models.wan import NEGATIVE_PROMPT, TEXT_LENGTH, Wan
from diffusers_mcm.shapes.captions import all_captions, spaced, training_captions

TEXT_WIDTH = 64
TEXT_TOKENS = 10  # of a caption, with the end of the text
UNCONDITIONAL = ("", NEGATIVE_PROMPT)  # what stands for a caption that is left out: guidance may lead away from either
TRAINING_SHIFT = 2.0  # of the σ that are trained: there is more to decide where there is more noise
WATCH_SHIFT = 3.0  # of the σ that the oracle's videos are sampled at


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the grammar's words whole and other Latin ones letter by letter.

    What else stands in a row is one unknown token, so that Wan's negative prompt is as short as a caption.
    """
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [chr(c) for c in range(ord("A"), ord("Z") + 1)]
    letters += [*"0123456789"]
    pieces = [*(f"\u2581{word}" for word in words), "\u2581", *letters]
    vocabulary = ["<pad>", "</s>", "<unk>", *pieces]
    # unigrams: of the ways to cut a text the one with the best sum of scores is taken, so that whole words win
    scores = [0.0 if piece in ("<pad>", "</s>", "<unk>") else -1.0 for piece in vocabulary]
    return T5Tokenizer(vocab=list(zip(vocabulary, scores)), extra_ids=0)


class MiniatureWan(nn.Module):
    """What is trained together: the transformer and the text encoder."""

    def __init__(self, channels: int, vocabulary: int):
        super().__init__()
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=8,
            attention_head_dim=24,
            in_channels=channels,
            out_channels=channels,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=768,
            num_layers=8,
            rope_max_seq_len=32,
        )
        sizes = dict(d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
        self.text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **sizes))

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, n), padded with 0, to (B, n, TEXT_WIDTH) with zeros after the text, as Wan has it."""
        mask = (tokens != 0).long()
        return self.text_encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]


class PaddingOnce(WanAttnProcessor):
    """Wan's attention where of the padding of a text one row is given, the last.

    Wan pads every text with zeros to 512 tokens and attends to all of them. They have one key and one value, so one of
    them, its logit raised by the logarithm of their number, does the same at a fraction of the cost.
    """

    def __init__(self, times: int):
        super().__init__()
        self.raised = math.log(times)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            attention_mask = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
            attention_mask[..., -1] = self.raised
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def pad_once(transformer: WanTransformer3DModel, tokens: int) -> None:
    """Let the transformer take texts of `tokens` rows and one more of zeros, instead of 512."""
    for block in transformer.blocks:
        block.attn2.set_processor(PaddingOnce(TEXT_LENGTH - tokens))


def with_padding(text: torch.Tensor) -> torch.Tensor:
    """(B, n, width) and one row of zeros."""
    return F.pad(text, (0, 0, 0, 1))


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample(model: MiniatureWan, text, blank, shape, generator, steps: int = 16, guidance: float = 2.0) -> torch.Tensor:
    """Euler with guidance from noise: latents (B, C, T, H, W) from texts (B, n, width) and `blank` (1, n, width)."""
    x = torch.randn(len(text), *shape, generator=generator)
    both = with_padding(torch.cat([text, blank.expand_as(text)]))
    sigmas = shifted(torch.linspace(1, 0, steps + 1), WATCH_SHIFT)
    for sigma, lower in zip(sigmas, sigmas[1:]):
        t = (1000 * sigma).expand(len(both))
        cond, uncond = model.transformer(torch.cat([x, x]), t, both, return_dict=False)[0].chunk(2)
        x = x + (lower - sigma) * (uncond + guidance * (cond - uncond))
    return x


def loss_of(model: MiniatureWan, latents: Latents, tokens: dict[str, torch.Tensor], size: int, length: int | None):
    """The loss of a step: `size` clips, of which the first `length` latent frames are taken, or all."""

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        clips, words = latents.draw(rng, size)
        x = torch.from_numpy(clips).transpose(1, 2)[:, :, :length]  # (B, C, T, H, W)
        for i in np.flatnonzero(rng.random(size) < CAPTION_DROPOUT):
            words[i] = UNCONDITIONAL[rng.integers(len(UNCONDITIONAL))]
        text = model.encode(torch.stack([tokens[word] for word in words]))
        # one draw from each of B equal ranges: less variance from batch to batch than independent ones
        u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        sigma = shifted(u, TRAINING_SHIFT)
        noise = torch.randn(x.shape, generator=generator)
        x_t = x + sigma.view(-1, 1, 1, 1, 1) * (noise - x)
        output = model.transformer(x_t, 1000 * sigma, with_padding(text), return_dict=False)[0]
        return {"loss": F.mse_loss(output, noise - x)}

    return loss_step


@torch.no_grad()
def watch(model: MiniatureWan, vae: AutoencoderKLWan, latents: Latents, tokens, count: int, file: Path) -> dict:
    """What the oracle says of training captions, Euler 16; the videos are kept in a file."""
    latents.refresh()
    words = [str(caption) for caption in spaced(training_captions(), count)]
    text = model.encode(torch.stack([tokens[word] for word in [*words, ""]]))
    length, channels, *size = latents.shape
    z = sample(model, text[:-1], text[-1:], (channels, length, *size), torch.Generator().manual_seed(0))
    pixels = torch.cat([Wan().decode_video(vae, part) for part in z.split(4)])
    frames = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    np.save(file, frames)
    return oracle_shares(frames, words)


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=8000, batch=16, lr=1e-3)
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--frame_steps", type=int, default=900, help="of single frames, before the clips")
    p.add_argument("--frame_batch", type=int, default=96)
    p.add_argument("--watch_every", type=int, default=500)
    p.add_argument("--watched", type=int, default=16, help="captions that are sampled and read")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
    tokenizer, latents = build_tokenizer(), Latents(args.data)
    captions = [*map(str, training_captions()), *UNCONDITIONAL]
    padded = dict(padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    tokens = dict(zip(captions, tokenizer(captions, **padded).input_ids))
    model = MiniatureWan(vae.config.z_dim, len(tokenizer)).eval()  # it has no dropout
    pad_once(model.transformer, TEXT_TOKENS)

    frames_first = Namespace(**{**vars(args), "steps": args.frame_steps})
    loss_step = loss_of(model, latents, tokens, args.frame_batch, 1)
    model = train("wan_teacher_frames", model, loss_step, frames_first, decay=0.998)
    loss_step = loss_of(model, latents, tokens, args.batch, None)
    file = args.work / "wan_teacher_watch.npy"
    seen = {"watch": lambda _, model: watch(model, vae, latents, tokens, args.watched, file)}
    model = train("wan_teacher", model, loss_step, args, decay=0.998, watch_every=args.watch_every, **seen)
    if int(os.environ.get("RANK", 0)) == 0:
        for block in model.transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        save_half(model.transformer, args.output / "transformer")
        save_half(model.text_encoder, args.output / "text_encoder")
        tokenizer.save_pretrained(args.output / "tokenizer")


if __name__ == "__main__":
    main()
