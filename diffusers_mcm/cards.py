"""Model cards: one template, filled from a LoRA's saved configuration and from files that an evaluation wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

from . import hub

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_NAME, SAMPLE_NAME, SCORES_NAME = "README.md", "sample.mp4", "scores.json"
DEFAULT_PROMPT = "a cat walking through grass"
TAGS = ("diffusers", "text-to-video", "lora", "motion-consistency-model", "diffusers-mcm")
# What of a recorded training may be the name of a model or a data set, or a path.
SOURCES = (
    *("pretrained_teacher_model", "pretrained_lora", "discriminator_features", "discriminator_text"),
    *("video_data", "image_data"),
)
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

# label -> keys of `mcm_config.json`'s training section
_TRAINING_ROWS = {
    "teacher": ("pretrained_teacher_model",),
    "begun from the LoRA": ("pretrained_lora",),
    "videos": ("video_data",),
    "images": ("image_data",),
    "frames, height, width": ("num_frames", "height", "width"),
    "frame interval": ("frame_interval",),
    "frames per second of the data": ("data_fps",),
    "motion representation": ("motion",),
    "lambda_real, lambda_adv": ("lambda_real", "lambda_adv"),
    "teacher's guidance, w": ("guidance_min", "guidance_max"),
    "solver steps": ("num_solver_steps",),
    "weight of the gradient penalty": ("gradient_penalty_weight",),
    "LoRA rank, alpha": ("lora_rank", "lora_alpha"),
    "optimiser steps": ("steps",),
    "total batch": ("total_batch",),
    "learning rate": ("effective_learning_rate",),
    "discriminator's learning rate": ("effective_discriminator_learning_rate",),
    "schedule, warm-up steps": ("lr_scheduler", "lr_warmup_steps"),
    "precision": ("mixed_precision",),
    "decay of the weights' average": ("ema_decay",),
    "seed": ("seed",),
    "hours": ("hours",),
}

# How stock diffusers takes the LoRA, by base model and layout of its file.
_WITH_PEFT = """```python
from diffusers import DiffusionPipeline, LCMScheduler
from peft import PeftModel
$resolve
pipe = DiffusionPipeline.from_pretrained($repository)
pipe.unet = PeftModel.from_pretrained(pipe.unet, $adapter).merge_and_unload()
pipe.scheduler = $scheduler
frames = pipe("$prompt", num_inference_steps=$steps, guidance_scale=1.0).frames[0]
```"""
_WITH_LORA_LOADER = """```python
from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter

adapter = MotionAdapter.from_pretrained("$motion_adapter")
pipe = AnimateDiffPipeline.from_pretrained($repository, motion_adapter=adapter)
pipe.load_lora_weights($adapter)
pipe.fuse_lora()  # diffusers' motion modules do not run with a LoRA that is not fused
pipe.scheduler = $scheduler
frames = pipe("$prompt", num_inference_steps=$steps, guidance_scale=1.0).frames[0]
```"""
_CONVERTED = """{reason}:

```bash
diffusers-mcm convert $where --to {layout} mcm
```

{code}"""
_NO_LOADER = "Its pipeline of this base model has no LoRA loader, so PEFT puts the LoRA in"
_NO_PEFT_KEYS = "Its LoRA loader passes over PEFT's keys, so they have to be converted"
_STOCK = {
    ("modelscope", "diffusers"): _CONVERTED.format(reason=_NO_LOADER, layout="peft", code=_WITH_PEFT),
    ("modelscope", "peft"): f"{_NO_LOADER}:\n\n{_WITH_PEFT}",
    ("animatediff", "diffusers"): _WITH_LORA_LOADER,
    ("animatediff", "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_LORA_LOADER),
}
_COMFYUI = {
    "modelscope": "ComfyUI has no loader for this base model, and so nothing that could take the LoRA.",
    "animatediff": """Its LoRA loader leaves motion layers out, so they go into a motion module:

