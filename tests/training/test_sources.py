from diffusers_mcm.training.acceleration import with_accelerate_settings
from diffusers_mcm.training.networks import build_networks
from diffusers_mcm.training.sources import planned_clip_size

from .world import tiny_config


def test_the_clip_size_is_known_without_the_networks(world, animatediff, tmp_path, monkeypatch):
    import torch

    for base in (world, animatediff):
        options = dict(lambda_adv=0.0, image_data=None, height=None, width=None)
        config = with_accelerate_settings(tiny_config(base, tmp_path, **options))
        expected = build_networks(config, torch.device("cpu")).clip_size
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.load_file", lambda *_: 1 / 0)
            assert planned_clip_size(config) == expected
    assert planned_clip_size(tiny_config(world, tmp_path, height=8, width=24)) == (4, 8, 24)
