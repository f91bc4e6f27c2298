"""`DiffusionPipeline.from_pretrained(base, custom_pipeline=…, trust_remote_code=True)`."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, MotionAdapter

from diffusers_mcm import MCMPipeline, MCMScheduler
from tests.formats.world import ADAPTER, MODELSCOPE, STABLE_DIFFUSION, sample

COMMUNITY = Path(__file__).parents[2] / "examples/community"


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """diffusers copies the file before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))
        yield


def test_modelscope(hub_root, tmp_path):
    options = dict(custom_pipeline=str(COMMUNITY / "mcm_modelscope.py"), trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(hub_root / MODELSCOPE, **options)
    assert isinstance(pipe, MCMPipeline) and type(pipe.scheduler) is MCMScheduler
    pipe.load_mcm_lora(hub_root / "yhzhai/mcm", subfolder="modelscopet2v-laion")
    expected = MCMPipeline.from_pretrained(
        hub_root / "yhzhai/mcm", subfolder="modelscopet2v-laion", base_model=hub_root / MODELSCOPE
    )
    assert torch.equal(sample(pipe), sample(expected))
    pipe.save_pretrained(tmp_path / "saved")  # is a pipeline of the package's
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "saved")), sample(expected))


def test_animatediff(hub_root):
    pipe = DiffusionPipeline.from_pretrained(
        hub_root / STABLE_DIFFUSION,
        motion_adapter=MotionAdapter.from_pretrained(hub_root / ADAPTER),
        custom_pipeline=str(COMMUNITY / "mcm_animatediff.py"),
        trust_remote_code=True,
    )
    assert isinstance(pipe, MCMPipeline) and pipe.scheduler.config.beta_schedule == "linear"
    pipe.load_mcm_lora(hub_root / "yhzhai/mcm", subfolder="animatediff-laion")
    places = dict(base_model=hub_root / STABLE_DIFFUSION, motion_adapter=hub_root / ADAPTER)
    expected = MCMPipeline.from_pretrained(hub_root / "yhzhai/mcm", subfolder="animatediff-laion", **places)
    assert torch.equal(sample(pipe), sample(expected))


def test_without_the_flag_diffusers_refuses(hub_root):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(hub_root / MODELSCOPE, custom_pipeline=str(COMMUNITY / "mcm_modelscope.py"))
