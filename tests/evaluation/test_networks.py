"""The rows of the tables of networks: pixels go in as each was trained; what comes out is the layer that is named."""

import shutil
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model, VideoMAEModel, VJEPA2Model

from diffusers_mcm.evaluation.i3d import InceptionI3d
from diffusers_mcm.evaluation.networks import (
    FRAME_NETWORKS,
    VIDEO_NETWORKS,
    Choice,
    load_clip,
    load_dinov2,
    load_inception,
    load_videomae,
    load_vjepa2,
)
from diffusers_mcm.hub import resolve
from diffusers_mcm.shapes.render import render_video
from tests.evaluation.test_i3d import fill
from tests.hub_server import hub_server

RNG = np.random.default_rng(0)
# one process, one thread: what differs between a batch of one and of several is the order of additions
SAME = dict(rtol=1e-4, atol=1e-5)


def clips(count=2, frames=8, size=32):
    return RNG.integers(0, 256, (count, frames, size, size, 3), dtype=np.uint8)


def normalised(frames, mean, std):
    """(..., H, W, 3) uint8 -> (..., 3, H, W)."""
    pixels = (frames / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(np.moveaxis(pixels, -1, -3)).float()


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def test_videomae_is_the_mean_token_of_normalised_frames(videomae):
    frames = clips()
    expected = VideoMAEModel.from_pretrained(videomae).eval()(normalised(frames, *IMAGENET)).last_hidden_state.mean(1)
    np.testing.assert_allclose(load_videomae(videomae)(frames), expected.numpy(), **SAME)


@torch.no_grad()
def test_vjepa2_reads_how_pixels_go_in_from_its_files(vjepa2):
    frames = clips()
    model = VJEPA2Model.from_pretrained(vjepa2).eval()
    pixels = normalised(frames, [0.5] * 3, [0.25] * 3)
    expected = model(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state.mean(1)
    np.testing.assert_allclose(load_vjepa2(vjepa2)(frames), expected.numpy(), **SAME)


def without(source, folder, part):
    """A network's folder in which the weights that have `part` in their names are missing."""
    shutil.copytree(resolve(source), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "load, source, part",
    [
        (load_videomae, "mcm-shapes-video", "layer.2."),
        (load_dinov2, "mcm-shapes-features", "layernorm."),
        (load_clip, "mcm-shapes-clip", "visual_projection"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(load, source, part, tmp_path):
    with pytest.raises(ValueError, match=f"does not hold all weights of a .*: .*{part}.*; they would be random"):
        load(without(source, tmp_path / "network", part))


def test_a_part_of_a_network_that_is_missing_is_not_made_up(vjepa2, tmp_path):
    with pytest.raises(ValueError, match="does not hold all weights of a VJEPA2Model, .*: encoder.layernorm.bias, "):
        load_vjepa2(without(vjepa2, tmp_path / "network", "encoder.layernorm"))


@pytest.mark.parametrize(
    "load, source, message",
    [
        (load_vjepa2, "mcm-shapes-video", "type 'vjepa2' in .*, got 'videomae'"),
        (load_videomae, "mcm-shapes-features", "type 'videomae' in .*, got 'dinov2'"),
        (load_dinov2, "mcm-shapes-clip", "type 'dinov2' in .*, got 'clip'"),
        (load_clip, "mcm-shapes-video", "type 'clip' in .*, got 'videomae'"),
    ],
)
def test_a_network_of_another_kind(load, source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


@torch.no_grad()
def test_dinov2_is_the_class_token():
    frames = clips(3, 1, 64)[:, 0]
    model = Dinov2Model.from_pretrained(resolve("mcm-shapes-features"), dtype=torch.float32).eval()
    expected = model(normalised(frames, *IMAGENET)).last_hidden_state[:, 0]
    np.testing.assert_allclose(load_dinov2("mcm-shapes-features")(frames), expected.numpy(), rtol=1e-3, atol=1e-4)


def test_frames_are_brought_to_the_size_of_the_network(videomae):
    network = load_videomae(videomae)
    flat = np.broadcast_to(np.uint8([10, 90, 200]), (1, 8, 48, 80, 3))  # of one colour, whatever its size
    same = np.broadcast_to(np.uint8([10, 90, 200]), (1, 8, 32, 32, 3))
    np.testing.assert_allclose(network(flat), network(same), **SAME)


def test_the_number_of_frames_is_checked(videomae, vjepa2):
    with pytest.raises(ValueError, match="videomae takes 8 frames, not 16: ask for them with --num_frames"):
        load_videomae(videomae).check_frames(16, "videomae")
    with pytest.raises(ValueError, match="vjepa2 needs at least 2 frames, got 1"):
        load_vjepa2(vjepa2).check_frames(1, "vjepa2")


def test_a_network_is_described_by_its_weights(videomae, tmp_path):
    first, again = load_videomae(videomae), load_videomae(videomae)
    assert first.described() == again.described() and len(first.digest()) == 64
    with torch.no_grad():
        next(again.model.parameters()).add_(1e-3)
    assert first.digest() != again.digest()


def test_the_same_weights_in_another_configuration_are_another_network(videomae, tmp_path):
    import json

    shutil.copytree(videomae, tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text()) | {"num_attention_heads": 4}
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    shutil.copytree(videomae, tmp_path / "moved")
    assert load_videomae(str(tmp_path / "heads")).digest() != load_videomae(videomae).digest()
    assert load_videomae(str(tmp_path / "moved")).digest() == load_videomae(videomae).digest()


def test_clip_measures_a_picture_against_its_caption():
    """The packaged CLIP: 74.83 for a true caption (the mean over frames of 100 × cosine), about 0 for a false one."""
    caption = "a red circle moving left on a black background"
    clip = load_clip("mcm-shapes-clip")
    images = clip(render_video(caption, 0))
    texts = clip.text([caption, "a cyan ring growing on a white background"])
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (images, texts)]
    similarity = 100 * (unit[0] @ unit[1].T).mean(0)
    assert similarity[0] == pytest.approx(74.829, abs=0.01)
    assert similarity[1] < 20


def test_clip_names_its_processor():
    described = load_clip("mcm-shapes-clip").described()
    assert described["resize"].startswith("Pillow") and '"image_mean": [0.5, 0.5, 0.5]' in described["resize"]


@pytest.mark.parametrize("row", ["i3d", "i3d="])
def test_weights_that_are_nowhere_must_be_given(row):
    with pytest.raises(ValueError, match="give a file, i3d=FILE; pickled weights are not read"):
        Choice.parse(row, VIDEO_NETWORKS)


def test_a_choice_is_a_row_and_perhaps_weights():
    assert Choice.parse("videomae=mcm-shapes-video", VIDEO_NETWORKS) == Choice("videomae", "mcm-shapes-video")
    assert Choice.parse("dinov2", FRAME_NETWORKS) == Choice("dinov2", "facebook/dinov2-base")
    with pytest.raises(ValueError, match="out of dinov2, clip, inception, got 'lpips'"):
        Choice.parse("lpips", FRAME_NETWORKS)


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="install torch-fidelity .* or take dinov2 or clip"):
        load_inception("anything")


@pytest.fixture
def torch_fidelity(monkeypatch):
    """A stand-in, whose class reads a file that torch wrote and takes uint8 pictures."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.zeros(3, 5))
            self.load_state_dict(torch.load(feature_extractor_weights_path))

        def forward(self, pictures):
            assert pictures.dtype == torch.uint8
            return (pictures.float().mean((2, 3)) @ self.weights,)

    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)


def test_inception_is_filled_from_safetensors(torch_fidelity, tmp_path):
    weights = torch.randn(3, 5)
    save_file({"weights": weights}, tmp_path / "inception.safetensors")
    frames = clips(2, 1)[:, 0]
    found = load_inception(str(tmp_path / "inception.safetensors"))(frames)
    np.testing.assert_allclose(found, frames.mean((1, 2)) @ weights.numpy(), rtol=1e-4, atol=1e-3)
    save_file({"others": weights}, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match="(?s)does not hold the weights of FID's Inception v3: .*Missing key"):
        load_inception(str(tmp_path / "inception.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"expected fid_inception\.safetensors, or one \.safetensors file alone, in .*empty"
    ):
        load_inception(str(tmp_path / "empty"))


def test_inceptions_own_repository_has_weights_of_another_network_too(torch_fidelity, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source, weights = FRAME_NETWORKS["inception"].source, torch.randn(3, 5)
    (tmp_path / source).mkdir(parents=True)
    save_file({"weights": weights}, tmp_path / source / "fid_inception.safetensors")
    save_file({"others": weights}, tmp_path / source / "lpips_vgg.safetensors")
    frames = clips(2, 1)[:, 0]
    with hub_server(tmp_path):
        found = FRAME_NETWORKS["inception"].load(source)(frames)
    np.testing.assert_allclose(found, frames.mean((1, 2)) @ weights.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("row, eps", [("i3d", 1e-5), ("i3d-eps1e-3", 1e-3)])
@torch.no_grad()
def test_i3d_sees_frames_between_minus_one_and_one_of_its_own_size(row, eps, tmp_path):
    model = fill(InceptionI3d(eps))
    save_file(model.state_dict(), tmp_path / "i3d.safetensors")
    network = VIDEO_NETWORKS[row].load(str(tmp_path / "i3d.safetensors"))
    frames = clips(1, 9, 56)
    pixels = torch.nn.functional.interpolate(
        normalised(frames, [0.5] * 3, [0.5] * 3)[0], (224, 224), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(network(frames), model(pixels.transpose(0, 1)[None]).numpy(), **SAME)
    assert network.described()["layer"] == f"400 logits, eps {row.partition('eps')[2] or '1e-5'}"
    with pytest.raises(ValueError, match=f"{row} needs at least 9 frames, got 8"):
        network.check_frames(8, row)
