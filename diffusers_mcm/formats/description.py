"""What a LoRA file says about itself, without reading its tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..base_models import BASE_MODELS, BaseModel
from ..lora import METADATA_KEY, PEFT_PREFIX, PREFIXES, locate_lora, open_safetensors, read_settings
from .kohya import PREFIX as KOHYA_PREFIX

# layout -> what its keys look like
_LAYOUTS = {
    "peft": lambda key: key.startswith(PEFT_PREFIX),
    "diffusers": lambda key: key.startswith(PREFIXES[1:]),
    "kohya": lambda key: key.startswith(KOHYA_PREFIX),
    "motion-module": lambda key: ".temporal_transformer." in key,
}
_DOWN, _UP = (".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")
_KINDS = {2: "Linear", 4: "Conv2d", 5: "Conv3d"}
_SCHEDULER_KEYS = ("timestep_scaling", "beta_schedule", "beta_start", "beta_end", "original_inference_steps")
_SIZES = ("num_frames", "height", "width", "fps")


def describe(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    **hub_options,
) -> dict[str, Any]:
    """What is in a LoRA (or motion module): a file, a folder, a packaged model or a Hub repository.

    Returns:
        `file`, `layout`, `base_model`, `base_model_repository`, `rank`, `alpha`, `targets`, `kinds` (of layers, with
        their number), `modules` (last part of their names, with their number), `tensors`, `parameters`, `dtype`,
        `bytes`, `sha256`, `settings` (how it is sampled), `settings_recorded` (or else the base model's defaults) and
        `training`. `None` where nothing is known.
    """
    source, path, where = locate_lora(
        source, weight_name=weight_name, subfolder=subfolder, revision=revision, **hub_options
    )
    with open_safetensors(path) as file:
        slices, header = {key: file.get_slice(key) for key in file.keys()}, file.metadata() or {}
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    about = read_settings(source, header, **where)
    layout = _layout(path, shapes)
    modules = _modules(path, shapes)
    base_model = _base_model(about["config"], layout, modules)
    ranks = Counter(shape[0] for shape, _ in modules.values())
    return {
        "file": str(path),
        "layout": layout,
        "base_model": base_model and base_model.name,
        "base_model_repository": _repository(about, base_model),
        "rank": ranks.most_common(1)[0][0] if len(ranks) == 1 else dict(ranks) or None,
        "alpha": _alpha(header, about["adapter_config"] or {}),
        "targets": len(modules),
        "kinds": dict(Counter(_KINDS[len(shape)] for shape, _ in modules.values())),
        "modules": dict(Counter(_last_part(name) for name in modules)),
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": " and ".join(sorted({part.get_dtype() for part in slices.values()})),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "settings": _settings(about, base_model),
        "settings_recorded": bool(about["config"].get("sampling") or about["scheduler_config"]),
        "training": about["config"].get("training") or None,
    }


def _layout(path: Path, keys: Iterable[str]) -> str:
    keys = list(keys)
    for layout, belongs in _LAYOUTS.items():
        if keys and all(map(belongs, keys)):
            return layout
    raise ValueError(
        f"{path} has keys of no known layout ({', '.join(_LAYOUTS)}), such as {keys[0] if keys else 'none at all'!r}."
    )


def _modules(path: Path, shapes: Mapping[str, tuple]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of both matrices of each module."""
    halves: dict[str, list] = {}
    for position, suffixes in enumerate((_DOWN, _UP)):
        for key, shape in shapes.items():
            suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
            if suffix is not None:
                halves.setdefault(key.removesuffix(suffix), [None, None])[position] = shape
    half = [module for module, pair in halves.items() if None in pair]
    if half:
        raise ValueError(
            f"{path} is incomplete: {len(half)} of its {len(halves)} modules have only one matrix, such as"
            f" {half[0]!r}."
        )
    return {_strip(module): tuple(pair) for module, pair in halves.items()}


def _strip(module: str) -> str:
    prefix = next((prefix for prefix in (*PREFIXES, KOHYA_PREFIX) if module.startswith(prefix)), "")
    return module.removeprefix(prefix)


def _last_part(module: str) -> str:
    """`a.b.to_out.0` to `to_out.0`, `a.ff.net.0.proj` to `ff.net.0.proj`; for kohya's underscores likewise."""
    names = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
    )
    found = next((name for name in names if module.endswith((name, name.replace(".", "_")))), None)
    return found or module.rpartition(".")[2]


def _base_model(config: Mapping[str, Any], layout: str, modules: Iterable[str]) -> BaseModel | None:
    if config.get("base_model"):
        return BASE_MODELS.get(config["base_model"])
    if layout == "motion-module":
        return BASE_MODELS.get("animatediff")
    return next((model for model in BASE_MODELS.values() if model.recognises(modules)), None)


def _repository(about: Mapping[str, Any], base_model: BaseModel | None) -> str | None:
    recorded = about["config"].get("base_model_repository")
    recorded = recorded or (about["adapter_config"] or {}).get("base_model_name_or_path")
    return recorded or (base_model and base_model.default_repository)


def _alpha(header: Mapping[str, str], adapter_config: Mapping[str, Any]) -> float | None:
    packed = json.loads(header.get(METADATA_KEY, "{}"))
    alphas = [value for key, value in packed.items() if key.endswith("lora_alpha")] + [
        adapter_config.get("lora_alpha")
    ]
    if "ss_network_alpha" in header:
        try:
            alphas.insert(0, float(header["ss_network_alpha"]))
        except ValueError:  # "None" or "Dynamic", as other trainers have it
            pass
    return alphas[0]


def _settings(about: Mapping[str, Any], base_model: BaseModel | None) -> dict[str, Any] | None:
    """Steps, size and scheduler that `MCMPipeline.from_pretrained` will sample with."""
    if base_model is None:
        return None
    sampling = about["config"].get("sampling") or {}
    defaults = {"num_inference_steps": 4, **{name: getattr(base_model, name) for name in _SIZES}}
    scheduler = about["scheduler_config"]
    if not scheduler:
        scheduler = base_model.scheduler_class.from_config(base_model.scheduler_config(None)).config
    settings = {name: sampling.get(name) or value for name, value in defaults.items()}
    return settings | {"guidance_scale": 1.0} | {key: scheduler[key] for key in _SCHEDULER_KEYS if key in scheduler}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
