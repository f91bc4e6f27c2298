"""Motion modules as AnimateDiff's own code wrote them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_mcm.base_models.animatediff import load_motion_adapter
from diffusers_mcm.lora.layouts import animatediff_keys
from tests.tiny import tiny_motion_adapter

SIZES = dict(block_out_channels=(32, 64), motion_num_attention_heads=8, motion_norm_num_groups=32)


@pytest.fixture
def adapter():
    return tiny_motion_adapter(**SIZES)


@pytest.mark.parametrize("form", ["original", "with a prefix", "diffusers"])
def test_a_file_is_the_adapter(adapter, tmp_path, form):
    tensors = adapter.state_dict()
    if form != "diffusers":
        tensors = animatediff_keys(tensors)
    prefix = "module." if form == "with a prefix" else ""
    save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "mm.safetensors")
    for source in (tmp_path / "mm.safetensors", tmp_path):  # by its name, or where it is alone
        found = load_motion_adapter(source)
        assert found.config.motion_max_seq_length == adapter.config.motion_max_seq_length
        assert found.config.block_out_channels == (32, 64) and found.config.use_motion_mid_block
        ours, theirs = found.state_dict(), adapter.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_motion_adapter(tmp_path, torch.float16).dtype == torch.float16


def test_the_first_version_has_none_in_the_middle(tmp_path):
    adapter = tiny_motion_adapter(**SIZES, use_motion_mid_block=False)
    save_file(animatediff_keys(adapter.state_dict()), tmp_path / "mm.safetensors")
    assert not load_motion_adapter(tmp_path / "mm.safetensors").config.use_motion_mid_block


def test_what_is_no_motion_module(adapter, tmp_path):
    with pytest.raises(ValueError, match="is no motion adapter: it has neither a config.json nor"):
        load_motion_adapter(tmp_path)
    (tmp_path / "mm.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="has no .safetensors file; pickled weights are not read"):
        load_motion_adapter(tmp_path)
    with pytest.raises(ValueError, match="mm.ckpt is not a .safetensors file; pickled weights are not read"):
        load_motion_adapter(tmp_path / "mm.ckpt")
    tensors = animatediff_keys(adapter.state_dict())
    save_file(tensors | {"conv_in.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="1 of its .* keys are of something else, such as 'conv_in.weight'"):
        load_motion_adapter(tmp_path / "a.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="1 weights are missing, unknown or of another shape"):
        load_motion_adapter(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="several motion modules in .*: a.safetensors, b.safetensors; give the path"):
        load_motion_adapter(tmp_path)


def test_weights_that_an_adapter_lacks_are_not_made_up(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(file).items() if "norm.bias" not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match="does not hold all weights of a MotionAdapter: .*norm.bias, …; they would be"
    ):
        load_motion_adapter(tmp_path)
