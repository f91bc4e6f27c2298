"""Lays what was trained out as the package carries it: teacher, feature networks, CLIP and LoRA, all in float16.

The teacher becomes a pipeline folder as its kind has on the Hub (vae, text_encoder, tokenizer, unet, scheduler). What
is not among the models stays as it is packaged.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from prepare import rows
from train_teacher import SCHEDULE
from train_wan_teacher import WATCH_SHIFT
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Model,
    T5Tokenizer,
    UMT5EncoderModel,
    VideoMAEImageProcessorPil,
    VideoMAEModel,
)

from diffusers_mcm import MCMPipeline
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.publish import record_sample
from diffusers_mcm.settings import CONFIG_NAME
from diffusers_mcm.shapes.captions import grammar

CARDS = Path(__file__).parents[2] / "model_cards"
# what turns frames into pixels in [-1, 1], as `common.to_pixels` does in training
PIXELS = {
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
PROMPT = "a red circle moving left on a black background"


def record_data(world: Path, file: Path) -> None:
    """Say what distillation could read; `rows` refuses held-out captions."""
    record = {"build": json.loads((world / "build.json").read_text())}
    for part in ("videos", "images/clean"):
        _, captions = rows(world / part)
        record[part] = {"items": len(captions), "captions": len(set(captions)), "held_out_captions": 0}
    file.write_text(json.dumps(record, indent=2) + "\n")


def package_lora(models: Path, name: str, teacher: Path, world: Path, scores: Path | None, target: Path) -> None:
    """A LoRA with its logs, what it was trained on, a sample clip, and the card that shows it."""
    leave = shutil.ignore_patterns("checkpoint-*", "logs", "validation*")
    shutil.copytree(models / name, target, dirs_exist_ok=True, ignore=leave)
    if (log := first_stage(models, name) / "train_log.jsonl").exists():
        shutil.copy(log, target / "train_log-appearance.jsonl")
    record_data(world, target / "data.json")
    if scores:
        shutil.copy(scores, target / "scores.json")
    name_teacher(target, teacher.name)
    pipeline = MCMPipeline.from_pretrained(target, base_model=teacher)
    video = pipeline(PROMPT, generator=torch.Generator().manual_seed(0)).frames[0]
    record_sample(target, video, PROMPT, fps=pipeline.sampling_default("fps"))
    sys.path.append(str(CARDS))
    from render import shapes_card

    (target / "README.md").write_text(shapes_card(target), encoding="utf-8")
    if target.parent == PACKAGED_FOLDER:
        shutil.copy(target / "README.md", CARDS / f"{name}.md")


def name_teacher(folder: Path, name: str) -> None:
    """Have a LoRA's settings name its teacher as the package does, wherever it lay in training."""
    file = folder / CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_repository"] = settings["training"]["pretrained_teacher_model"] = name
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_pipeline(folder: Path, kind: str, parts: dict[str, Any], sizes: dict[str, int] | None = None) -> None:
    """A repository of these components, with the grammar beside them; `kind` is diffusers' class for such a one."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": kind, "_diffusers_version": "0.42.1"} | index | (sizes or {})
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "grammar.json").write_text(json.dumps(grammar(), indent=2) + "\n")


def package_teacher(models: Path, teacher: Path) -> None:
    parts = {
        "vae": AutoencoderKL.from_pretrained(models / "vae", torch_dtype=torch.float16),
        "text_encoder": CLIPTextModel.from_pretrained(models / "clip", dtype=torch.float16),
        "tokenizer": CLIPTokenizer.from_pretrained(models / "clip"),
        "unet": UNet3DConditionModel.from_pretrained(models / "unet", torch_dtype=torch.float16),
        "scheduler": DDIMScheduler(**SCHEDULE),
    }
    write_pipeline(teacher, "TextToVideoSDPipeline", parts)


def package_wan(models: Path, teacher: Path) -> None:
    """In the layout of Wan's own repositories, with what a call defaults to."""
    parts = {
        "vae": AutoencoderKLWan.from_pretrained(models / "wan_vae", torch_dtype=torch.float16),
        "text_encoder": UMT5EncoderModel.from_pretrained(models / "wan" / "text_encoder", dtype=torch.float16),
        "tokenizer": T5Tokenizer.from_pretrained(models / "wan" / "tokenizer"),
        "transformer": WanTransformer3DModel.from_pretrained(
            models / "wan" / "transformer", torch_dtype=torch.float16
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=WATCH_SHIFT
        ),
    }
    sizes = {"height": 64, "width": 64, "num_frames": 17, "fps": 8}
    write_pipeline(teacher, "WanPipeline", parts, sizes)


