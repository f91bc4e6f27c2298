"""The network of FVD against values that its published ports give for weights that anybody can make."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm.evaluation.i3d import InceptionI3d


def fill(model):
    """Weights that depend on nothing but their names and shapes."""
    state = model.state_dict()
    for number, (name, tensor) in enumerate(sorted(state.items())):
        noise = np.random.RandomState(number)
        if name.endswith("conv3d.weight"):
            values = noise.standard_normal(tensor.shape) * np.sqrt(2 / np.prod(tensor.shape[1:]))
        elif name.endswith("bias"):
            values = 0.1 * noise.standard_normal(tensor.shape)
        elif name.endswith(("bn.weight", "running_var")):
            values = np.ones(tensor.shape)
        else:
            values = np.zeros(tensor.shape)
        state[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    model.load_state_dict(state)
    return model


def video(frames=16):
    small = np.random.RandomState(0).uniform(-1, 1, (1, 3, 16, 8, 8)).astype(np.float32)
    size = (16, 224, 224)
    return torch.nn.functional.interpolate(torch.from_numpy(small), size, mode="trilinear")[:, :, :frames]


@pytest.mark.parametrize(
    "eps, first, norm",
    [
        (1e-5, [2.63613, 2.04179, -1.27828, 0.68585, -2.04944], 33.06522),
        (1e-3, [2.61553, 2.02457, -1.26866, 0.68120, -2.03463], 32.79830),
    ],
)
@torch.no_grad()
def test_the_logits_are_those_of_the_published_ports(eps, first, norm):
    logits = fill(InceptionI3d(eps))(video())
    # float32 through 60 layers: a thousandth is the tolerance that the values were published with
    assert logits.shape == (1, 400)
    assert logits[0, :5].tolist() == pytest.approx(first, rel=1e-3)
    assert float(logits.norm()) == pytest.approx(norm, rel=1e-3)


@torch.no_grad()
def test_twelve_frames():
    logits = fill(InceptionI3d(1e-3))(video(12))
    assert logits[0, :5].tolist() == pytest.approx([2.23667, 1.58369, -1.13483, 0.44427, -1.80046], rel=1e-3)


def test_its_size():
    model = InceptionI3d()
    assert sum(parameter.numel() for parameter in model.parameters()) == 12_697_264
    assert len(model.state_dict()) == 344
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b1a.bn.running_mean", "logits.conv3d.bias"} <= {
        *model.state_dict()
    }


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 8, 224, 224), "at least 9 frames, got 8"),
        ((1, 3, 16, 128, 224), r"224×224 pixels, got \(128, 224\)"),
        ((1, 16, 3, 224, 224), r"\(N, 3, T, H, W\), got"),
    ],
)
def test_videos_that_it_cannot_take(shape, message):
    with pytest.raises(ValueError, match=message):
        InceptionI3d()(torch.zeros(shape))


def test_a_file_of_safetensors_is_read_and_another_refused(tmp_path):
    state = fill(InceptionI3d()).state_dict()
    save_file(state, tmp_path / "i3d.safetensors")
    read = InceptionI3d.from_pretrained(str(tmp_path / "i3d.safetensors")).state_dict()
    assert all(torch.equal(read[name], state[name]) for name in state)

    state["Mixed_9z.b0.conv3d.weight"] = state.pop("Mixed_3b.b0.conv3d.weight")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="1 of its 287 keys are missing, such as 'Mixed_3b.b0.conv3d.weight'"):
        InceptionI3d.from_pretrained(str(tmp_path / "other.safetensors"))
    state["Mixed_3b.b0.conv3d.weight"] = state.pop("Mixed_9z.b0.conv3d.weight")[:1].clone()
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"it has 'Mixed_3b.b0.conv3d.weight' of shape \(1, 192, .*, not \(64, 192, "):
        InceptionI3d.from_pretrained(str(tmp_path / "other.safetensors"))


def test_a_pickled_file_is_refused_with_what_to_do(tmp_path):
    torch.save(InceptionI3d().state_dict(), tmp_path / "i3d_pretrained_400.pt")
    with pytest.raises(ValueError, match="Convert them: python -c"):
        InceptionI3d.from_pretrained(str(tmp_path / "i3d_pretrained_400.pt"))


def test_a_folder_without_the_weights(tmp_path):
    with pytest.raises(ValueError, match="a .safetensors file of the Inception-I3D, got .* where there is none"):
        InceptionI3d.from_pretrained(str(tmp_path))
