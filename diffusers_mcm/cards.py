"""Model cards: one template, filled from a LoRA's saved configuration and from files that an evaluation wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from .card_text import sealed
from .hub import PACKAGED_MODELS, is_local, public_name
from .location import PEFT_WEIGHTS_NAME, SCHEDULER_NAME, WEIGHTS_NAME, Location
from .settings import BOUNDARY, CONFIG_NAME, EXPERTS, HIGH_NOISE, Settings

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
_WITH_WAN_PAIR = """```python
from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
$resolve
pipe = WanPipeline.from_pretrained($repository)
pipe.load_lora_weights($adapter, weight_name="high_noise_model.safetensors")
pipe.load_lora_weights($adapter, weight_name="low_noise_model.safetensors", load_into_transformer_2=True)
pipe.scheduler = FlowMatchEulerDiscreteScheduler()
sigmas = $sigmas  # of the grid with a shift of $shift
pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
frames = pipe("$prompt", num_inference_steps=$steps, guidance_scale=1.0$size).frames[0]
```

These are Euler steps without fresh noise, as `MCMFlowScheduler(shift=$shift, boundary=$boundary, stochastic=False)` of
diffusers-mcm takes them. Where the experts meet, at $boundary, there has to be a step, a hair below it, so that the
second is asked. Schedulers that choose their own points step over it, beyond what the first expert learnt."""
_TO_A_PAIR = """Both halves go into one folder, which `diffusers-mcm push` publishes as a pair:

```bash
diffusers-mcm convert $where pair --to diffusers
```

"""
_CONVERTED = """{reason}:

```bash
diffusers-mcm convert $where --to {layout} mcm
```

{code}"""
_NO_LOADER = "Its pipeline of this base model has no LoRA loader, so PEFT puts the LoRA in"
_NO_PEFT_KEYS = "Its LoRA loader passes over PEFT's keys, so they have to be converted"
_WAN = ("wan", "wan-ti2v")
_WITH_EXPERTS = "wan-a14b"
_STOCK = {
    ("modelscope", "diffusers"): _CONVERTED.format(reason=_NO_LOADER, layout="peft", code=_WITH_PEFT),
    ("modelscope", "peft"): f"{_NO_LOADER}:\n\n{_WITH_PEFT}",
    ("animatediff", "diffusers"): _WITH_LORA_LOADER,
    ("animatediff", "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_LORA_LOADER),
    **{(name, "diffusers"): _WITH_WAN for name in _WAN},
    **{(name, "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_WAN) for name in _WAN},
    (_WITH_EXPERTS, "diffusers"): _WITH_WAN_PAIR,
    (_WITH_EXPERTS, "peft"): _CONVERTED.format(reason=_NO_PEFT_KEYS, layout="diffusers", code=_WITH_WAN_PAIR),
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
timesteps of this LoRA's grid, nearly so in 5 and 7 steps. This follows from reading its sources; it
was not run in it."""
_COMFYUI_PAIR = """Its LoRA loader knows the names that Wan's authors gave the modules, and no others:

```bash
diffusers-mcm convert $where --to comfyui comfyui_pair
```

| node | setting |
|---|---|
| LoraLoaderModelOnly, after the model for high noise | `high_noise_model.safetensors`, strength 1 |
| LoraLoaderModelOnly, after the one for low noise | `low_noise_model.safetensors`, strength 1 |
| ManualSigmas | `$sigmas_to_0` |
| SplitSigmas | step $first_steps |
| KSamplerSelect | `euler` |
| SamplerCustom, with the first model and `high_sigmas` | cfg 1, add_noise true |
| SamplerCustom, with the second, the latent of the first, and `low_sigmas` | cfg 1, add_noise false |

The sigmas are the points of this LoRA's grid, with its shift of $shift; no ModelSamplingSD3 is needed. The sampler
`lcm` would add fresh noise where the experts meet, at $boundary, where the second starts from what the first predicts.
This follows from reading its sources; it was not run in it."""
_COMFYUI = {
    **dict.fromkeys(_WAN, _COMFYUI_WAN),
    _WITH_EXPERTS: _COMFYUI_PAIR,
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
    second: Settings | None = None,
    **more: Any,
) -> str:
    """The card's text. A sample in the settings lies beside the card and is shown.

    The settings of one expert's LoRA make the card of half a pair, and together with those of the other, which are
    `second`, the card of both.

    `place` is the repository, and the subfolder in it, where the LoRA will be, `layout` that of its keys
    (`"diffusers"` or `"peft"`), `scheduler` the configuration of its sampler. `scores` are tables: `about`, `columns`
    and `rows` (each a label and then the cells). `about` is a paragraph on this LoRA, `training_note` says where the
    training's settings are known from, and `more` are fields of the card's YAML, such as `license_link`.
    """
    trainings = [settings] if second is None else [settings, second]
    settings = settings if second is None else replace(settings, expert=None)
    prompt, kind = settings.prompt or DEFAULT_PROMPT, settings.base_model or ""
    values, stock = _code(settings, prompt, place, layout)
    values |= _on_flow_path(settings, scheduler or {})
    appearance = (
        "images" if settings.image_data else "those videos too" if settings.training else "those videos or from images"
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        values,
        front_matter=_front_matter(settings, prompt, more),
        title=title,
        what=_what(settings, trainings),
        calls=(calls := "two to eight" if kind == _WITH_EXPERTS else "one to eight"),
        steps_told=calls.capitalize(),
        base="\nwith ".join(map(_link, _repositories(settings))),
        appearance=appearance,
        about="".join(f"\n{each}\n" for each in (about, _about_half(settings)) if each),
        sample=_SAMPLE.format(sample) if (sample := settings.sample) else "",
        stock=Template(stock).substitute(values),
        comfyui=Template(_COMFYUI.get(kind, "Not known for this base model.")).substitute(values),
        training=_training_section(trainings, training_note),
        scores="\n\n".join(map(_scores_table, scores)) or "None were measured, or none are recorded with the weights.",
    )


