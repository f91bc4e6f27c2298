"""What a LoRA file says about itself, without reading its tensors."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..base_models import BASE_MODELS, BaseModel
from ..files import sha256
from ..location import Location
from ..lora import open_safetensors, read_beside, split_key
from ..lora.layouts import WRITTEN, kohya_alpha, layout_of, recorded_config, renamed, split_prefix
from ..settings import SAMPLING_KEYS, Settings

_KINDS = {2: "Linear", 4: "Conv2d", 5: "Conv3d"}


def describe(source: str | os.PathLike, **where) -> dict[str, Any]:
    """What is in a LoRA (or motion module): a file, a folder, a packaged model or a Hub repository.

    `where` is as in `from_pretrained`: `subfolder`, `weight_name`, `revision`, `token`, ...

    Returns:
        `file`, `layout`, `base_model`, `base_model_repository`, `rank`, `alpha`, `targets`, `kinds` (of layers, with
        their number), `modules` (last part of their names, with their number), `tensors`, `parameters`, `dtype`,
        `bytes`, `sha256`, `settings` (how it is sampled), `settings_recorded` (or else the base model's defaults) and
        `training`. `None` where nothing is known.
    """
    location = Location.of(source, **where)
    path = location.lora_file()
    with open_safetensors(path) as file:
        slices, header = {key: file.get_slice(key) for key in file.keys()}, file.metadata() or {}
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    settings, scheduler_config, adapter_config = read_beside(location, header)
    layout = layout_of(shapes)
    if layout is None:
        one = next(iter(shapes), "none at all")
        raise ValueError(f"{path} has keys of no known layout ({', '.join(WRITTEN)}), such as {one!r}.")
    config = recorded_config(header, adapter_config if layout == "peft" else None)
    modules = _modules(path, shapes)
    base_model = _base_model(settings, layout, modules)
    repository = settings.base_model_repository or (adapter_config or {}).get("base_model_name_or_path")
    ranks = Counter(shape[0] for shape in modules.values())
    return {
        "file": str(path),
        "layout": layout,
        "base_model": base_model and base_model.name,
        "base_model_repository": repository or (base_model and base_model.default_repository),
        "rank": ranks.most_common(1)[0][0] if len(ranks) == 1 else dict(ranks) or None,
        "alpha": config.get("lora_alpha") if (alpha := kohya_alpha(header)) is None else alpha,
        "targets": len(modules),
        "kinds": dict(Counter(_KINDS[len(shape)] for shape in modules.values())),
        "modules": dict(Counter(_last_part(name) for name in modules)),
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": " and ".join(sorted({part.get_dtype() for part in slices.values()})),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "settings": base_model and _sampled_with(settings, scheduler_config, base_model),
        "settings_recorded": bool(settings.sampling.known() or scheduler_config),
        "training": settings.training or None,
    }


def _modules(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of each module's A; `ValueError` if one has no B, or the reverse."""
    halves: dict[str, dict[str, tuple]] = defaultdict(dict)
    for key, shape in shapes.items():
        module, half = split_key(renamed(key))
        if half in ("lora_A.weight", "lora_B.weight"):
            halves[module][half] = shape
    alone = [module for module, pair in halves.items() if len(pair) < 2]
    if alone:
        count = f"{len(alone)} of its {len(halves)} modules"
        raise ValueError(f"{path} is incomplete: {count} have only one matrix, such as {alone[0]!r}.")
    return {split_prefix(module)[2]: pair["lora_A.weight"] for module, pair in halves.items()}


def _last_part(module: str) -> str:
    """`a.b.to_out.0` to `to_out.0`, `a.ff.net.0.proj` to `ff.net.0.proj`; for kohya's underscores likewise."""
    names = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
        *("ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
    )
    found = next((name for name in names if module.endswith((name, name.replace(".", "_")))), None)
    return found or module.rpartition(".")[2]


def _base_model(settings: Settings, layout: str, modules: Iterable[str]) -> BaseModel | None:
    if name := settings.base_model or ("animatediff" if layout == "motion-module" else None):
        return BASE_MODELS.get(name)
    return next((model for model in BASE_MODELS.values() if model.recognises(modules)), None)


def _sampled_with(settings: Settings, scheduler: Mapping[str, Any] | None, base_model: BaseModel) -> dict[str, Any]:
    """Steps, size and scheduler that `MCMPipeline.from_pretrained` will sample with."""
    sampling = {key: getattr(base_model, key) for key in SAMPLING_KEYS} | settings.sampling.known()
    if not scheduler:
        scheduler = base_model.scheduler_class.from_config(base_model.scheduler_config(None)).config
    keys = [key for key in base_model.described_scheduler_keys if key in scheduler]
    return sampling | {"guidance_scale": 1.0} | {key: scheduler[key] for key in keys}
