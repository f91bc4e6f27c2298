"""The names that Stable Diffusion's first code gave the modules of its UNet, which some LoRA files still use."""

from torch import nn

_IN_A_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, network: nn.Module) -> str:
    """`down_blocks.0.attentions.0.proj_in` as `input_blocks.1.1.proj_in`; other modules keep their names.

    Blocks and their layers are counted through there: each of the `layers_per_block` layers is a block, each sampler
    another one, and a layer's resnet, attention and upsampler are numbered inside it.
    """
    layers = getattr(getattr(network, "config", None), "layers_per_block", None)
    match name.split("."):
        case ["mid_block", "resnets" | "attentions" as part, index, _, *_]:
            place = f"middle_block.{2 * int(index) + (part == 'attentions')}"
        case ["down_blocks" | "up_blocks" as stage, block, part, index, _, *_] if isinstance(layers, int):
            first = int(block) * (layers + 1) + (stage == "down_blocks")  # the first of the input blocks is `conv_in`
            if part == "downsamplers":
                return f"input_blocks.{first + layers}.0.op"
            if part == "upsamplers":
                has_attention = hasattr(network.get_submodule(f"{stage}.{block}"), "attentions")
                return f"output_blocks.{first + layers}.{1 + has_attention}.conv"
            if part not in ("resnets", "attentions"):  # motion modules have no such name
                return name
            kind = "input_blocks" if stage == "down_blocks" else "output_blocks"
            place = f"{kind}.{first + int(index)}.{int(part == 'attentions')}"
        case _:
            return name
    inside = name.partition(f".{part}.{index}.")[2]
    return f"{place}.{_IN_A_RESNET.get(inside, inside) if part == 'resnets' else inside}"