def _code(settings: Settings, prompt: str, place: Location, layout: str) -> tuple[dict[str, str], str]:
    """What the code of a card is filled with, and that for stock diffusers."""
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
    taken = "diffusers" if settings.expert else layout  # half a pair is converted anyway, to stand beside the other
    stock = _STOCK.get((settings.base_model or "", taken), "Not known for this base model.")
    # Stock code finds adapter and scheduler in the folder that `convert` has written, or where the LoRA is.
    beside = f'"{place.name}", subfolder="{place.inside("scheduler").subfolder}"'
    values |= {"adapter": values["load"], "scheduler": f"LCMScheduler.from_pretrained({beside})"}
    if "convert" in stock:
        values |= {"adapter": '"mcm"', "scheduler": 'LCMScheduler.from_pretrained("mcm", subfolder="scheduler")'}
    elif taken == "peft":
        values["scheduler"] = "LCMScheduler.from_config(pipe.scheduler.config, timestep_scaling=4.0)"
    if settings.expert:
        values |= _half(settings.expert, place.name)
        stock = _TO_A_PAIR + stock
    return values, stock


def _what(settings: Settings, trainings: Sequence[Settings]) -> str:
    if settings.expert:
        return "Half of a motion consistency model: one LoRA of two, with which together"
    return "A motion consistency model: a " + ("LoRA" if len(trainings) == 1 else "pair of LoRAs") + " with which"


def _about_half(settings: Settings) -> str:
    """Which half of a pair a LoRA is, and what it needs; nothing for a whole one."""
    if not settings.expert:
        return ""
    where = "begins a video" if settings.expert == HIGH_NOISE else "finishes it"
    other = next(each for each in EXPERTS if each != settings.expert)
    boundary = "" if settings.boundary is None else f" The two meet at σ = {settings.boundary}."
    return (
        f"**This is the half for the {settings.expert} expert**, which {where}. It is used together with a LoRA for"
        f" the {other} expert that was distilled for the same sampler, never alone.{boundary}"
    )


