"""LoRAs for a base model with two experts: which of the two a file is for, and the pair that belongs together.

A pair is two files, each with the keys of any LoRA, for the two networks have the same modules. It is those called
`high_noise_model.safetensors` and `low_noise_model.safetensors` in a folder or repository, or others that say in their
names which is which, as `wan2.2_t2v_high_noise_lora_rank64.safetensors`, or two LoRAs that are given together. "high"
and "low" alone say it at the end of a name, or in one that tells the model: `low_poly.safetensors` is a style.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import atomic_files
from ..hub import is_safetensors
from ..location import INDEX_NAME, MOTION_HEAD_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Location
from ..settings import CONFIG_NAME, EXPERTS
from .adapter import LoRA
from .files import only_lora, read_lora, read_lora_file, to_loras, write_lora_weights
from .layouts import DENOISER, SECOND_DENOISER

PAIR_NAMES = {expert: f"{expert}_model.safetensors" for expert in EXPERTS}
_WITH_NOISE = re.compile(r"(high|low)[ _.-]?noise", re.IGNORECASE)
_ALONE = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
# Where a word alone is meant so: the model is named, or nothing follows but what says version, steps, rank or bits.
_MEANT = re.compile(
    r"wan[ _.-]?2[._-]?2|a14b|"
    r"(?<![a-z])(high|low)([ _.-]+\d*(loras?|model|epochs?|steps?|rank|bf|fp|v|e|r)?\d*)*(\.[a-z]+)?$",
    re.IGNORECASE,
)

LoRAPair = tuple[LoRA, LoRA]  # of the expert that acts first, and of the other


def expert_in_name(name: str | os.PathLike) -> str | None:
    """The expert that a file is for as its name says; `None` if that says nothing, or both."""
    name = os.path.basename(name)
    words = _WITH_NOISE.findall(name) or (_ALONE.findall(name) if _MEANT.search(name) else [])
    found = {word.lower() for word in words}
    return f"{found.pop()}_noise" if len(found) == 1 else None


def expert_of(lora: LoRA) -> str | None:
    """The expert that a LoRA is for, as its settings say, or else the name of its file; `None` if neither does."""
    return lora.settings.expert or expert_in_name(lora.source)


def find_pair(location: Location) -> tuple[Location, Location] | None:
    """The two files of a pair in a folder or repository; `None` where there is something else, or but one of them.

    `ValueError` where there are several for one expert.
    """
    if location.is_file or location.weight_name:
        return None
    folder = Path(location.subfolder or ".")
    here = [Path(name).name for name in location.files() if Path(name).parent == folder]
    if {INDEX_NAME, WEIGHTS_NAME, PEFT_WEIGHTS_NAME} & set(here):
        return None
    weights = [name for name in here if is_safetensors(name) and name != MOTION_HEAD_NAME and name[0] != "."]
    named = {expert: [name for name in weights if expert_in_name(name) == expert] for expert in EXPERTS}
    named = {expert: [PAIR_NAMES[expert]] if PAIR_NAMES[expert] in names else names for expert, names in named.items()}
    if not all(named.values()):
        return None
    for expert, names in named.items():
        if len(names) > 1:
            raise ValueError(
                f"There are several files for the {expert} expert in {location}: {', '.join(names)}; give the two that"
                " belong together by their paths, or name them with `weight_name=(high, low)`, on the command line by"
                " --weight_name HIGH --weight_name LOW."
            )
    high, low = (replace(location, weight_name=named[expert][0]) for expert in EXPERTS)
    return high, low


def pair_of(source: Any, **options: Any) -> tuple[Any, Any] | None:
    """The two LoRAs of a pair, unread: two that are given, or those in a folder or repository; `None` if it is one.

    `options` are those of `Location.of`; `subfolder` and `weight_name` may be two as well. `ValueError` for a list of
    another number than two.
    """
    names = [source, *(options.get(name) for name in ("subfolder", "weight_name"))]
    several = [each for each in names if isinstance(each, (list, tuple))]
    if not several:
        return find_pair(Location.of(source, **options)) if isinstance(source, (str, os.PathLike, Location)) else None
    if any(len(each) != 2 for each in several):
        raise ValueError(f"A pair is one LoRA for each of two experts, (high, low); got {several[0]!r}.")
    sources, subfolders, weight_names = ([*each] if isinstance(each, (list, tuple)) else [each] * 2 for each in names)
    high, low = (
        each
        if isinstance(each, (LoRA, Mapping, Location))
        else Location.of(each, **options | dict(subfolder=subfolder, weight_name=weight_name))
        for each, subfolder, weight_name in zip(sources, subfolders, weight_names)
    )
    return high, low


def as_pair(loras: Sequence[LoRA]) -> LoRAPair:
    """Two LoRAs by their experts, as settings and names say; where those say nothing, in the order that they come in.

    `ValueError` if both are for the same expert.
    """
    said = [expert_of(lora) for lora in loras]
    for one, other in ((0, 1), (1, 0)):
        if said[one] is None and said[other] is not None:
            said[one] = next(expert for expert in EXPERTS if expert != said[other])
    experts = list(EXPERTS) if said == [None, None] else said
    if experts[0] == experts[1]:
        raise ValueError(
            f"Both LoRAs are for the {experts[0]} expert, {loras[0].source} and {loras[1].source}: a pair is one for"
            f" each of {' and '.join(EXPERTS)}."
        )
    high, low = sorted(zip(experts, loras), key=lambda each: EXPERTS.index(str(each[0])))
    return for_expert(high[1], EXPERTS[0]), for_expert(low[1], EXPERTS[1])


def for_expert(lora: LoRA, expert: str) -> LoRA:
    """The LoRA with settings that say which expert it is for."""
    return replace(lora, settings=replace(lora.settings, expert=expert))


def check_alike(high: LoRA, low: LoRA) -> None:
    """`ValueError` if two students were distilled for samplers, or base models, that cannot be one."""
    for name in ("base_model", "boundary"):
        one, other = (getattr(lora.settings, name) for lora in (high, low))
        if None not in (one, other) and one != other:
            raise ValueError(
                f"The LoRAs of a pair are of one model, with the same {name}; got {one} of {high.source} and"
                f" {other} of {low.source}."
            )
    configs = [lora.scheduler_config or {} for lora in (high, low)]
    for key in sorted(configs[0].keys() & configs[1].keys()):
        if key[0] != "_" and configs[0][key] != configs[1][key]:
            raise ValueError(
                f"The LoRAs of a pair are sampled together, with the same {key}; got {configs[0][key]} of"
                f" {high.source} and {configs[1][key]} of {low.source}."
            )


def read_loras(source: Any, **options: Any) -> LoRA | LoRAPair:
    """Read a LoRA, or the pair for two experts, of which both may be in one file; see `pair_of` and `read_lora`."""
    pair = pair_of(source, **options)
    if pair is not None:
        return as_pair([each if isinstance(each, LoRA) else read_lora(each) for each in pair])
    file = read_lora_file(Location.of(source, **options))
    found = to_loras(file)
    return by_experts(found) if {DENOISER, SECOND_DENOISER} <= found.keys() else only_lora(found, file.path)


def by_experts(loras: Mapping[str, LoRA]) -> LoRAPair:
    """The pair of a file whose keys say, by their prefix, which of two denoisers they are for."""
    return for_expert(loras[DENOISER], EXPERTS[0]), for_expert(loras[SECOND_DENOISER], EXPERTS[1])


def write_lora_pair(folder: Path, loras: Mapping[str, LoRA], prefix: str) -> None:
    """Write two files, under `PAIR_NAMES`, each with all that is known of its LoRA in its header; all or nothing.

    The keys of both have the same prefix, by which diffusers loads either.
    """
    last = PAIR_NAMES[EXPERTS[-1]]
    with atomic_files(folder, last, stale=(WEIGHTS_NAME, CONFIG_NAME)) as temporary:
        for expert, lora in loras.items():
            write_lora_weights(temporary / PAIR_NAMES[expert], {prefix: for_expert(lora, expert)})
