"""LoRA for a denoiser: files, checks, injection.

In memory a LoRA is a dict `module.lora_A.weight -> tensor`, `module.lora_B.weight -> tensor`, with the module's full
name in the denoiser. On disk the keys have a prefix: the denoiser's name (`unet.`, what diffusers writes and reads) or
`base_model.model.` (what PEFT writes). Both are read; the first is written, unless one converts (`formats`). What else
belongs to a LoRA, scale, settings and scheduler, is in the header of the file too, so that the file alone is enough.

A LoRA fits wholly or not at all: a key without a module, a module with half a pair, a tensor of another shape is an
error before anything in the denoiser has changed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hub
from .files import whole_file, whole_files, write_text

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
CONFIG_NAME = "mcm_config.json"
MOTION_HEAD_NAME = "motion_head.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for it, in the safetensors header
# Ours, in the same place: `LoRA`'s attributes by the keys they are stored under, each as JSON.
HEADER_KEYS = {"mcm_config": "config", "mcm_scheduler": "scheduler_config", "peft_adapter_config": "adapter_config"}
PEFT_PREFIX = "base_model.model."
PREFIXES = (PEFT_PREFIX, "unet.", "transformer.")
DEFAULT_ADAPTER = "default"
KEYWORD_CALLED = ("proj_in", "proj_out")  # modules that diffusers' motion modules call with `input=`


@dataclass
class LoRA:
    """A LoRA that was read from disk, or is about to be written."""

    tensors: dict[str, torch.Tensor]
    alpha: float | None = None  # None: the rank, that is a scale of one
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # mcm_config.json
    scheduler_config: dict[str, Any] | None = None
    adapter_config: dict[str, Any] | None = None  # adapter_config.json, as PEFT wrote it
    source: str = "the LoRA"
    folder: Path | None = None  # where `config` was read from, for paths relative to it

    @property
    def base_repository(self) -> str | None:
        """Where its base model is: what our configuration says, or else PEFT's, if that is not a path elsewhere."""
        name = self.config.get("base_model_repository")
        if name is None and (name := (self.adapter_config or {}).get("base_model_name_or_path")):
            if not (hub.is_hub_id(name) or os.path.isdir(name)):
                logger.warning("%s names a base model that is not here, %r; its default is used.", self.source, name)
                return None
        return name

    @property
    def modules(self) -> list[str]:
        return sorted({split_key(key)[0] for key in self.tensors})

    def ranks(self) -> dict[str, int]:
        return {module: self.tensors[f"{module}.lora_A.weight"].shape[0] for module in self.modules}

    def peft_config(self):
        """peft's `LoraConfig`, with the ranks the tensors really have."""
        from peft import LoraConfig

        ranks = self.ranks()
        rank = Counter(ranks.values()).most_common(1)[0][0]
        different = {f"^{module}": r for module, r in ranks.items() if r != rank}
        # Without an alpha every module has scale one, whatever its rank.
        alpha_pattern = different if self.alpha is None else self.alpha_pattern
        return LoraConfig(
            r=rank,
            lora_alpha=rank if self.alpha is None else self.alpha,
            rank_pattern=different,
            alpha_pattern=alpha_pattern,
            target_modules=self.modules,
            use_rslora=self.use_rslora,
        )


def split_key(key: str) -> tuple[str, str]:
    """`a.b.lora_A.weight` to (`a.b`, `lora_A.weight`)."""
    module, separator, rest = key.rpartition(".lora_")
    return module, f"lora_{rest}" if separator else key


# --- reading ---------------------------------------------------------------------------------------------------------
def read_lora(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    **hub_options,
) -> LoRA:
    """Read a LoRA from a folder, a `.safetensors` file, a packaged model or a Hub repository."""
    where = dict(subfolder=subfolder, revision=revision, **hub_options)
    source, path, where = locate_lora(source, weight_name=weight_name, **where)
    with open_safetensors(path) as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    lora = LoRA(tensors=_strip_prefixes(tensors, path), source=str(path), **read_settings(source, header, **where))
    _read_alpha(lora, header, is_peft=any(key.startswith(PEFT_PREFIX) for key in tensors))
    lora.folder = path.parent if os.path.isdir(source) else None
    return lora


def locate_lora(
    source: str | os.PathLike, *, weight_name: str | None = None, **where
) -> tuple[str, Path, dict[str, Any]]:
    """The folder or repository, the file of the weights in it, and where else to look for what is beside them."""
    source = hub.resolve(source)
    if os.path.isfile(source):
        source, weight_name = os.path.dirname(source) or ".", os.path.basename(source)
        where["subfolder"] = None
    path = find_lora_file(source, weight_name=weight_name, **where)
    if path is None:
        wanted = weight_name or f"{WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME}"
        place = f"{source} (subfolder {where['subfolder']!r})" if where.get("subfolder") else source
        raise FileNotFoundError(f"No LoRA in {place}: there is no {wanted}.{elsewhere(source, **where)}")
    return source, path, where