```bash
diffusers-mcm convert $where --to kohya mcm_spatial.safetensors
diffusers-mcm convert $where --to motion-module mcm_motion.safetensors
```

Load the first as a LoRA, the second as AnimateDiff's motion module (AnimateDiff-Evolved), with
`beta_schedule` `lcm >> sqrt_linear`, sampler `lcm`, scheduler `simple`, $steps steps, cfg 1. This follows from reading
those programs; it was not run in them.""",
}


def is_local(name: str) -> bool:
    """Whether a recorded name is a path and not an id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isabs(name) or "\\" in name


def public_name(name: Any) -> Any:
    """A recorded name as others may see it: of a path only its last part."""
    return PurePosixPath(name.replace("\\", "/")).name if isinstance(name, str) and is_local(name) else name


def public_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded training without the paths of the machine it ran on."""
    public = {key: public_name(training[key]) for key in SOURCES if key in training}
    if extra := training.get("extra_repositories"):
        public["extra_repositories"] = {name: public_name(place) for name, place in extra.items()}
    return {**training, **public}


def metadata(tags: Sequence[str] = TAGS, **fields: Any) -> str:
    """The YAML a card begins with; fields that are `None` are left out."""
    from huggingface_hub import ModelCardData

    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", **fields, tags=list(tags)).to_yaml()


def _front_matter(
    base_models: list[str],
    training: Mapping[str, Any],
    prompt: str,
    sample: Mapping[str, str] | None,
    more: Mapping[str, Any],
) -> str:
    fields = dict(license=training.get("license"))
    # A base model that is a local folder is nobody else's business.
    public = [name for name in base_models if not is_local(name)]
    if public:
        fields.update(base_model=public[0] if len(public) == 1 else public, base_model_relation="adapter")
    fields["widget"] = [{"text": prompt} | ({"output": {"url": sample["file"]}} if sample else {})]
    return metadata(**{**fields, **more})


def render_card(
    config: Mapping[str, Any],
    *,
    title: str,
    repository: str,
    subfolder: str | None = None,
    layout: str = "diffusers",
    sample: Mapping[str, str] | None = None,
    scores: Mapping[str, Any] | None = None,
    about: str = "",
    training_note: str = "From the configuration that was saved with the weights.",
    **more: Any,
) -> str:
    """The card's text.

    Args:
        config: what `mcm_config.json` holds.
        title: the heading.
        repository: what to pass to `from_pretrained`, with `subfolder`.
        layout: of the LoRA's keys, `"diffusers"` or `"peft"`.
        sample: `prompt`, and `file` beside the card, of a clip to show.
        scores: what `scores.json` holds: `about`, `columns` and `rows` (each a label and then the cells).
        about: a paragraph on this LoRA.
        training_note: where the training's settings are known from.
        more: fields of the card's YAML, such as `license_link`.
    """
    training = config.get("training") or {}
    base, extra = config["base_model_repository"], list((config.get("extra_repositories") or {}).values())
    prompt = sample["prompt"] if sample else next(iter(training.get("validation_prompts") or ()), DEFAULT_PROMPT)
    values = {
        "prompt": prompt.replace("\\", "\\\\").replace('"', '\\"'),
        "steps": (config.get("sampling") or {}).get("num_inference_steps") or 4,
        "load": f'"{repository}"' + (f', subfolder="{subfolder}"' if subfolder else ""),
        "where": repository + (f" --subfolder {subfolder}" if subfolder else ""),
        "repository": f'resolve("{base}")' if base in hub.PACKAGED_MODELS else f'"{public_name(base)}"',
        "resolve": "\nfrom diffusers_mcm.hub import resolve\n" if base in hub.PACKAGED_MODELS else "",
        "motion_adapter": public_name(extra[0]) if extra else "",
    }
    kind = config.get("base_model")
    stock = _STOCK.get((kind, layout), "Not known for this base model.")
    values |= _adapter_and_scheduler(values["load"], subfolder, converted="convert" in stock, layout=layout)
    if config.get("training") and not training.get("image_data"):
        looks = "those videos too"
    else:
        looks = "images" if training.get("image_data") else "those videos or from images"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        values,
        front_matter=_front_matter([base, *extra], training, prompt, sample, more),
        title=title,
        base="\nwith ".join(map(_link, [base, *extra])),
        looks=looks,
        about=f"\n{about}\n" if about else "",
        sample=_sample_section(sample),
        stock=Template(stock).substitute(values),
        comfyui=Template(_COMFYUI.get(kind, "Not known for this base model.")).substitute(values),
        training=_training_section(training, training_note),
        scores=_scores_section(scores),
    )


def _adapter_and_scheduler(load: str, subfolder: str | None, converted: bool, layout: str) -> dict[str, str]:
    """Where stock code finds them: in the folder `mcm` that `convert` has written, or where the LoRA is."""
    if converted:
        return {"adapter": '"mcm"', "scheduler": 'LCMScheduler.from_pretrained("mcm", subfolder="scheduler")'}
    if layout == "diffusers":
        place = f'{load.split(",")[0]}, subfolder="{subfolder + "/" if subfolder else ""}scheduler"'
        return {"adapter": load, "scheduler": f"LCMScheduler.from_pretrained({place})"}
    return {"adapter": load, "scheduler": "LCMScheduler.from_config(pipe.scheduler.config, timestep_scaling=4.0)"}


def render_folder_card(
    folder: str | os.PathLike, repository: str, config: Mapping[str, Any] | None = None, **more: Any
) -> str:
    """The card of a LoRA folder, from what lies in it; `config` instead of its `mcm_config.json`.

    `more` is as in `render_card`.
    """
    folder = Path(folder)
    if config is None:
        config = json.loads((folder / "mcm_config.json").read_bytes())
    sample = config.get("sample")
    if sample and not (folder / sample["file"]).is_file():
        sample = None
    scores = folder / SCORES_NAME
    return render_card(
        config,
        title=repository.rpartition("/")[2],
        repository=repository,
        sample=sample,
        scores=json.loads(scores.read_bytes()) if scores.is_file() else None,
        **more,
    )


def check_card(text: str, name: str = CARD_NAME) -> None:
    """`ValueError` unless the Hub can read the card's metadata."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data.to_dict()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name} begins with metadata that is not YAML: {error}") from error
    problems = []
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or is_local(base) or not _REPOSITORY.fullmatch(base):
            problems.append(f"base_model must be a repository such as 'owner/name', not {base!r}")
    for key in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(key, ""), str):
            problems.append(f"{key} must be text, not {data[key]!r}")
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        problems.append(f"tags must be a list of text, not {data['tags']!r}")
    if problems:
        raise ValueError(f"{name} has metadata that the Hub refuses: {'; '.join(problems)}.")


def _link(name: str) -> str:
    if is_local(name):
        return "a base model of its maker's"
    return f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"


def _sample_section(sample: Mapping[str, str] | None) -> str:
    if sample is None:
        return ""
    return f'\n<video src="{sample["file"]}" controls autoplay loop muted></video>\n\n*{sample["prompt"]}*\n'


def _training_section(training: Mapping[str, Any], note: str) -> str:
    rows = [
        (label, ", ".join(_text(public_name(training.get(key))) for key in keys))
        for label, keys in _TRAINING_ROWS.items()
        if any(training.get(key) is not None for key in keys)
    ]
    if not rows:
        return "No configuration of the training was saved with the weights."
    return "\n".join([note, "", "| | |", "|---|---|", *(f"| {label} | {cell} |" for label, cell in rows)])


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _scores_section(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "None were measured, or none are recorded with the weights."
    lines = [["", *scores["columns"]], ["---"] * (len(scores["columns"]) + 1), *scores["rows"]]
    return "\n".join([scores["about"], "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])
