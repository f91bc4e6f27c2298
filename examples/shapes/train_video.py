"""Trains the VideoMAE-architecture feature network of the shapes world, with which sets of videos are compared.

It learns to tell colour, shape, motion, background and domain from the mean of its tokens, which is the feature that
a comparison reads. A network learns such words from a single frame first, and motion last; that the mean shall also
give the speed, and the tokens of each moment the place and size of the shape then, makes it look at time early.

No folder is read: every clip is rendered for its step, of a caption that training may read.
"""

import numpy as np
import torch
from common import parser, save_half, to_pixels, train
from torch import nn
from torch.nn import functional as F
from transformers import VideoMAEConfig, VideoMAEModel

from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Caption, training_captions
from diffusers_mcm.shapes.render import DOMAINS, render_video, trajectory

WIDTH, PATCH, SIZE, FRAMES, TUBELET = 96, 16, 64, 16, 2
VOCABULARY = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "motion": list(MOTIONS),
    "background": list(BACKGROUNDS),
    "domain": list(DOMAINS),
}
WEIGHTS = {"colour": 0.5, "shape": 1.0, "motion": 1.0, "background": 0.3, "domain": 0.3}
SPEED_WEIGHT, PLACE_WEIGHT = 2.0, 2.0
SEEDS = 1_000_000  # from which clips are drawn: none is shown twice, and none is one of the few that are measured


def build() -> VideoMAEModel:
    return VideoMAEModel(
        VideoMAEConfig(
            image_size=SIZE,
            patch_size=PATCH,
            num_frames=FRAMES,
            tubelet_size=TUBELET,
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            use_mean_pooling=False,  # the layer norm at the end stays with the backbone
        )
    )


class Classifier(nn.Module):
    """The network with the heads that only its training needs."""

    def __init__(self, network: VideoMAEModel):
        super().__init__()
        self.network = network
        self.words = nn.ModuleDict({name: nn.Linear(WIDTH, len(words)) for name, words in VOCABULARY.items()})
        self.speed = nn.Linear(WIDTH, 3)
        self.place = nn.Linear(WIDTH, 3)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, T, 3, H, W) in [-1, 1] -> the mean token (B, C), and that of each moment (B, T / TUBELET, C)."""
        moments = self.network(pixels).last_hidden_state.unflatten(1, (FRAMES // TUBELET, -1)).mean(2)
        return moments.mean(1), moments


def draw(rng: np.random.Generator, count: int, captions: list[Caption]) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """So many clips: pixels, the index of each word, and centre x, y and log radius at each moment (B, T, 3)."""
    clips, words, paths = [], {name: [] for name in VOCABULARY}, []
    for i in range(count):
        caption, seed = captions[rng.integers(len(captions))], int(rng.integers(1000, SEEDS))
        domain = DOMAINS[i % len(DOMAINS)]
        clips.append(render_video(caption, seed, domain))
        for name, word in (caption._asdict() | {"domain": domain}).items():
            words[name].append(VOCABULARY[name].index(word))
        path = trajectory(caption, seed)
        paths.append(np.concatenate([path.centre, np.log(path.radius)[:, None]], axis=1))
    moments = torch.from_numpy(np.stack(paths)).float().unflatten(1, (-1, TUBELET)).mean(2)
    return to_pixels(np.stack(clips)), {name: torch.tensor(these) for name, these in words.items()}, moments


def main() -> None:
    args = parser(__doc__.splitlines()[0], steps=2200, batch=24, lr=1e-3, data=False).parse_args()
    torch.manual_seed(args.seed)
    model = Classifier(build())
    captions = training_captions()
    middle = torch.tensor([0.5, 0.5, np.log(0.2)]).float()

    def loss_step(rng: np.random.Generator, _: torch.Generator) -> dict[str, torch.Tensor]:
        pixels, words, path = draw(rng, args.batch, captions)
        pooled, moments = model(pixels)
        logits = {name: head(pooled) for name, head in model.words.items()}
        told = {name: F.cross_entropy(logits[name], words[name]) for name in VOCABULARY}
        speed = F.smooth_l1_loss(model.speed(pooled), 4 * (path[:, -1] - path[:, 0]))
        place = F.smooth_l1_loss(model.place(moments), 4 * (path - middle))
        loss = sum(WEIGHTS[name] * told[name] for name in told) + SPEED_WEIGHT * speed + PLACE_WEIGHT * place
        named = {name: (logits[name].argmax(1) == words[name]).float().mean() for name in ("shape", "motion")}
        right = {f"{name}_right": share for name, share in named.items()}
        return {"loss": loss, "speed": speed, "place": place, **told, **right}

    train("video", model, loss_step, args)
    save_half(model.network, args.output)


if __name__ == "__main__":
    main()