def find_lora_file(source: str, *, weight_name: str | None = None, **where) -> Path | None:
    if weight_name and hub.is_pickled(weight_name):
        raise ValueError(f"{weight_name} of {source} is not a .safetensors file; {hub.how_to_convert(weight_name)}")
    for name in (weight_name,) if weight_name else (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
        path = hub.find_file(source, name, **where)
        if path is not None:
            return path
    return None


def read_settings(source: str, header: Mapping[str, str], *, subfolder: str | None = None, **where) -> dict[str, Any]:
    """`config`, `scheduler_config` and `adapter_config` of a LoRA: from files beside the weights, else its header."""
    inside = f"{subfolder}/scheduler" if subfolder else "scheduler"
    files = {
        "config": (CONFIG_NAME, subfolder),
        "scheduler_config": ("scheduler_config.json", inside),
        "adapter_config": (PEFT_CONFIG_NAME, subfolder),
    }
    settings = {attribute: json.loads(header[key]) for key, attribute in HEADER_KEYS.items() if key in header}
    for attribute, (name, folder) in files.items():
        settings[attribute] = hub.read_json(source, name, subfolder=folder, **where) or settings.get(attribute)
    settings["config"] = settings["config"] or {}
    return settings


def elsewhere(source: str, **where) -> str:
    """A sentence on pickled files that are there instead, or on the subfolders that hold a LoRA; empty if none."""
    files = [Path(name) for name in hub.list_files(source, **where)]
    pickled = [path for path in files if hub.is_pickled(path) and path.parent == Path(where.get("subfolder") or ".")]
    if pickled:
        return f" There is {pickled[0].name}, but {hub.how_to_convert(pickled[0].name)}"
    folders = sorted({p.parent.as_posix() for p in files if p.name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME)} - {"."})
    return f" There are LoRAs in its subfolders: {', '.join(folders)}; name one as `subfolder`." if folders else ""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """safetensors' own handle of a file; `ValueError` if it is none, or not whole."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; {hub.how_to_convert(path.name)}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}). Was the download cut short? Fetch it again."
        ) from error


def _strip_prefixes(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    if any("lora_magnitude_vector" in key or key.endswith(".dora_scale") for key in tensors):
        raise ValueError(f"{path} is a DoRA; only plain LoRA is supported.")
    stripped = {_strip_prefix(key): tensor for key, tensor in tensors.items()}
    strange = [key for key in stripped if split_key(key)[1] not in ("lora_A.weight", "lora_B.weight")]
    if strange or not stripped:
        raise ValueError(
            f"{path} is not a LoRA in diffusers' (unet.*) or PEFT's (base_model.model.*) layout:"
            f" {len(strange)} of its {len(stripped)} keys are not lora_A/lora_B weights"
            + (f", such as {strange[0]!r}." if strange else ".")
        )
    return stripped


def _strip_prefix(key: str) -> str:
    return key.removeprefix(next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""))


def _read_alpha(lora: LoRA, header: Mapping[str, str], is_peft: bool) -> None:
    """The scale's numerator, from PEFT's configuration file or diffusers' metadata."""
    config = dict(lora.adapter_config or {}) if is_peft else {}
    if not config and METADATA_KEY in header:
        config = {_strip_prefix(key): value for key, value in json.loads(header[METADATA_KEY]).items()}
    if is_peft and not config:
        logger.warning(
            "There is no %s beside %s; the LoRA's alpha is taken to be its rank.", PEFT_CONFIG_NAME, lora.source
        )
    if config.get("use_dora") or (lora.adapter_config or {}).get("use_dora"):
        raise ValueError(f"{lora.source} is a DoRA; only plain LoRA is supported.")
    lora.alpha = config.get("lora_alpha")
    lora.alpha_pattern = dict(config.get("alpha_pattern") or {})
    lora.use_rslora = bool(config.get("use_rslora", False))


# --- checking --------------------------------------------------------------------------------------------------------
def check_fits(denoiser: nn.Module, lora: LoRA) -> None:
    """`ValueError` unless every tensor of the LoRA has its place in the denoiser."""
    modules = {name: base_layer(module) for name, module in denoiser.named_modules()}
    unknown = [module for module in lora.modules if module not in modules]
    if unknown:
        raise ValueError(
            f"{lora.source} does not fit {type(denoiser).__name__}: {len(unknown)} of its {len(lora.modules)} modules"
            f" do not exist there, such as {unknown[0]!r}. It was made for another base model."
        )
    problems = []
    for name in lora.modules:
        down, up = (lora.tensors.get(f"{name}.lora_{half}.weight") for half in "AB")
        if down is None or up is None:
            problems.append(f"{name} has only one of lora_A and lora_B")
            continue
        weight = getattr(modules[name], "weight", None)
        if not isinstance(modules[name], (nn.Linear, nn.Conv2d, nn.Conv3d)):
            problems.append(f"{name} is a {type(modules[name]).__name__}, which takes no LoRA")
        elif (up.shape[0], *down.shape[1:]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            problems.append(
                f"{name} has a weight of shape {tuple(weight.shape)}, the LoRA {tuple(up.shape)} x {tuple(down.shape)}"
            )
    if problems:
        raise ValueError(
            f"{lora.source} does not fit this {type(denoiser).__name__}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)." if len(problems) > 1 else ".")
            + " It was made for another base model, or the file is incomplete."
        )


