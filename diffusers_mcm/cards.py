"""Model cards: one template, filled from a LoRA's saved configuration and from files that an evaluation wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from .hub import PACKAGED_MODELS, is_local, public_name
from .location import SCHEDULER_NAME, Location
from .settings import CONFIG_NAME, Settings

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_NAME, SAMPLE_NAME = "README.md", "sample.mp4"
# What `diffusers-mcm evaluate` writes, whose `table` the card shows, and a table that anything else wrote.
SCORES_NAMES = ("evaluation.json", "scores.json")
# Of a student on the flow path, where neither its scheduler nor its training is known: what it is trained with if
# nobody says otherwise (`consistency.FLOW_SHIFT` and `FLOW_STEPS`, which take torch along).
FLOW_SHIFT, FLOW_GRID = 5.0, 48
DEFAULT_PROMPT = "a cat walking through grass"
TAGS = ("diffusers", "text-to-video", "lora", "motion-consistency-model", "diffusers-mcm")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

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
_WITH_WAN = """```python
from diffusers import UniPCMultistepScheduler, WanPipeline
$resolve
pipe = WanPipeline.from_pretrained($repository)
pipe.load_lora_weights($adapter)
pipe.scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=$shift,
    solver_order=1,
    disable_corrector=list(range($steps)),
)
frames = pipe("$prompt", num_inference_steps=$steps, guidance_scale=1.0$size).frames[0]
```

These are Euler steps, without fresh noise. UniPC cuts the timesteps that it tells the network to whole numbers, 937
for 937.5; Euler's own scheduler keeps them, if it is told the points of this LoRA's grid before they are shifted:

```python
from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=$shift)
points = [point / $grid for point in $points]
pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=points)
frames = pipe("$prompt", num_inference_steps=$steps, guidance_scale=1.0$size).frames[0]
```

That is `MCMFlowScheduler(shift=$shift, stochastic=False)` of diffusers-mcm. diffusers' `FlowMatchLCMScheduler` is not
for this: it shifts twice."""
_CONVERTED = """{reason}:

```bash
diffusers-mcm convert $where --to {layout} mcm
```

{code}"""
_NO_LOADER = "Its pipeline of this base model has no LoRA loader, so PEFT puts the LoRA in"
_NO_PEFT_KEYS = "Its LoRA loader passes over PEFT's keys, so they have to be converted"
_WAN = ("wan", "wan-ti2v")
_STOCK = {
    ("modelscope", "diffusers"): _CONVERTED.format(reason=_NO_LOADER, layout="peft", code=_WITH_PEFT),
    ("modelscope", "peft"): f"{_NO_LOADER}:\n\n{_WITH_PEFT}",
    ("animatediff", "diffusers"): _WITH_LORA_LOADER,
    ("animatediff", "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_LORA_LOADER),
    **{(name, "diffusers"): _WITH_WAN for name in _WAN},
    **{(name, "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_WAN) for name in _WAN},
}
_SAMPLE = '\n<video src="{0.file}" controls autoplay loop muted></video>\n\n*{0.prompt}*\n'
_COMFYUI_WAN = """Its LoRA loader knows the names that Wan's authors gave the modules, and no others:

```bash
diffusers-mcm convert $where --to comfyui mcm.safetensors
```

| node | setting |
|---|---|
| LoraLoaderModelOnly | `mcm.safetensors`, strength 1 |
| ModelSamplingSD3 | shift $shift |
| KSampler | steps $steps, cfg 1, sampler `lcm`, scheduler `simple`, denoise 1 |

