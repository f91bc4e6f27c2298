"""What is particular to AnimateDiff: loading in its several forms, its betas, its denoiser and LoRA targets."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, UNetMotionModel
from safetensors.torch import load_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler
from diffusers_mcm.base_models import get_base_model, infer_base_model
from diffusers_mcm.lora import CONFIG_NAME, add_lora, fresh_lora, load_lora_into, lora_layers
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    EXACT,
    NUM_FRAMES,
    SCHEDULER,
    TEXT_DIM,
    TEXT_LENGTH,
    randomise_lora,
    save_lora,
    save_tiny_stable_diffusion,
    tiny_animatediff_components,
    tiny_image_unet,
    tiny_motion_adapter,
    tiny_motion_unet,
    tiny_vae,
)

ANIMATEDIFF = get_base_model("animatediff")
LINEAR = DDIMScheduler(**ANIMATEDIFF_SCHEDULER).alphas_cumprod


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stable Diffusion, a motion adapter, and a LoRA for the two together, each in a folder."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_stable_diffusion(folder / "sd")
    tiny_motion_adapter().save_pretrained(folder / "adapter")
    unet = tiny_motion_unet()
    targets = [
        name for name in ANIMATEDIFF.lora_target_modules(unet) if name.startswith("up_blocks.1.motion_modules.0.")
    ]
    add_lora(unet, targets, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    randomise_lora(unet)
    options = dict(repository=folder / "sd", extra_repositories={"motion_adapter": folder / "adapter"})
    save_lora(folder / "lora", unet, ANIMATEDIFF, scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER), **options)
    return folder


def sample(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float64)  # read from a file weights lie elsewhere in memory: float32 products differ with that
    options = dict(num_frames=NUM_FRAMES, num_inference_steps=2, output_type="latent") | options
    return pipe("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


@pytest.fixture(scope="module")
def video(world):
    return sample(MCMPipeline.from_pretrained(world / "lora"))


# --- the full size ---------------------------------------------------------------------------------------------------
def test_lora_targets_are_those_of_the_released_adapters():
    with torch.device("meta"):
        unet = UNetMotionModel(sample_size=64, cross_attention_dim=768)
    targets = ANIMATEDIFF.lora_target_modules(unet)
    with torch.device("meta"):
        tensors = fresh_lora(unet, targets, rank=64).tensors
    assert (len(targets), len(tensors)) == (530, 1060)
    assert sum(tensor.numel() for tensor in tensors.values()) == 108_335_104
    # A digest of the released adapters' keys and shapes.
    layout = sorted((f"base_model.model.{key}", list(tensor.shape)) for key, tensor in tensors.items())
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    assert digest == "ad08173a5734e059c1bdcbdb3dd4e6f77dda90fa440b54d37389e0b6f00a9edf"


def test_what_it_is_recognised_by():
    assert infer_base_model(lora_modules=["mid_block.motion_modules.0.proj_in"]) is ANIMATEDIFF
    image = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    assert infer_base_model(model_index=image) is ANIMATEDIFF
    assert infer_base_model(model_index={"unet": ["diffusers", "UNetMotionModel"]}) is ANIMATEDIFF
    with pytest.raises(ValueError, match="UNetMotionModel or UNet2DConditionModel"):
        infer_base_model(model_index=image | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]})


# --- the noise schedule ----------------------------------------------------------------------------------------------
def test_betas_are_linear_on_stable_diffusion(world):
    """The image model's own are scaled linear."""
    assert DDIMScheduler.from_pretrained(world / "sd" / "scheduler").config.beta_schedule == "scaled_linear"
    pipe = MCMPipeline.from_pretrained(world / "sd", motion_adapter=world / "adapter")
    torch.testing.assert_close(ANIMATEDIFF.noise_path(pipe.scheduler.config).alphas ** 2, LINEAR)
    assert isinstance(pipe.scheduler, MCMScheduler)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, LINEAR)
    assert (pipe.scheduler.config.clip_sample, pipe.scheduler.config.prediction_type) == (False, "epsilon")
    assert ANIMATEDIFF.scheduler_config(None)["steps_offset"] == 1


def test_what_the_image_model_predicts_is_kept(tmp_path):
    save_tiny_stable_diffusion(tmp_path, scheduler=DDIMScheduler(**SCHEDULER | {"prediction_type": "v_prediction"}))
    pipe = MCMPipeline.from_pretrained(tmp_path, motion_adapter=tiny_motion_adapter())
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, LINEAR)


