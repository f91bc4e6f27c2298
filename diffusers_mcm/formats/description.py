"""What a LoRA file says about itself, without reading its tensors."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base_models import BASE_MODELS, BaseModel, infer_base_model, may_be_of_an_expert
from ..files import sha256
from ..location import Location
from ..lora import TEXT_ENCODER, expert_in_name, open_safetensors, pair_of, read_beside, split_key
from ..lora.adapter import check_shapes
from ..lora.layouts import (
    DENOISER,
    DIFFERENCES,
    SECOND_DENOISER,
    WRITTEN,
    is_wan,
    kohya_alpha,
    layout_of,
    place_of,
    recorded_config,
    split_prefix,
)
from ..settings import EXPERTS, LOW_NOISE, SAMPLING_KEYS, Settings

_KINDS = {2: "Linear", 4: "Conv2d", 5: "Conv3d"}


def describe(source: str | os.PathLike, **where) -> dict[str, Any]:
    """What is in a LoRA (or motion module): a file, a folder, a packaged model or a Hub repository.

    `where` is as in `from_pretrained`: `subfolder`, `weight_name`, `revision`, `token`, ... A pair for two experts is
    described together, where a place holds one or two of these names are given.

    Returns:
        `file`, `layout`, `base_model`, `base_model_repository`, `expert` (of two, which it is for), `rank`, `alpha`,
        `targets`, `kinds` (of layers, with their number), `modules` (last part of their names, with their number),
        `differences` (parameters to which something is added besides), `tensors`, `parameters`, `dtype`, `bytes`,
        `sha256`, `settings` (how it is sampled), `settings_recorded` (or else the base model's defaults) and
        `training`. `None` where nothing is known. Of a pair for two experts these of each, as `high_noise` and
        `low_noise`, also where one file holds both, whose `bytes` and `sha256` are then those of either.
    """
    pair = pair_of(source, **where)
    if pair is not None:
        return dict(zip(EXPERTS, map(_describe, pair)))
    location = Location.of(source, **where)
    if _holds_both(location):
        return {expert: _describe(location, half=expert) for expert in EXPERTS}
    return _describe(location)


def _holds_both(location: Location) -> bool:
    """Whether one file has the LoRAs of both experts, by the prefixes of its keys."""
    with open_safetensors(location.lora_file()) as file:
        keys = list(file.keys())
    return {DENOISER, SECOND_DENOISER} <= {place_of(key)[0] for key in keys} and is_wan(keys)


def _describe(location: Location, half: str | None = None) -> dict[str, Any]:
    """Of a file with both LoRAs of a pair `half` is the expert whose one is described."""
    path = location.lora_file()
    with open_safetensors(path) as file:
        keys = [key for key in file.keys() if half is None or _is_of(half, key)]
        slices, header = {key: file.get_slice(key) for key in keys}, file.metadata() or {}
        alphas = Counter(
            float(file.get_tensor(key)) for key in slices if key.endswith(".alpha") and _is_one(slices[key])
        )
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    settings, scheduler_config, adapter_config = read_beside(location, header)
    layout = layout_of(shapes) or _of_wan(shapes)
    if layout is None:
        one = next(iter(shapes), "none at all")
        raise ValueError(f"{path} has keys of no known layout ({', '.join(WRITTEN)}), such as {one!r}.")
    config = recorded_config(header, adapter_config if layout == "peft" else None)
    modules = _modules(path, shapes)
    expert = half or _expert(settings, path, shapes, modules)
    base_model = _base_model(settings, layout, modules, expert is not None)
    repository = settings.base_model_repository or (adapter_config or {}).get("base_model_name_or_path")
    return {
        "file": str(path),
        "layout": layout,
        "base_model": base_model and base_model.name,
        "base_model_repository": repository or _repository(base_model, modules),
        "expert": expert,
        "rank": _one_or_all(Counter(shape[0] for shape in modules.values())),
        "alpha": _alpha(alphas, header, config),
        "targets": len(modules),
        "kinds": dict(Counter(_KINDS[len(shape)] for shape in modules.values())),
        "modules": dict(Counter(_last_part(name) for name in modules)),
        "differences": sum(place_of(key)[2] in DIFFERENCES for key in shapes),
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": " and ".join(sorted({part.get_dtype() for part in slices.values()})),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "settings": base_model and _sampled_with(settings, scheduler_config, base_model),
        "settings_recorded": bool(settings.sampling.known() or scheduler_config),
        "training": settings.training or None,
    }


def _of_wan(keys: Collection[str]) -> str | None:
    """What to call the layout of a file for Wan that is none of those that are written: `"original"` where it has
    the authors' names without a prefix, `"several"` where it mixes layouts; `None` if it is not for Wan."""
    if not is_wan(keys):
        return None
    return "several" if any(split_prefix(key)[0] for key in keys) else "original"


def _is_of(expert: str, key: str) -> bool:
    """Whether a key of a file with both LoRAs of a pair is of this expert's."""
    return (place_of(key)[0] == SECOND_DENOISER) == (expert == LOW_NOISE)


def _expert(settings: Settings, path: Path, keys: Iterable[str], modules: Mapping[str, Sequence[int]]) -> str | None:
    """Which of two experts a file is for, as its keys, its settings or, if its size allows it, its name say."""
    if {place_of(key)[0] for key in keys} == {SECOND_DENOISER}:
        return LOW_NOISE
    return settings.expert or (expert_in_name(path) if may_be_of_an_expert(modules) else None)


def _is_one(part: Any) -> bool:
    return math.prod(part.get_shape()) == 1


def _alpha(alphas: Counter, header: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    """What the tensors tell, or else kohya's header, or else PEFT's or diffusers' configuration."""
    if alphas:
        return _one_or_all(alphas)
    told = kohya_alpha(header)
    return config.get("lora_alpha") if told is None else told


def _one_or_all(counts: Counter) -> Any:
    """The value, if there is one; else each with how often it is there."""
    return counts.most_common(1)[0][0] if len(counts) == 1 else dict(counts) or None


def _modules(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of each module's A; `ValueError` if one has no B, or the reverse, or one that does not fit."""
    halves: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for key in shapes:
        component, module, role = place_of(key)
        if role in ("lora_A.weight", "lora_B.weight"):
            halves[component, module][role] = key
    alone = [next(iter(pair.values())) for pair in halves.values() if len(pair) < 2]
    if alone:
        count = f"{len(alone)} of its {len(halves)} modules"
        name = split_key(alone[0])[0]
        raise ValueError(f"{path} is incomplete: {count} have only one matrix, such as {name!r}.")
    for (_, module), pair in halves.items():
        check_shapes(str(path), module, shapes[pair["lora_A.weight"]], shapes[pair["lora_B.weight"]])
    names = {place: place[1] if place[0] in (DENOISER, TEXT_ENCODER) else ".".join(place) for place in halves}
    return {names[place]: shapes[pair["lora_A.weight"]] for place, pair in halves.items()}


def _last_part(module: str) -> str:
    """`a.b.to_out.0` to `to_out.0`, `a.ff.net.0.proj` to `ff.net.0.proj`; for kohya's underscores likewise."""
    names = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
        *("ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
    )
    found = next((name for name in names if module.endswith((name, name.replace(".", "_")))), None)
    return found or module.rpartition(".")[2]


def _base_model(
    settings: Settings, layout: str, modules: Mapping[str, tuple[int, ...]], for_an_expert: bool
) -> BaseModel | None:
    if name := settings.base_model or ("animatediff" if layout == "motion-module" else None):
        return BASE_MODELS.get(name)
    plain = {module.removeprefix(f"{SECOND_DENOISER}."): shape for module, shape in modules.items()}
    try:
        return infer_base_model(lora_modules=plain, for_an_expert=for_an_expert and is_wan(plain))
    except ValueError:
        return None


def _repository(base_model: BaseModel | None, modules: Mapping[str, tuple[int, ...]]) -> str | None:
    """Where the base model of a LoRA is that does not say so."""
    return None if base_model is None else base_model.repository_for(modules) or base_model.default_repository


def _sampled_with(settings: Settings, scheduler: Mapping[str, Any] | None, base_model: BaseModel) -> dict[str, Any]:
    """Steps, size and scheduler that `MCMPipeline.from_pretrained` will sample with."""
    sampling = {key: getattr(base_model, key) for key in SAMPLING_KEYS} | settings.sampling.known()
    if not scheduler:
        scheduler = base_model.scheduler_class.from_config(base_model.scheduler_config(None)).config
    if settings.boundary is not None:
        scheduler = {"boundary": settings.boundary} | {
            key: each for key, each in scheduler.items() if each is not None
        }
    keys = [key for key in base_model.described_scheduler_keys if key in scheduler]
    return sampling | {"guidance_scale": 1.0} | {key: scheduler[key] for key in keys}