The sampler `lcm` adds fresh noise in each step, as diffusers-mcm does; `euler` adds none. With `simple` both visit the
timesteps of this LoRA's grid. This follows from reading its sources; it was not run in it."""
_COMFYUI = {
    **dict.fromkeys(_WAN, _COMFYUI_WAN),
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


def metadata(tags: Sequence[str] = TAGS, **fields: Any) -> str:
    """The YAML a card begins with; fields that are `None` are left out."""
    from huggingface_hub import ModelCardData

    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", **fields, tags=list(tags)).to_yaml()


def _front_matter(settings: Settings, prompt: str, more: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {"license": settings.license}
    # A base model that is a local folder is nobody else's business.
    public = [name for name in _repositories(settings) if not is_local(name)]
    if public:
        fields.update(base_model=public[0] if len(public) == 1 else public, base_model_relation="adapter")
    output = {"output": {"url": settings.sample.file}} if settings.sample else {}
    fields["widget"] = [{"text": prompt} | output]
    return metadata(**{**fields, **more})


def _repositories(settings: Settings) -> list[str]:
    """The base model, and what of it lies elsewhere."""
    return [settings.base_model_repository or "", *settings.extra_repositories.values()]


def render_card(
    settings: Settings,
    *,
    title: str,
    place: Location,
    layout: str = "diffusers",
    scheduler: Mapping[str, Any] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    about: str = "",
    training_note: str = "From the configuration that was saved with the weights.",
    **more: Any,
) -> str:
    """The card's text. A sample in the settings lies beside the card and is shown.

    `place` is the repository, and the subfolder in it, where the LoRA will be, `layout` that of its keys
    (`"diffusers"` or `"peft"`), `scheduler` the configuration of its sampler. `scores` are tables: `about`, `columns`
    and `rows` (each a label and then the cells). `about` is a paragraph on this LoRA, `training_note` says where the
    training's settings are known from, and `more` are fields of the card's YAML, such as `license_link`.
    """
    prompt = settings.prompt or DEFAULT_PROMPT
    base, *extra = _repositories(settings)
    subfolder = place.subfolder
    values = {
        "prompt": prompt.replace("\\", "\\\\").replace('"', '\\"'),
        "steps": str(settings.steps),
        "load": f'"{place.name}"' + (f', subfolder="{subfolder}"' if subfolder else ""),
        "where": place.name + (f" --subfolder {subfolder}" if subfolder else ""),
        "repository": f'resolve("{base}")' if base in PACKAGED_MODELS else f'"{public_name(base)}"',
        "resolve": "\nfrom diffusers_mcm.hub import resolve\n" if base in PACKAGED_MODELS else "",
        "motion_adapter": public_name(extra[0]) if extra else "",
    }
    kind = settings.base_model or ""
    stock = _STOCK.get((kind, layout), "Not known for this base model.")
    # Stock code finds adapter and scheduler in the folder that `convert` has written, or where the LoRA is.
    beside = f'"{place.name}", subfolder="{place.inside("scheduler").subfolder}"'
    values |= {"adapter": values["load"], "scheduler": f"LCMScheduler.from_pretrained({beside})"}
    if "convert" in stock:
        values |= {"adapter": '"mcm"', "scheduler": 'LCMScheduler.from_pretrained("mcm", subfolder="scheduler")'}
    elif layout == "peft":
        values["scheduler"] = "LCMScheduler.from_config(pipe.scheduler.config, timestep_scaling=4.0)"
    values |= _on_flow_path(settings, scheduler or {})
    appearance = (
        "images" if settings.image_data else "those videos too" if settings.training else "those videos or from images"
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        values,
        front_matter=_front_matter(settings, prompt, more),
        title=title,
        base="\nwith ".join(map(_link, _repositories(settings))),
        appearance=appearance,
        about=f"\n{about}\n" if about else "",
        sample=_SAMPLE.format(sample) if (sample := settings.sample) else "",
        stock=Template(stock).substitute(values),
        comfyui=Template(_COMFYUI.get(kind, "Not known for this base model.")).substitute(values),
        training=_training_section(settings, training_note),
        scores="\n\n".join(map(_scores_table, scores)) or "None were measured, or none are recorded with the weights.",
    )


def _on_flow_path(settings: Settings, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """What a card says of the grid of a student on the flow path, and of the size of its clips."""
    grid, steps = int(scheduler.get("original_inference_steps", FLOW_GRID)), settings.steps
    size = {name: getattr(settings.sampling, name) for name in ("height", "width", "num_frames")}
    return {
        "shift": str(float(scheduler.get("shift") or settings.training.get("shift") or FLOW_SHIFT)),
        "grid": str(grid),
        "points": str([grid - i * grid // steps for i in range(steps)]),  # as `MCMFlowScheduler` chooses them
        "size": "".join(f", {name}={value}" for name, value in size.items() if value),
    }


def render_folder_card(folder: Path, repository: str, settings: Settings | None = None, **more: Any) -> str:
    """The card of a LoRA folder, from what lies in it (or these settings) and `more` arguments of `render_card`."""
    here = Location.of(folder)
    settings = settings or Settings.read(here)
    if settings is None:
        raise FileNotFoundError(f"There is no {CONFIG_NAME} in {folder}.")
    if settings.sample and not (folder / settings.sample.file).is_file():
        settings = replace(settings, sample=None)
    title, there = repository.rpartition("/")[2], Location(repository, remote=True)
    scores = [found.get("table", found) for name in SCORES_NAMES if (found := here.json(name))]
    scheduler = here.json(SCHEDULER_NAME)
    return render_card(settings, title=title, place=there, scheduler=scheduler, scores=scores, **more)


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


def _training_section(settings: Settings, note: str) -> str:
    rows = settings.training_rows()
    if not rows:
        return "No configuration of the training was saved with the weights."
    cells = [f"| {label} | {', '.join(map(_text, row))} |" for label, row in rows.items()]
    return "\n".join([note, "", "| | |", "|---|---|", *cells])


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _scores_table(scores: Mapping[str, Any]) -> str:
    lines = [["", *scores["columns"]], ["---"] * (len(scores["columns"]) + 1), *scores["rows"]]
    return "\n".join([scores["about"], "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])
