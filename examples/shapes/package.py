"""Lays the trained components out as the package carries them: teacher, feature network and CLIP, all in float16.

The teacher becomes a pipeline folder as its kind has on the Hub (vae, text_encoder, tokenizer, unet, scheduler).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from prepare import rows
from train_teacher import SCHEDULE
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, Dinov2Model

from diffusers_mcm import MCMPipeline
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.publish import record_sample

CARDS = Path(__file__).parents[2] / "model_cards"
PROMPT = "a red circle moving left on a black background"
LOGS = {
    "mcm-shapes-teacher": ("vae", "decoder", "teacher"),
    "mcm-shapes-features": ("features",),
    "mcm-shapes-clip": ("clip",),
}


def record_data(world: Path, file: Path) -> None:
    """Say what distillation could read; `rows` refuses held-out captions."""
    record = {"build": json.loads((world / "build.json").read_text())}
    for part in ("videos", "images/clean"):
        _, captions = rows(world / part)
        record[part] = {"items": len(captions), "captions": len(set(captions)), "held_out_captions": 0}
    file.write_text(json.dumps(record, indent=2) + "\n")


def finish_lora(folder: Path, teacher: Path) -> None:
    """A sample clip, and the card that shows it."""
    pipeline = MCMPipeline.from_pretrained(folder, base_model=teacher)
    video = pipeline(PROMPT, generator=torch.Generator().manual_seed(0)).frames[0]
    record_sample(folder, video, PROMPT, fps=8)
    sys.path.append(str(CARDS))
    from render import shapes_card

    for path in (folder / "README.md", CARDS / "mcm-shapes.md"):
        path.write_text(shapes_card(folder), encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", type=Path, required=True, help="folder with vae, clip, features and unet")
    p.add_argument("--work", type=Path, required=True, help="folder with the training logs")
    p.add_argument("--world", type=Path, required=True, help="what distillation read: `diffusers-mcm shapes build`")
    p.add_argument("--scores", type=Path, help="scores.json of `diffusers-mcm shapes figures`, for the card")
    p.add_argument("--output", type=Path, default=PACKAGED_FOLDER)
    args = p.parse_args()
    half = {"dtype": torch.float16}
    tokenizer = CLIPTokenizer.from_pretrained(args.models / "clip")
    teacher = args.output / "mcm-shapes-teacher"
    parts = {
        "vae": AutoencoderKL.from_pretrained(args.models / "vae", torch_dtype=torch.float16),
        "text_encoder": CLIPTextModel.from_pretrained(args.models / "clip", **half),
        "tokenizer": tokenizer,
        "unet": UNet3DConditionModel.from_pretrained(args.models / "unet", torch_dtype=torch.float16),
        "scheduler": DDIMScheduler(**SCHEDULE),
    }
    for name, part in parts.items():
        part.save_pretrained(teacher / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": "TextToVideoSDPipeline", "_diffusers_version": "0.42.1"} | index
    (teacher / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    Dinov2Model.from_pretrained(args.models / "features", **half).save_pretrained(args.output / "mcm-shapes-features")
    CLIPModel.from_pretrained(args.models / "clip", **half).save_pretrained(args.output / "mcm-shapes-clip")
    tokenizer.save_pretrained(args.output / "mcm-shapes-clip")
    for file in args.output.rglob("*.json"):  # no trace of where the components lay
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None):
            file.write_text(json.dumps(content, indent=2) + "\n")
    for name, logs in LOGS.items():
        if (args.output / name).exists():
            shutil.copy(CARDS / f"{name}.md", args.output / name / "README.md")
        for log in (file for stem in logs for file in args.work.glob(f"{stem}*.jsonl")):
            (args.output / name / "logs").mkdir(exist_ok=True)
            shutil.copy(log, args.output / name / "logs")
    lora = args.models / "mcm-shapes"
    if lora.exists():
        target = args.output / "mcm-shapes"
        leave = shutil.ignore_patterns("checkpoint-*", "logs", "validation*")
        shutil.copytree(lora, target, dirs_exist_ok=True, ignore=leave)
        record_data(args.world, target / "data.json")
        if args.scores:
            shutil.copy(args.scores, target / "scores.json")
        finish_lora(target, teacher)
    total = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
