"""The model card of a distilled LoRA."""

import json
from collections.abc import Mapping
from typing import Any

_TEMPLATE = """---
{front_matter}
---

# {title}

A motion consistency model: a LoRA with which [{base_name}]({base_link}) makes a video in one to eight network calls
instead of fifty, without guidance. Distilled with
[motion consistency distillation](https://arxiv.org/abs/2406.06890){looks}.

## Use

```python
from diffusers_mcm import MCMPipeline

pipeline = MCMPipeline.from_pretrained("{repository}")
frames = pipeline("{prompt}", num_inference_steps={num_inference_steps}).frames[0]
```

`scheduler/` can also be read by diffusers' own `LCMScheduler`. `motion_head.safetensors` is needed for further
training only; sampling does not use it.

## Training

| | |
|---|---|
{rows}

{samples}"""

_ROWS = (
    ("teacher", "pretrained_teacher_model"),
    ("videos", "video_data"),
    ("images", "image_data"),
    ("frames per clip", "num_frames"),
    ("frame interval", "frame_interval"),
    ("motion representation", "motion"),
    ("lambda_real", "lambda_real"),
    ("lambda_adv", "lambda_adv"),
    ("LoRA rank, alpha", ("lora_rank", "lora_alpha")),
    ("optimiser steps", "steps"),
    ("total batch", "total_batch"),
    ("learning rate", "effective_learning_rate"),
    ("discriminator's learning rate", "effective_discriminator_learning_rate"),
    ("schedule, warm-up steps", ("lr_scheduler", "lr_warmup_steps")),
    ("precision", "mixed_precision"),
    ("seed", "seed"),
    ("hours", "hours"),
)


def _is_local(name: str) -> bool:
    return name.startswith(("./", "../", "/"))


def _front_matter(base_model: str, license: str | None) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: text-to-video"]
    if not _is_local(base_model) and "/" in base_model:
        lines.append(f"base_model: {json.dumps(base_model)}\nbase_model_relation: adapter")
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    tags = ("diffusers", "text-to-video", "lora", "motion-consistency-model", "diffusers-mcm")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def write_card(
    title: str,
    repository: str,
    base_model: str,
    training: Mapping[str, Any],
    license: str | None = None,
    prompt: str | None = None,
    overview: str | None = None,
) -> str:
    """The card's text. `training` is what `mcm_config.json` holds; `overview` a picture's path within the folder."""

    def cell(keys: str | tuple[str, ...]) -> str:
        values = [training.get(key) for key in ((keys,) if isinstance(keys, str) else keys)]
        return ", ".join(
            "-" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}" for value in values
        )

    return _TEMPLATE.format(
        front_matter=_front_matter(base_model, license),
        title=title,
        base_name=base_model,
        base_link=base_model
        if _is_local(base_model) or "/" not in base_model
        else f"https://huggingface.co/{base_model}",
        looks=", its looks taken from an image data set" if training.get("image_data") else "",
        repository=repository,
        prompt=(prompt or "a cat walking through grass").replace('"', '\\"'),
        num_inference_steps=training.get("num_inference_steps", 4),
        rows="\n".join(f"| {label} | {cell(keys)} |" for label, keys in _ROWS),
        samples=f"## Samples\n\n![validation clips, eight frames each]({overview})\n" if overview else "",
    )
