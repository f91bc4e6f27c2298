"""A base model whose files are not the package's is told by its row alone: nothing else has to change."""

import json

import pytest
import torch

from diffusers_mcm import MCMPipeline, WanMCMPipeline
from diffusers_mcm.base_models import BASE_MODELS, get_base_model, infer_base_model
from diffusers_mcm.base_models.wan import Wan
from tests.tiny_wan import SIZE, save_wan_base


class Puppets(Wan):
    """A Wan that somebody trained on other videos."""

    name = "puppets"
    default_repository = "nobody/puppets"
    num_frames = 5
    height = width = SIZE
    fps = 12

    def matches(self, model_index):
        return super().matches(model_index) and "puppets" in model_index


@pytest.fixture
def pipeline_class():
    """Defined as in a user's file: the class registers itself, the row is put first."""
    others = dict(BASE_MODELS)
    BASE_MODELS.clear()
    BASE_MODELS.update({Puppets.name: Puppets(), **others})

    class PuppetsMCMPipeline(WanMCMPipeline):
        base_model = BASE_MODELS["puppets"]

    return PuppetsMCMPipeline


def test_a_row_is_enough_to_load_and_sample(pipeline_class, tmp_path):
    folder = save_wan_base(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    assert infer_base_model(model_index=index) is get_base_model("wan")
    (folder / "model_index.json").write_text(json.dumps(index | {"puppets": True}))
    pipe = MCMPipeline.from_pretrained(folder)
    assert type(pipe) is pipeline_class and pipe.base_model is get_base_model("puppets")
    assert pipe.sampling_default("fps") == 12
    pipe.set_progress_bar_config(disable=True)
    latents = pipe("a", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    assert latents.shape == (1, 16, 2, 4, 4)