def base_layer(module: nn.Module) -> nn.Module:
    """What is behind a LoRA; the module itself where there is none."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


# --- in the denoiser -------------------------------------------------------------------------------------------------
def lora_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """peft's layers by the names of the modules they stand in for."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def add_lora(
    denoiser: nn.Module,
    target_modules: list[str],
    rank: int = 64,
    alpha: float = 64,
    *,
    generator: torch.Generator | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
) -> None:
    """Put a fresh trainable LoRA in float32 on the named modules, and freeze everything else."""
    lora = fresh_lora(denoiser, target_modules, rank, alpha, generator=generator)
    denoiser.requires_grad_(False)
    load_lora_into(denoiser, lora, adapter_name, dtype=torch.float32, trainable=True)


def fresh_lora(
    denoiser: nn.Module,
    target_modules: list[str],
    rank: int = 64,
    alpha: float = 64,
    *,
    generator: torch.Generator | None = None,
) -> LoRA:
    """A LoRA that does nothing yet: A random (Kaiming), B zero."""
    modules = dict(denoiser.named_modules())
    missing = [name for name in target_modules if name not in modules]
    if missing or not target_modules:
        raise ValueError(f"Cannot put a LoRA on modules that do not exist: {missing[:3] or 'none were named'}.")
    tensors = {}
    for name in target_modules:
        shape = base_layer(modules[name]).weight.shape
        down = torch.empty(rank, *shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
    return LoRA(tensors, alpha=alpha)


def load_lora_into(
    denoiser: nn.Module,
    lora: LoRA,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> None:
    """Put a LoRA in the denoiser, wholly or not at all, in `dtype` (default: that of each weight it is added to)."""
    from peft import inject_adapter_in_model

    if not adapter_name or set(adapter_name) & set("./\\"):
        raise ValueError(f"An adapter's name must not be empty or contain a dot or slash, got {adapter_name!r}.")
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"An adapter named {adapter_name!r} is loaded already; give another name, or unload it.")
    check_fits(denoiser, lora)
    # peft freezes what it adapts. Left as it was: torch's choice of a matmul, hence the last bit, depends on it.
    trainable_before = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    # On the meta device: nothing is drawn from the global generator, and nothing is allocated twice.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
        inject_adapter_in_model(
            lora.peft_config(), denoiser, adapter_name, low_cpu_mem_usage=True, state_dict=lora.tensors
        )
    for parameter, requires_grad in trainable_before.items():
        parameter.requires_grad_(requires_grad)
    for name, layer in lora_layers(denoiser).items():
        if adapter_name not in layer.lora_A:
            continue
        if name.endswith(KEYWORD_CALLED) and _positional not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_positional, with_kwargs=True)
        weight = layer.get_base_layer().weight
        for half, part in (("A", layer.lora_A[adapter_name]), ("B", layer.lora_B[adapter_name])):
            tensor = lora.tensors[f"{name}.lora_{half}.weight"]
            # A copy: the caller's tensor must not change when this one is trained.
            tensor = tensor.to(device=weight.device, dtype=dtype or weight.dtype, copy=True).contiguous()
            part.weight = nn.Parameter(tensor, requires_grad=trainable)