def test_a_saved_animatediff_pipelines_schedule_is_its_own(tmp_path):
    own = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    AnimateDiffPipeline(**tiny_animatediff_components() | dict(scheduler=own), motion_adapter=None).save_pretrained(
        tmp_path
    )
    path = ANIMATEDIFF.noise_path(MCMPipeline.from_pretrained(tmp_path).scheduler.config)
    torch.testing.assert_close(path.alphas**2, own.alphas_cumprod)
    torch.testing.assert_close(MCMPipeline.from_pretrained(tmp_path).scheduler.alphas_cumprod, own.alphas_cumprod)


# --- loading ---------------------------------------------------------------------------------------------------------
def test_a_lora_brings_stable_diffusion_and_the_motion_adapter(world, video):
    config = json.loads((world / "lora" / CONFIG_NAME).read_text())
    assert config["base_model_repository"] == "../sd"
    assert config["extra_repositories"] == {"motion_adapter": "../adapter"}
    pipe = MCMPipeline.from_pretrained(world / "lora")
    assert type(pipe) is AnimateDiffMCMPipeline and type(pipe.unet) is UNetMotionModel
    assert pipe.get_list_adapters() == {"unet": ["mcm"]}
    pipe.disable_lora()
    reference = AnimateDiffMCMPipeline(**tiny_animatediff_components() | {"scheduler": pipe.scheduler})
    assert torch.equal(sample(pipe), sample(reference)) and not torch.equal(sample(pipe), video)
    assert [pipe.sampling_default(name) for name in ("num_inference_steps", "fps")] == [4, 8]


def test_a_fine_tune_and_another_adapter(world, tmp_path, video):
    save_tiny_stable_diffusion(tmp_path / "tuned", seed=1)
    tuned = sample(MCMPipeline.from_pretrained(world / "lora", base_model=tmp_path / "tuned"))
    assert not torch.allclose(tuned, video)
    for adapter in (world / "adapter", tiny_motion_adapter()):
        options = dict(base_model=tmp_path / "tuned", motion_adapter=adapter)
        assert torch.equal(sample(MCMPipeline.from_pretrained(world / "lora", **options)), tuned)
    moving = sample(MCMPipeline.from_pretrained(world / "lora", motion_adapter=tiny_motion_adapter(1)))
    assert not torch.allclose(moving, video)


def test_a_motion_adapter_that_has_gone(world, tmp_path, video):
    lora = shutil.copytree(world / "lora", tmp_path / "lora")
    options = dict(base_model=world / "sd")
    with pytest.raises(FileNotFoundError, match=r"'../adapter', but .* Say where it is with `motion_adapter=`"):
        MCMPipeline.from_pretrained(lora, **options)
    pipe = MCMPipeline.from_pretrained(lora, motion_adapter=world / "adapter", **options)
    assert torch.equal(sample(pipe), video)


@pytest.mark.parametrize("kind", ["stock", "with its adapter", "ours"])
def test_saved_pipelines(world, tmp_path, video, kind):
    """A base model saved as a pipeline needs no other repository."""
    parts = tiny_animatediff_components()
    if kind == "stock":
        AnimateDiffPipeline(**parts, motion_adapter=tiny_motion_adapter()).save_pretrained(tmp_path)
        assert (tmp_path / "motion_adapter").is_dir()
    elif kind == "ours":
        AnimateDiffMCMPipeline(**parts).save_pretrained(tmp_path)
        assert not (tmp_path / "motion_adapter").exists()
        assert isinstance(AnimateDiffPipeline.from_pretrained(tmp_path).unet, UNetMotionModel)
    else:
        parts = {"motion_adapter": tiny_motion_adapter(), "scheduler": parts["scheduler"]}
        save_tiny_stable_diffusion(tmp_path, class_name="AnimateDiffPipeline", **parts)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["unet"][1] == "UNet2DConditionModel" and index["motion_adapter"][1] == "MotionAdapter"
    lora = MCMPipeline.from_pretrained(tmp_path, lora=world / "lora")
    torch.testing.assert_close(sample(lora), video, **EXACT)
    loaded, reference = MCMPipeline.from_pretrained(tmp_path).unet, tiny_motion_unet().state_dict()
    assert all(torch.equal(reference[key], value) for key, value in loaded.state_dict().items())
    assert ANIMATEDIFF.components_elsewhere(json.loads((tmp_path / "model_index.json").read_text())) == {}
    moving = MCMPipeline.from_pretrained(tmp_path, motion_adapter=tiny_motion_adapter(1))
    assert not torch.equal(sample(moving), sample(MCMPipeline.from_pretrained(tmp_path)))