def _half(expert: str, name: str) -> dict[str, str]:
    """What differs in the code of a card for half a pair: both halves are named, the high-noise one first."""
    high, low = (name if each == expert else f"path/to/{each}" for each in EXPERTS)
    return {"load": f'("{high}", "{low}")', "where": f"{high} {low}", "adapter": '"pair"'}


def _on_flow_path(settings: Settings, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """What a card says of the grid of a student on the flow path, and of the size of its clips."""
    grid, steps = int(scheduler.get("original_inference_steps", FLOW_GRID)), settings.steps
    size = {name: getattr(settings.sampling, name) for name in ("height", "width", "num_frames")}
    shift = float(scheduler.get("shift") or settings.training.get("shift") or FLOW_SHIFT)
    points = [grid - i * grid // steps for i in range(steps)]  # as `MCMFlowScheduler` chooses them
    boundary = settings.boundary or scheduler.get("boundary") or BOUNDARY
    sigmas = _with_boundary([shift * point / (grid + (shift - 1) * point) for point in points], boundary)
    return {
        "shift": str(shift),
        "grid": str(grid),
        "points": str(points),
        "boundary": str(boundary),
        "sigmas": str(sigmas),
        "sigmas_to_0": ", ".join(map(str, [*sigmas, 0.0])),
        "first_steps": str(sum(sigma >= boundary for sigma in sigmas)),
        "size": "".join(f", {name}={value}" for name, value in size.items() if value),
    }


def _with_boundary(sigmas: list[float], boundary: float) -> list[float]:
    """The points of sampling with two experts: of those that are not above the boundary the first is a hair below it.

    `MCMFlowScheduler` chooses the same; of two steps or more the second expert has one.
    """
    first = next((i for i, sigma in enumerate(sigmas) if sigma <= boundary + 1e-6), max(len(sigmas) - 1, 1))
    return [round(boundary - 1e-6 if i == first else sigma, 6) for i, sigma in enumerate(sigmas)]


def render_folder_card(folder: Path, repository: str, settings: Settings | None = None, **more: Any) -> str:
    """The card of a LoRA folder, from what lies in it (or these settings) and `more` arguments of `render_card`,
    sealed, so that it is known whether somebody has edited it."""
    here = Location.of(folder)
    settings = settings or Settings.read(here)
    if settings is None:
        raise FileNotFoundError(f"There is no {CONFIG_NAME} in {folder}.")
    if settings.sample and not (folder / settings.sample.file).is_file():
        settings = replace(settings, sample=None)
    title, there = repository.rpartition("/")[2], Location(repository, remote=True)
    scores = [found.get("table", found) for name in SCORES_NAMES if (found := here.json(name))]
    scheduler = more.pop("scheduler", None) or here.json(SCHEDULER_NAME)
    if (folder / PEFT_WEIGHTS_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        more = {"layout": "peft"} | more
    return sealed(render_card(settings, title=title, place=there, scheduler=scheduler, scores=scores, **more))


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


def _training_section(trainings: Sequence[Settings], note: str) -> str:
    """The trainings of a LoRA, or of both of a pair in columns beside each other."""
    rows = [each.training_rows() for each in trainings]
    if not any(rows):
        return "No configuration of the training was saved with the weights."
    labels = list(dict.fromkeys(label for each in rows for label in each))
    cells = [[", ".join(map(_text, each.get(label, [None]))) for each in rows] for label in labels]
    names = [""] if len(rows) == 1 else list(EXPERTS)
    lines = [f"| {' | '.join([label, *row])} |" for label, row in zip(labels, cells)]
    return "\n".join(
        [note, "", f"| | {' | '.join(names)} |" if len(rows) > 1 else "| | |", "|" + "---|" * (1 + len(rows)), *lines]
    )


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _scores_table(scores: Mapping[str, Any]) -> str:
    lines = [["", *scores["columns"]], ["---"] * (len(scores["columns"]) + 1), *scores["rows"]]
    return "\n".join([scores["about"], "", *(f"| {' | '.join(map(_text, line))} |" for line in lines)])
