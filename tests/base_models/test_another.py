"""A second base model, with other names and another scheduler, is a class and a row: nothing else has to change."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet3DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_mcm import MCMPipeline, MCMScheduler
from diffusers_mcm.base_models import BASE_MODELS, infer_base_model
from diffusers_mcm.base_models.modelscope import ModelScope
from diffusers_mcm.lora import WEIGHTS_NAME, add_lora, save_lora
from tests.tiny import FEW_MODULES, NUM_FRAMES, SCHEDULER, randomise_lora, save_tiny_base, tiny_components


class OtherScheduler(MCMScheduler):
    pass


class Other(ModelScope):
    """Its denoiser is called `transformer`, and it has a scheduler of its own."""

    name = "other"
    denoiser_name = "transformer"
    scheduler_class = OtherScheduler


class OtherMCMPipeline(MCMPipeline):
    base_model = Other()
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: UNet3DConditionModel,
        scheduler: SchedulerMixin,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
    ):
        super().__init__()
        sampling = dict(num_frames=num_frames, num_inference_steps=num_inference_steps)
        parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)
        self._set_up(sampling | dict(height=height, width=width, fps=fps), **parts, scheduler=scheduler)


@pytest.fixture
def lora(tmp_path, monkeypatch):
    """A LoRA folder beside its base model, the row being in the table."""
    monkeypatch.setitem(BASE_MODELS, "other", OtherMCMPipeline.base_model)
    components = tiny_components()
    unet = components.pop("unet")
    save_tiny_base(tmp_path / "made", transformer=unet)
    # `save_tiny_base` makes a ModelScope; this one has a `transformer` in place of the `unet`
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    del index["unet"]
    (tmp_path / "made" / "model_index.json").write_text(json.dumps(index))
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    randomise_lora(unet)
    options = dict(repository=tmp_path / "made", scheduler=OtherScheduler(**SCHEDULER), sampling={"fps": 5})
    return save_lora(tmp_path / "lora", unet, BASE_MODELS["other"], **options)


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_frames=NUM_FRAMES, num_inference_steps=2, guidance_scale=2.0, output_type="pt")
    return pipe("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


def test_a_row_is_enough_to_load_sample_and_save(lora, tmp_path):
    assert all(key.startswith("transformer.") for key in load_file(lora / WEIGHTS_NAME))
    pipe = MCMPipeline.from_pretrained(lora)
    assert type(pipe) is OtherMCMPipeline and type(pipe.scheduler) is OtherScheduler
    assert pipe.get_list_adapters() == {"transformer": ["mcm"]}
    video = sample(pipe)
    assert pipe.sampling_default("fps") == 5
    pipe.save_pretrained(tmp_path / "saved")
    assert not any(".lora_" in key or ".base_layer." in key for key in pipe_weights(tmp_path / "saved"))
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "saved")), video)
    pipe.disable_lora()
    assert not torch.allclose(sample(pipe), video)
    base = MCMPipeline.from_pretrained(tmp_path / "made")
    assert torch.equal(sample(base), sample(pipe)) and type(base.scheduler) is OtherScheduler


def pipe_weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_rows_do_not_take_each_others_models(lora, tmp_path):
    save_tiny_base(tmp_path / "modelscope")
    for folder, name in (("made", "other"), ("modelscope", "modelscope")):
        index = json.loads((tmp_path / folder / "model_index.json").read_text())
        assert infer_base_model(model_index=index).name == name
    with pytest.raises(ValueError, match="made for base model 'other'; this is 'modelscope'"):
        MCMPipeline.from_pretrained(tmp_path / "modelscope", lora=lora)
