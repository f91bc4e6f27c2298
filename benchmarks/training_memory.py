"""The memory that a training step needs at a base model's full size, counted on tensors without data.

    python benchmarks/training_memory.py --document docs/performance.md
    python benchmarks/training_memory.py --rows "ModelScope 256×256×16"

A whole step of one clip runs, with the discriminator and with AdamW's moments there, in bfloat16 as on an NVIDIA card:
autocast gives normalisations and softmax float32 there, which a CPU's does not, so that it is done here. The
most that was alive at once is kept. That is what the tensors need; the libraries' work space and what the allocator
cannot use comes on top. Every result goes into --output, and from there into the table of --document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from memory import GIB, TensorBytes
from random_weights import TEACHERS, WAN_BLOCKS, architectures, materialise
from results import read_results, write_results
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model, UMT5EncoderModel

from diffusers_mcm.base_models import BaseModel, get_base_model
from diffusers_mcm.distillation import student as student_module
from diffusers_mcm.distillation.adversarial import AdversarialStep
from diffusers_mcm.distillation.discriminator import Discriminator
from diffusers_mcm.distillation.discriminator.model import ImageFeatures
from diffusers_mcm.distillation.draws import StepDraws, draw_adversarial
from diffusers_mcm.distillation.method import MethodConfig
from diffusers_mcm.distillation.motion import build_motion
from diffusers_mcm.distillation.student import Student
from diffusers_mcm.features import PatchFeatures, TextFeatures
from diffusers_mcm.lora import add_lora, lora_disabled, lora_layers
from diffusers_mcm.tables import replace_section, table

CARDS = (16, 24, 48, 80)  # GB, as they are sold
SPARE = 1.1  # of what is counted a card must have so much: work space, fragments, the driver
PROCESSES = 8  # of those that share a sharded row
FEW_BLOCKS = (4, 8)
VARIANTS = {"plain": False, "checkpointing": True}  # label -> whether layers are recomputed


@dataclass(frozen=True)
class Row:
    """A base model and the size of its clips."""

    teacher: str  # of `random_weights.TEACHERS`
    num_frames: int
    height: int
    width: int
    frame_decoder: str = "exact"


ROWS = {
    "ModelScope 256×256×16": Row("modelscope", 16, 256, 256),
    "AnimateDiff 512×512×16": Row("animatediff", 16, 512, 512),
    "Wan 1.3B 256×256×17": Row("wan-1.3b", 17, 256, 256),
    "Wan 1.3B 480×832×33": Row("wan-1.3b", 33, 480, 832),
    "Wan 1.3B 480×832×81": Row("wan-1.3b", 81, 480, 832),
    "Wan 5B 704×1280×121": Row("wan-5b", 121, 704, 1280),
    "Wan 14B 480×832×81": Row("wan-14b", 81, 480, 832),
}
SHARDED = ("Wan 5B 704×1280×121", "Wan 14B 480×832×81")


# --- the networks ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Networks:
    """All that is on the device, made of tensors with or without data."""

    base: BaseModel
    denoiser: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    discriminator: Discriminator

    @property
    def trained(self) -> list[nn.Parameter]:
        return [
            p for module in (self.denoiser, self.discriminator.heads) for p in module.parameters() if p.requires_grad
        ]


def blueprints(teacher: str, size: str, blocks: int | None = None) -> dict[str, nn.Module]:
    """The networks of a step on the meta device, the denoiser with its LoRA; Wan's with so many of its blocks."""
    base, rank = get_base_model(TEACHERS[teacher]), {"full": 64, "tiny": 2}[size]
    names = ("denoiser", "vae", "text_encoder")
    with init_empty_weights():
        networks = {name: build() for name, build in zip(names, architectures(teacher, size, blocks))}
        width, layers = {"full": (384, 12), "tiny": (32, 12)}[size]
        heads = dict(num_attention_heads=width // 32, num_hidden_layers=layers, hidden_size=width)
        networks["features"] = Dinov2Model(Dinov2Config(**heads, image_size=518, patch_size=14))
        width, layers = {"full": (1024, 24), "tiny": (32, 2)}[size]
        heads = dict(num_attention_heads=width // 32, num_hidden_layers=layers, hidden_size=width)
        clip = CLIPTextConfig(
            **heads, intermediate_size=4 * width, projection_dim=width, bos_token_id=0, eos_token_id=1
        )
        networks["clip"] = CLIPTextModelWithProjection(clip)
    with torch.device("meta"):
        add_lora(networks["denoiser"], base.lora_target_modules(networks["denoiser"]), rank, rank)
    return networks


def realise(blueprint: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with memory for its weights, a LoRA's in float32."""
    network = materialise(lambda: blueprint, dtype, "cpu")
    for layer in lora_layers(network).values():
        for half in (layer.lora_A, layer.lora_B):
            for part in half.values():
                part.weight = nn.Parameter(part.weight.detach().float())
    if isinstance(network, UMT5EncoderModel):
        network.encoder.embed_tokens = network.shared  # as when it is loaded
    return network


def build(teacher: str, networks: dict[str, nn.Module], dtype: torch.dtype) -> Networks:
    base = get_base_model(TEACHERS[teacher])
    own = {"vae": base.vae_dtype or dtype}
    made = {name: realise(network, own.get(name, dtype)) for name, network in networks.items()}
    features, text = PatchFeatures(made.pop("features")), TextFeatures(made.pop("clip"), None)
    return Networks(base, **made, discriminator=Discriminator.with_fresh_heads(features, text))


# --- the step --------------------------------------------------------------------------------------------------------
class Picked:
    """The frames that are judged: the last two that do not share a latent; their numbers are known without data."""

    def __init__(self, num_frames: int, draws: torch.Tensor):
        self.rows = [[num_frames // 2 - 1, num_frames - 1]] * len(draws)

    def tolist(self) -> list[list[int]]:
        return self.rows

    def to(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(len(self.rows), 2, dtype=torch.long, device=device)


@contextmanager
def whatever_the_values() -> Iterator[None]:
    """What a step decides by its draws is decided here: the clip is encoded. (A start that the student makes itself
    needs less: the teacher calls the network for two clips.)"""

    def encode_real(student: Student, pixels: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        return student.base.encode_video(student.vae, pixels, draws.encoder_noise)

    def extract(discriminator: Discriminator, images: torch.Tensor, draws: Any) -> ImageFeatures:
        size = discriminator.features.input_size
        pixels = F.interpolate(images.float(), (size, size), mode="area")
        return ImageFeatures(pixels, discriminator.features(pixels))

    with ExitStack() as patches:
        start = dict(
            mixed_start=lambda denoise, path, x_0, *draws, **_: x_0,
            noisy_start=lambda path, x_0, noise, t: path.add_noise(x_0, noise, t),
        )
        patches.enter_context(mock.patch.multiple(student_module, **start, pick_frames=Picked))
        patches.enter_context(mock.patch.object(Student, "encode_real", encode_real))
        patches.enter_context(mock.patch.object(Discriminator, "extract", extract))
        yield


@contextmanager
def float32_as_on_cuda() -> Iterator[None]:
    """In autocast these compute in float32 on CUDA, and in half precision on a CPU."""

    def widened(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and torch.is_autocast_enabled("cpu") else x

        return lambda *args, **options: function(*map(widen, args), **{key: widen(x) for key, x in options.items()})

    names = ("group_norm", "layer_norm", "softmax", "normalize")
    with mock.patch.multiple(F, **{name: widened(getattr(F, name)) for name in names}):
        yield


def run_step(row: Row, networks: Networks, path: Any, dtype: torch.dtype) -> None:
    """Gradients of one clip for everything that is trained, as `Trainer.backward` takes them."""
    base, denoiser = networks.base, networks.denoiser
    size = (row.num_frames, row.height, row.width)
    shape = base.latent_shape(denoiser, networks.vae, *size)
    config = MethodConfig(frame_decoder=row.frame_decoder)
    teacher = partial(lora_disabled, denoiser)
    student = Student(base, denoiser, networks.vae, path, build_motion("learnable", shape[0]), config, teacher).eval()
    pixels, noise = torch.empty(1, 3, *size), torch.empty(1, *shape)
    text = {"prompt_embeds": torch.empty(1, *text_shape(base, denoiser), dtype=dtype)}
    draws = StepDraws(
        *(torch.ones(1), torch.ones(1), noise, torch.empty_like(noise), torch.empty_like(noise)),
        coin=torch.zeros(1),
        frames=torch.zeros(1, 2),
    )
    discriminator = networks.discriminator
    read = torch.empty(2, discriminator.text.text_dim)
    real = torch.empty(2, 3, row.height, row.width)
    adversary = AdversarialStep(discriminator, config, draw_adversarial(0, [0], 2), read, real, read)
    known = dict(coefficients=lambda t: (torch.ones(len(t)), torch.ones(len(t))), previous_timestep=lambda t, _: t)
    # The recomputed part of the backward pass is in autocast as it was.
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)
    with mock.patch.multiple(path, **known), whatever_the_values(), float32_as_on_cuda():
        with autocast():
            losses = student(pixels, text, text, draws, adversary)
        losses.total.backward()
        with autocast():
            hinge, penalty, _ = adversary.discriminator_loss(discriminator, losses.generator)
        (hinge + penalty).backward()


def text_shape(base: BaseModel, denoiser: nn.Module) -> tuple[int, int]:
    return (512 if base.name.startswith("wan") else 77), base.text_features(denoiser)


def count(row: Row, checkpointing: bool) -> dict[str, int]:
    """Bytes at the peak of a step of a full-size network, and what of them the networks take.

    The many blocks of a Wan are alike: each adds the same to everything, so a few are counted, and the others added.
    """
    if row.teacher not in WAN_BLOCKS:
        return count_whole(row, checkpointing)
    few, more = (count_whole(row, checkpointing, blocks=blocks) for blocks in FEW_BLOCKS)
    steps = (WAN_BLOCKS[row.teacher] - FEW_BLOCKS[0]) / (FEW_BLOCKS[1] - FEW_BLOCKS[0])
    return {name: round(few[name] + steps * (more[name] - few[name])) for name in few}


def count_whole(
    row: Row, checkpointing: bool, size: str = "full", real: bool = False, blocks: int | None = None
) -> dict[str, int]:
    """The same of the network as it is, or with so many blocks; `real` for tensors that do hold data."""
    dtype = torch.bfloat16 if size == "full" else torch.float32
    drawings, path = blueprints(row.teacher, size, blocks), get_base_model(TEACHERS[row.teacher]).noise_path(None)
    fake = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    with fake, TensorBytes() as alive:
        networks = build(row.teacher, drawings, dtype)
        if checkpointing:
            networks.base.enable_gradient_checkpointing(networks.denoiser)
            networks.base.enable_decoder_checkpointing(networks.vae)
        moments = [torch.empty_like(parameter) for parameter in networks.trained for _ in "mv"]
        found = {"networks": alive.now} | parts(networks)
        alive.peak = alive.now
        run_step(row, networks, path, dtype)
        del moments  # which AdamW would have kept until here
        return found | {"peak": alive.peak}


def parts(networks: Networks) -> dict[str, int]:
    """What of the networks need not be on the device, or not whole."""

    def size(*modules: nn.Module) -> int:
        frozen = (p for module in modules for p in module.parameters() if not p.requires_grad)
        return sum(parameter.nbytes for parameter in frozen)

    blocks = getattr(networks.denoiser, "blocks", [networks.denoiser])
    return {
        "text encoders": size(networks.text_encoder, networks.discriminator.text),
        "denoiser": size(networks.denoiser),
        "largest block": max(size(block) for block in blocks),
    }


# --- the table -------------------------------------------------------------------------------------------------------
def peaks(counted: dict[str, dict[str, int]], sharded: bool = False) -> dict[str, float]:
    """GiB on one card, by what is done for memory.

    Of a sharded denoiser the frozen weights of two blocks only are whole, of the one that computes and of the one that
    comes next; what is trained is whole in each process, with its gradients and moments.
    """
    found = {}
    for variant, of in counted.items():
        away = (1 - 1 / PROCESSES) * of["denoiser"] - 2 * of["largest block"] if sharded else 0
        found[variant] = (of["peak"] - away) / GIB
        if variant == "checkpointing":
            found["text encoders in host memory"] = (of["peak"] - away - of["text encoders"]) / GIB
    return found


def cells_of(counted: dict[str, dict[str, int]], sharded: bool = False) -> dict[str, str]:
    found = peaks(counted, sharded)
    cards = [card for card in CARDS if card >= SPARE * found["text encoders in host memory"]]
    networks = counted["checkpointing"]["networks"] / GIB
    cells = {} if sharded else {"networks": f"{networks:.1f}"}
    cells |= {variant: f"{size:.1f}" for variant, size in found.items()}
    return cells | {"smallest card": f"{cards[0]} GB" if cards else "none of one"}


def lines(results: dict[str, dict]) -> list[tuple[str, dict[str, str]]]:
    """The table: each row, and those that are sharded once more."""
    found = []
    for label in filter(results.get, ROWS):
        found.append((label, cells_of(results[label])))
        if label in SHARDED:
            found.append((f"{label}, sharded over {PROCESSES}", cells_of(results[label], sharded=True)))
    return found


COLUMNS = ["networks", "checkpointing", "text encoders in host memory", "smallest card"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["checkpointing"])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/training_memory.json"), help="results, added to"
    )
    parser.add_argument("--document", type=Path, help="file whose <!-- training memory --> section takes the table")
    options = parser.parse_args()
    results = read_results(options.output)
    for label in options.rows:
        for variant in options.variants:
            results.setdefault(label, {})[variant] = count(ROWS[label], VARIANTS[variant])
        write_results(options.output, results)
        print(label, cells_of(results[label]), flush=True)
    if options.document:
        replace_section(options.document, "training memory", table(lines(results), COLUMNS))


if __name__ == "__main__":
    main()
