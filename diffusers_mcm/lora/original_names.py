"""The names that Stable Diffusion's first code gave the modules of its UNet, which some LoRA files still use."""

from __future__ import annotations

from torch import nn

_IN_A_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}


def original_name(name: str, network: nn.Module) -> str:
    """`down_blocks.0.attentions.0.proj_in` as `input_blocks.1.1.proj_in`; other modules keep their names.

    Blocks and their layers are counted through there: each of the `layers_per_block` layers is a block, each sampler
    another one, and a layer's resnet, attention and upsampler are numbered inside it.
    """
    stage, _, rest = name.partition(".")
    if stage == "mid_block":
        for part, position in _MIDDLE.items():
            if rest.startswith(f"{part}."):
                return f"middle_block.{position}.{_inside(part, rest.removeprefix(f'{part}.'))}"
    layers = getattr(getattr(network, "config", None), "layers_per_block", None)
    if stage not in ("down_blocks", "up_blocks") or not isinstance(layers, int) or rest.count(".") < 3:
        return name
    block, part, index, rest = rest.split(".", 3)
    kind, per_block = ("input_blocks", layers + 1) if stage == "down_blocks" else ("output_blocks", layers + 1)
    first = int(block) * per_block + (stage == "down_blocks")  # the first of the input blocks is `conv_in`
    if part == "downsamplers":
        return f"{kind}.{first + layers}.0.op"
    if part == "upsamplers":
        has_attention = hasattr(network.get_submodule(f"{stage}.{block}"), "attentions")
        return f"{kind}.{first + layers}.{1 + has_attention}.conv"
    if part not in ("resnets", "attentions"):  # motion modules have no such name
        return name
    return f"{kind}.{first + int(index)}.{int(part == 'attentions')}.{_inside(part, rest)}"


def _inside(part: str, name: str) -> str:
    return _IN_A_RESNET.get(name, name) if part.startswith("resnets") else name
