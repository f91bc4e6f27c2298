"""What Wan's authors call the modules of their transformer, and what diffusers calls them.

LoRAs for Wan are told by the authors' names, with dots (`diffusion_model.blocks.0.self_attn.q`) or, as kohya and
musubi write them, with underscores (`lora_unet_blocks_0_self_attn_q`); in memory they have diffusers'. No name means
one module here and another there, so that all of them can be looked up in one table.
"""

import re
from collections.abc import Iterable

# Inside of an attention: the authors' name, diffusers' name. Those with `img` are of models that make a picture move.
_ATTENTION = {
    **{each: f"to_{each}" for each in "qkv"},
    **{"o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"},
    **{"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"},
}
_IN_A_BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
    **{"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"},
    "norm3": "norm2",  # the one before the cross-attention, the only norm of a block that has weights of its own
    "modulation": "scale_shift_table",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    **{f"{kind}_embedding.{i}": f"condition_embedder.{kind}_embedder.linear_{i // 2 + 1}"
       for kind in ("text", "time") for i in (0, 2)},
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    **{f"img_emb.proj.{i}": f"condition_embedder.image_embedder.{ours}"
       for i, ours in enumerate(("norm1", "ff.net.0.proj", "", "ff.net.2", "norm2")) if ours},
}  # fmt: skip
TABLES = "scale_shift_table"  # parameters that are no module's: the modulation of a block, and that of the head
_BLOCK = re.compile(r"blocks[._](\d+)[._](.+)")


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Each name by itself and by its spelling with underscores."""
    return {spelling: name for name in names for spelling in (name, name.replace(".", "_"))}


_TO_OURS = {
    where: {spelling: table[theirs] for spelling, theirs in _spellings(table).items()}
    | {spelling: ours for spelling, ours in _spellings(table.values()).items()}
    for where, table in (("inside", _IN_A_BLOCK), ("outside", _OUTSIDE))
}
_TO_THEIRS = {
    "inside": {ours: theirs for theirs, ours in _IN_A_BLOCK.items()},
    "outside": {ours: theirs for theirs, ours in _OUTSIDE.items()},
}


def wan_module(name: str) -> str | None:
    """diffusers' name of a module of Wan's transformer, by whichever name it is called; `None` if it is none of it.

    `blocks.0.self_attn.q`, `blocks_0_self_attn_q` and `blocks.0.attn1.to_q` are all `blocks.0.attn1.to_q`.
    """
    if inside := _BLOCK.fullmatch(name):
        ours = _TO_OURS["inside"].get(inside[2])
        return ours and f"blocks.{inside[1]}.{ours}"
    return _TO_OURS["outside"].get(name)


def original_wan_module(module: str) -> str | None:
    """The authors' name of diffusers' module `blocks.0.attn1.to_q`: `blocks.0.self_attn.q`; `None` if it has none."""
    if inside := _BLOCK.fullmatch(module):
        theirs = _TO_THEIRS["inside"].get(inside[2])
        return theirs and f"blocks.{inside[1]}.{theirs}"
    return _TO_THEIRS["outside"].get(module)