def package_features(models: Path, target: Path) -> None:
    Dinov2Model.from_pretrained(models / "features", dtype=torch.float16).save_pretrained(target)


def package_clip(models: Path, target: Path) -> None:
    CLIPModel.from_pretrained(models / "clip", dtype=torch.float16).save_pretrained(target)
    CLIPTokenizer.from_pretrained(models / "clip").save_pretrained(target)
    CLIPImageProcessorPil(**PIXELS).save_pretrained(target)


def package_video(models: Path, target: Path) -> None:
    VideoMAEModel.from_pretrained(models / "video", dtype=torch.float16).save_pretrained(target)
    VideoMAEImageProcessorPil(**PIXELS).save_pretrained(target)


# what is made, from which models, and the names of their logs
COMPONENTS = {
    "mcm-shapes-teacher": (package_teacher, ("vae", "clip", "unet"), ("vae", "decoder", "steady", "teacher")),
    "mcm-shapes-wan-teacher": (package_wan, ("wan_vae", "wan"), ("wan_vae", "wan_teacher")),
    "mcm-shapes-features": (package_features, ("features",), ("features",)),
    "mcm-shapes-clip": (package_clip, ("clip",), ("clip",)),
    "mcm-shapes-video": (package_video, ("video",), ("video",)),
}

LORAS = {"mcm-shapes": "mcm-shapes-teacher", "mcm-shapes-wan": "mcm-shapes-wan-teacher"}  # with their teachers


def forget_paths(folder: Path) -> None:
    """Leave no trace of where the components lay."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None):
            file.write_text(json.dumps(content, indent=2) + "\n")


def first_stage(models: Path, name: str) -> Path:
    """The folder of a LoRA's first stage, which has the name of before where there is no other."""
    folder, former = models / f"{name}-appearance", models / f"{name}-looks"
    if former.exists() and not folder.exists():
        print(f"warning: reading {former}; rename it to {folder}", file=sys.stderr)
        return former
    return folder


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", type=Path, required=True, help="folder with some of what COMPONENTS and LORAS name")
    p.add_argument("--work", type=Path, required=True, help="folder with the training logs")
    p.add_argument("--world", type=Path, required=True, help="what distillation read: `diffusers-mcm shapes build`")
    p.add_argument(
        "--scores",
        type=Path,
        help="scores.json of `diffusers-mcm shapes figures`, or measure_wan.py, for the LoRA's card",
    )
    p.add_argument("--output", type=Path, default=PACKAGED_FOLDER)
    args = p.parse_args()
    for name, (package, models, logs) in COMPONENTS.items():
        target = args.output / name
        if not all((args.models / model).exists() for model in models):
            continue
        package(args.models, target)
        forget_paths(target)
        shutil.copy(CARDS / f"{name}.md", target / "README.md")
        for log in (file for stem in logs for file in args.work.glob(f"{stem}*.jsonl")):
            (target / "logs").mkdir(exist_ok=True)
            shutil.copy(log, target / "logs")
    for name, teacher in LORAS.items():
        if (args.models / name).exists():
            package_lora(args.models, name, args.output / teacher, args.world, args.scores, args.output / name)
    total = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