def test_saving_and_reloading_with_the_lora(world, tmp_path, video):
    pipe = MCMPipeline.from_pretrained(world / "lora")
    pipe.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any(".lora_" in key or ".base_layer." in key for key in weights)
    unet = pipe.unet.state_dict()
    again = MCMPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(unet[key], value) for key, value in again.unet.state_dict().items())
    torch.testing.assert_close(sample(again), video, **EXACT)
    alone = tmp_path / "mcm_adapters" / "mcm"
    assert torch.equal(sample(MCMPipeline.from_pretrained(alone)), sample(again))
    assert str(world) not in (alone / CONFIG_NAME).read_text()
    pipe.save_mcm_lora(tmp_path / "lora")
    assert str(tmp_path) not in (tmp_path / "lora" / CONFIG_NAME).read_text()
    torch.testing.assert_close(sample(MCMPipeline.from_pretrained(tmp_path / "lora")), video, **EXACT)


def test_an_image_unet_needs_motion_modules():
    with pytest.raises(ValueError, match="UNet2DConditionModel has no motion modules; expected a `motion_adapter`"):
        AnimateDiffMCMPipeline(**tiny_animatediff_components() | {"unet": tiny_image_unet()})


# --- the denoiser ----------------------------------------------------------------------------------------------------
def test_every_frame_gets_the_text_of_its_sample():
    unet = tiny_motion_unet().double()
    latents, t = torch.randn(2, 4, NUM_FRAMES, 8, 8).double(), torch.tensor([9, 99])
    embeds = torch.randn(2, NUM_FRAMES, TEXT_LENGTH, TEXT_DIM).double()
    with torch.no_grad():
        per_frame = ANIMATEDIFF.denoise(unet, latents, t, {"prompt_embeds": embeds})
        assert torch.equal(per_frame, unet(latents, t, embeds.flatten(0, 1)).sample)
        output = ANIMATEDIFF.denoise(unet, latents, t, {"prompt_embeds": embeds[:, 0]})
        assert torch.equal(output, unet(latents, t, embeds[:, 0].repeat_interleave(NUM_FRAMES, 0)).sample)
        alone = ANIMATEDIFF.denoise(unet, latents[1:], t[1:], {"prompt_embeds": embeds[1:, 0]})
    torch.testing.assert_close(output[1:], alone, **EXACT)


def test_more_frames_than_the_motion_modules_know():
    with pytest.raises(ValueError, match="at most 8, the most that the motion modules.*got 9; `enable_free_noise"):
        ANIMATEDIFF.latent_shape(tiny_motion_unet(), tiny_vae(), 9, 16, 16)


def test_a_lora_on_the_motion_modules_projections_runs():
    """diffusers calls them with `input=`, which peft's layers do not know."""
    unet, generator = tiny_motion_unet().double(), torch.Generator().manual_seed(0)
    embeds = torch.randn(NUM_FRAMES, TEXT_LENGTH, TEXT_DIM).double()
    inputs = (torch.randn(1, 4, NUM_FRAMES, 8, 8).double(), torch.tensor(500), embeds)
    targets = [name for name in ANIMATEDIFF.lora_target_modules(unet) if ".motion_modules." in name]
    projections = [name for name in targets if name.endswith(("proj_in", "proj_out"))]
    assert len(projections) == 2 * 7
    with torch.no_grad():
        plain = unet(*inputs).sample
        lora = fresh_lora(unet, projections, rank=2, alpha=2, generator=generator)
        for tensor in lora.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        load_lora_into(unet, lora, "a")
        load_lora_into(unet, lora, "b")
        layers = lora_layers(unet)
        assert all(len(layer._forward_pre_hooks) == 1 for layer in layers.values())
        for layer in layers.values():
            layer.set_adapter(["a"])
        unmerged = unet(*inputs).sample
        assert not torch.allclose(unmerged, plain, rtol=1e-2)
        merged = tiny_motion_unet().double()
        for name in projections:
            down, up = (lora.tensors[f"{name}.lora_{half}.weight"].double() for half in "AB")
            delta = up @ down
            merged.get_submodule(name).weight += delta
        torch.testing.assert_close(unmerged, merged(*inputs).sample, **EXACT)