def _positional(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`layer(input=x)` as `layer(x)`: peft's layers call their argument `x`, those they stand in for `input`."""
    kwargs = dict(kwargs)
    return ((kwargs.pop("input"), *args) if "input" in kwargs else args), kwargs


def lora_state_dict(denoiser: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, torch.Tensor]:
    """`module.lora_A.weight -> tensor`, and B: the denoiser's own tensors, detached."""
    tensors = {}
    for name, layer in lora_layers(denoiser).items():
        if adapter_name in layer.lora_A:
            tensors[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name].weight.detach()
            tensors[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name].weight.detach()
    if not tensors:
        known = ", ".join(sorted(getattr(denoiser, "peft_config", {}))) or "none"
        raise ValueError(f"There is no adapter named {adapter_name!r} in the denoiser. Loaded: {known}.")
    return tensors


def extract_lora(denoiser: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> LoRA:
    """A LoRA that is in the denoiser, as it would be read from disk; shares its tensors."""
    tensors = lora_state_dict(denoiser, adapter_name)
    config = denoiser.peft_config[adapter_name]
    return LoRA(tensors, config.lora_alpha, dict(config.alpha_pattern), config.use_rslora)


def set_lora_state_dict(
    denoiser: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str = DEFAULT_ADAPTER
) -> None:
    """Overwrite a LoRA that is in the denoiser, in place; the keys and shapes must be exactly its own."""
    current = lora_state_dict(denoiser, adapter_name)
    different = sorted(current.keys() ^ tensors.keys())
    different += [key for key in current.keys() & tensors.keys() if current[key].shape != tensors[key].shape]
    if different:
        raise ValueError(f"{len(different)} LoRA tensors differ in name or shape, such as {different[0]!r}.")
    with torch.no_grad():
        for key, tensor in tensors.items():
            current[key].copy_(tensor)


@contextmanager
def lora_disabled(denoiser: nn.Module) -> Iterator[nn.Module]:
    """The base model, bit for bit, while the context is open."""
    layers = list(lora_layers(denoiser).values())
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is fused into the base weights; `unfuse_lora()` before switching it off.")
    # Not `enable_adapters(False)`: that one also changes `requires_grad`, in the middle of a training step.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield denoiser
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


# --- writing ---------------------------------------------------------------------------------------------------------
def write_lora_weights(
    path: str | os.PathLike, lora: LoRA, prefix: str = "unet", dtype: torch.dtype | None = None
) -> None:
    """A safetensors file with `unet.*` keys and the metadata that diffusers' `load_lora_weights` reads, and ours."""
    tensors = {
        f"{prefix}.{key}": tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for key, tensor in sorted(lora.tensors.items())
    }
    write_safetensors(path, tensors, lora_header(lora, prefix))


def lora_header(lora: LoRA, prefix: str) -> dict[str, str]:
    """The header of a LoRA file: scale, settings, scheduler."""
    config = lora.peft_config()
    metadata = dict(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=lora.modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
    )
    metadata = {f"{prefix}.{key}": value for key, value in metadata.items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    for key, attribute in HEADER_KEYS.items():
        if getattr(lora, attribute):
            header[key] = json.dumps(getattr(lora, attribute), sort_keys=True, default=str)
    return header


def write_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Whole or not at all, readable by whom the umask allows, and the same bytes each time.

    `save_file` writes for its own user only, and the metadata in an order that it draws.
    """
    from safetensors.torch import save

    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length, the header (JSON), the tensors
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


def save_lora(
    folder: str | os.PathLike,
    denoiser: nn.Module,
    base_model,
    *,
    repository: str | os.PathLike | None = None,
    revision: str | None = None,
    extra_repositories: Mapping[str, str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    scheduler=None,
    adapter_name: str = DEFAULT_ADAPTER,
    dtype: torch.dtype | None = None,
    relative_to: str | os.PathLike | None = None,
) -> Path:
    """Write the LoRA folder that `MCMPipeline.from_pretrained` reads.

    `base_model` is a `BaseModel`; `repository`, `revision` and `extra_repositories` say where its weights came from (a
    local folder is recorded relative to `folder`, or to `relative_to` if the files will be moved there); `sampling`
    holds `num_inference_steps`, `num_frames`, `height`, `width`, `fps`; `scheduler` is the one to sample with.
    """
    folder = Path(folder)
    lora = extract_lora(denoiser, adapter_name)
    lora.config = {
        "base_model": base_model.name,
        "base_model_repository": hub.recordable(repository or base_model.default_repository, relative_to or folder),
        "base_model_revision": revision,
        "extra_repositories": {
            name: hub.recordable(place, relative_to or folder) for name, place in (extra_repositories or {}).items()
        },
        "sampling": dict(sampling or {}),
        "training": dict(training or {}),
    }
    lora.scheduler_config = None if scheduler is None else json.loads(scheduler.to_json_string())
    write_lora_folder(folder, lora, base_model.denoiser_name, dtype)
    return folder


def write_lora_folder(folder: Path, lora: LoRA, prefix: str, dtype: torch.dtype | None = None) -> None:
    """The weights and the settings beside them, all of it or nothing; other files in the folder stay."""
    with whole_files(folder, WEIGHTS_NAME) as temporary:
        write_lora_weights(temporary / WEIGHTS_NAME, lora, prefix, dtype)
        write_settings(temporary, lora)


def write_settings(folder: Path, lora: LoRA) -> None:
    """The files beside the weights: mcm_config.json and scheduler/scheduler_config.json, where there is either."""
    settings = {CONFIG_NAME: lora.config or None, "scheduler/scheduler_config.json": lora.scheduler_config}
    for name, content in settings.items():
        if content is not None:
            write_text(folder / name, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
