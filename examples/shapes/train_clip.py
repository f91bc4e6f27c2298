"""Trains the small CLIP of the shapes world on captions and frames; teacher and discriminator read its text side.

A frame cannot show motion, so all captions that agree in colour, shape and background are equally right for it, and
the motion words are learned from a second view: what changes between the first and the last frame of a clip.
"""

import json

import numpy as np
import torch
from common import Frames, parser, save_half, to_pixels, train
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, all_captions, parse

LENGTH = 16
WIDTH = 96


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair of neighbours, left to right."""
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build_tokenizer(folder) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the grammar's words whole and everything else letter by letter."""
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)] + list(".,'-!?")
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges, split = [], {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    while unfinished := [pieces for pieces in split.values() if len(pieces) > 1]:
        pair = tuple(unfinished[0][:2])  # merged in every word at once, so that the ranks reproduce it
        merges.append(pair)
        vocabulary.append("".join(pair))
        split = {word: merge(pieces, pair) for word, pieces in split.items()}
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    side = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = side | {
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = side | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


class FrameAndMotion(nn.Module):
    """The CLIP model with what only its training needs: a view of change, and the words read back from the text."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        self.change = nn.Linear(2 * WIDTH, WIDTH)
        self.words = nn.ModuleList(nn.Linear(WIDTH, len(words)) for words in (COLOURS, SHAPES, MOTIONS, BACKGROUNDS))


def soft_contrast(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy where every pair marked in `same` (B, B) is equally right."""
    target = same.float()
    rows = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def main() -> None:
    args = parser(__doc__.splitlines()[0], steps=1000, batch=32, lr=1e-3).parse_args()
    data = Frames(args.data)
    tokenizer = build_tokenizer(args.output)
    model = FrameAndMotion(build(tokenizer))
    images, domains = data.images, list(data.images)
    vocabulary = [list(words) for words in (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)]

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index = rng.integers(len(data.videos), size=args.batch)
        first, last = (to_pixels(np.stack([data.videos[i, t] for i in index])) for t in (0, 15))
        domain = domains[rng.integers(len(domains))]
        image_index = rng.integers(len(images[domain]), size=args.batch // 2)
        captions = [data.captions["videos"][i] for i in index] + [data.captions[domain][i] for i in image_index]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
        captions = [parse(caption) for caption in captions]
        text = model.clip.get_text_features(**tokens).pooler_output
        views = torch.cat([first, last, to_pixels(images[domain][image_index])])
        seen_first, seen_last, seen_image = model.clip.get_image_features(views).pooler_output.split(
            [args.batch, args.batch, args.batch // 2]
        )
        words_of_text = F.normalize(text, dim=-1)
        scale = model.clip.logit_scale.exp().clamp(max=100)
        same_look = torch.tensor([[a[:2] == b[:2] and a[3] == b[3] for b in captions] for a in captions])
        same_motion = torch.tensor([[a.motion == b.motion for b in captions] for a in captions])
        frames = F.normalize(torch.cat([seen_first, seen_image]), dim=-1)
        frame = soft_contrast(scale * words_of_text @ frames.T, same_look)
        change = F.normalize(model.change(torch.cat([seen_first, seen_last], -1)), dim=-1)
        same = (same_look & same_motion)[: args.batch, : args.batch]
        motion = soft_contrast(scale * words_of_text[: args.batch] @ change.T, same)
        labels = torch.tensor([[v.index(w) for v, w in zip(vocabulary, c)] for c in captions])
        words = sum(F.cross_entropy(head(text), labels[:, i]) for i, head in enumerate(model.words))
        return {"loss": frame + motion + 0.2 * words, "frame": frame, "motion": motion, "words": words}

    train("clip", model, loss_step, args)
    clip = model.clip
    save_half(clip, args.output)


if __name__ == "__main__":
    main()
