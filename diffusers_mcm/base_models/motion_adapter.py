"""AnimateDiff's motion modules: in diffusers' layout, or in the files of AnimateDiff's own code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import MotionAdapter

from .. import hub
from ..location import Location
from ..lora import open_safetensors

_POSITIONS = ".pos_embed.pe"  # of one attention; it holds no weights, but says how long a clip may be


def load_motion_adapter(
    source: MotionAdapter | str | os.PathLike, dtype: torch.dtype | None = None, variant: str | None = None, **options
) -> MotionAdapter:
    """A motion adapter as it is, or from a folder, a repository on the Hub, or a `.safetensors` file.

    `dtype` is by default that of the file; `variant` is read where there is such.
    """
    if isinstance(source, MotionAdapter):
        return source
    location = Location.of(source, **options)
    if location.is_file:
        return read_motion_modules(location.name, dtype)
    if location.file("config.json") is None:
        return read_motion_modules(_only_file(location), dtype)
    given = location.arguments | location.variant(variant) | ({} if dtype is None else {"dtype": dtype})
    with location.never_pickled():
        return MotionAdapter.from_pretrained(location.name, use_safetensors=True, **given)


def _only_file(location: Location) -> Path:
    """The one file of weights in a folder or repository that has no configuration."""
    files = [name for name in location.files() if "/" not in name]
    names = [name for name in files if hub.is_safetensors(name)]
    if len(names) == 1 and (found := location.file(names[0])):
        return found
    source = location.name
    if names:
        raise ValueError(f"There are several motion modules in {source}: {', '.join(names)}; give the path of one.")
    pickled = [name for name in files if hub.is_pickled(name)]
    if pickled:
        path = Path(source, pickled[0]) if location.is_folder else pickled[0]
        raise ValueError(f"{source} has no .safetensors file; {hub.how_to_convert(path)}")
    raise ValueError(f"{source} is no motion adapter: it has neither a config.json nor a .safetensors file.")


def read_motion_modules(path: str | os.PathLike, dtype: torch.dtype | None = None) -> MotionAdapter:
    """A motion adapter from one file; its sizes are read off the weights."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    with open_safetensors(Path(path)) as file:
        tensors = {key.removeprefix("module."): file.get_tensor(key) for key in file.keys()}
    strange = [key for key in tensors if ".motion_modules." not in key]
    if strange or not any(key.startswith("down_blocks.") for key in tensors):
        raise ValueError(
            f"{path} is no motion module: {len(strange)} of its {len(tensors)} keys are of something else"
            + (f", such as {strange[0]!r}." if strange else ".")
        )
    lengths = {tensor.shape[1] for key, tensor in tensors.items() if key.endswith(("pos_encoder.pe", _POSITIONS))}
    weights = convert_animatediff_checkpoint_to_diffusers(tensors)
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith(_POSITIONS)}
    adapter = MotionAdapter(**_config(weights), **({"motion_max_seq_length": max(lengths)} if lengths else {}))
    expected = {key: value for key, value in adapter.state_dict().items() if not key.endswith(_POSITIONS)}
    different = sorted(expected.keys() ^ weights.keys())
    different += [key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape]
    if different:
        raise ValueError(
            f"{path} is no motion module that diffusers knows: {len(different)} weights are missing, unknown or of"
            f" another shape, such as {different[0]!r}. It may be one for Stable Diffusion XL, or incomplete."
        )
    adapter.load_state_dict(weights, strict=False)  # but for the positions, which are computed
    return adapter.to(dtype or next(iter(weights.values())).dtype).eval()


def _config(weights: Mapping[str, torch.Tensor]) -> dict:
    """The sizes that the weights show: channels and layers of each block, and whether the middle one has any."""
    names = {key: key.split(".") for key in weights}
    norms = [key for key, name in names.items() if name[0] == "down_blocks" and name[4:] == ["norm", "weight"]]
    layers = Counter(int(names[key][1]) for key in norms)
    channels = {int(names[key][1]): len(weights[key]) for key in norms}
    return {
        "block_out_channels": tuple(channels[block] for block in sorted(channels)),
        "motion_layers_per_block": tuple(layers[block] for block in sorted(layers)),
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in weights),
    }
