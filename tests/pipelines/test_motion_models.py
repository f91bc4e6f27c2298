"""AnimateLCM and AnimateDiff-Lightning in the layouts of their repositories, with tiny random weights, against what
diffusers' own pipeline makes of them when it is used as their makers say."""

import shutil

import pytest
import torch
from diffusers import AnimateDiffPipeline, EulerDiscreteScheduler, LCMScheduler, MotionAdapter
from safetensors.torch import load_file, save_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.location import Location
from diffusers_mcm.pipelines.motion_models import OF_STEPS, PLAIN, WITH_LORA, find_motion_model
from tests.formats.world import STABLE_DIFFUSION, sample
from tests.hub_server import hub_server
from tests.motion_models import FINE_TUNE, FINE_TUNE_SEED, LCM, LCM_LORA, LIGHTNING, SIZES, WIDTHS, save_motion_models
from tests.tiny import (
    save_tiny_base,
    save_tiny_lora,
    tiny_components,
    tiny_image_unet,
    tiny_motion_adapter,
)

CLOSE = dict(rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_motion_models(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def on_hub(root, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(root) as server:
        yield server


def stock(adapter, scheduler_class, seed=0, **options) -> AnimateDiffPipeline:
    """diffusers' pipeline with an adapter, on a scheduler with the image model's configuration but for the betas."""
    components = tiny_components(seed) | {"unet": tiny_image_unet(seed, **WIDTHS), "motion_adapter": adapter}
    pipe = AnimateDiffPipeline(**components)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, beta_schedule="linear", **options)
    return pipe


def stock_lcm(root, seed=0) -> AnimateDiffPipeline:
    pipe = stock(MotionAdapter.from_pretrained(root / LCM), LCMScheduler, seed)
    pipe.load_lora_weights(root / LCM, weight_name=LCM_LORA, adapter_name="lcm-lora")
    pipe.set_adapters(["lcm-lora"], [0.8])
    return pipe


def stock_lightning(root, steps) -> AnimateDiffPipeline:
    adapter = MotionAdapter(**SIZES, motion_layers_per_block=1)
    adapter.load_state_dict(load_file(root / LIGHTNING / f"animatediff_lightning_{steps}step_diffusers.safetensors"))
    return stock(adapter, EulerDiscreteScheduler, timestep_spacing="trailing")


# --- AnimateLCM ------------------------------------------------------------------------------------------------------
def test_animate_lcm_by_its_name(root, on_hub):
    pipe = MCMPipeline.from_pretrained(LCM)
    assert type(pipe) is AnimateDiffMCMPipeline and type(pipe.scheduler) is LCMScheduler
    assert pipe.scheduler.config.beta_schedule == "linear"
    assert pipe.get_active_adapters() == ["animatelcm"] and pipe.sampling_default("num_inference_steps") == 6
    asked = {request.rpartition("/")[2] for request in on_hub.requests if request.startswith("GET")}
    assert LCM_LORA in asked and "AnimateLCM_sd15_t2v.ckpt" not in asked
    options = dict(steps=6, guidance_scale=WITH_LORA.guidance_scale, negative_prompt="dull")
    expected = sample(stock_lcm(root), **options)
    torch.testing.assert_close(sample(pipe, **options), expected, **CLOSE)
    pipe.set_adapters("animatelcm", 1.0)
    assert (sample(pipe, **options) - expected).abs().max() > 1e-3  # the weight is the makers'


def test_animate_lcm_in_a_fine_tune_and_from_a_folder(root, on_hub):
    pipe = MCMPipeline.from_pretrained(root / LCM, base_model=FINE_TUNE, num_inference_steps=2)
    assert pipe.sampling_default("num_inference_steps") == 2
    torch.testing.assert_close(sample(pipe), sample(stock_lcm(root, FINE_TUNE_SEED)), **CLOSE)


def test_animate_lcm_offline(root, tmp_path, on_hub):
    """From what the cache holds after it has been loaded once."""
    sampled = sample(MCMPipeline.from_pretrained(LCM))
    on_hub.fail(".*", 500, times=1000)
    assert torch.equal(sample(MCMPipeline.from_pretrained(LCM, local_files_only=True)), sampled)


def test_of_several_loras_one_is_named(root, tmp_path):
    folder = shutil.copytree(root / LCM, tmp_path / "lcm")
    shutil.copyfile(folder / LCM_LORA, folder / "style.safetensors")
    with pytest.raises(ValueError, match=rf"several files beside the motion modules in .*: {LCM_LORA}, style"):
        MCMPipeline.from_pretrained(folder)
    found = find_motion_model(Location.of(folder, weight_name=LCM_LORA))
    assert found.kind is WITH_LORA and found.lora.find_lora_file() == folder / LCM_LORA


def test_a_name_of_its_own_changes_nothing(root, tmp_path):
    folder = shutil.copytree(root / LCM, tmp_path / "mine")
    (folder / LCM_LORA).rename(folder / "l.safetensors")
    assert find_motion_model(Location.of(folder)).kind is WITH_LORA


# --- AnimateDiff-Lightning -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lightning_takes_the_module_of_the_steps(root, on_hub, steps):
    pipe = MCMPipeline.from_pretrained(LIGHTNING, num_inference_steps=steps)
    assert type(pipe.scheduler) is EulerDiscreteScheduler and pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.sampling_default("num_inference_steps") == steps
    fetched = [request for request in on_hub.requests if request.startswith("GET") and "lightning" in request]
    assert len(fetched) == 1 and fetched[0].endswith(f"_{steps}step_diffusers.safetensors")
    torch.testing.assert_close(sample(pipe, steps=steps), sample(stock_lightning(root, steps), steps=steps), **CLOSE)


def test_lightning_from_a_folder_or_a_file_of_either_naming(root, on_hub):
    expected = sample(stock_lightning(root, 4), steps=4)
    stem = f"{root / LIGHTNING}/animatediff_lightning_4step"
    for source in (root / LIGHTNING, f"{stem}_diffusers.safetensors", f"{stem}_comfyui.safetensors"):
        pipe = MCMPipeline.from_pretrained(source)  # four steps are what its makers begin with
        torch.testing.assert_close(sample(pipe, steps=4), expected, **CLOSE)
    name = "animatediff_lightning_2step_diffusers.safetensors"
    found = find_motion_model(Location.of(root / LIGHTNING, weight_name=name))
    assert (found.kind, found.steps) == (OF_STEPS, 2)


def test_steps_that_no_module_is_for(root, tmp_path, on_hub):
    message = "has motion modules for 1, 2, 4, 8 steps, none for 3: a module serves .* Choose one of them"
    for source in (LIGHTNING, root / LIGHTNING):
        with pytest.raises(ValueError, match=f"AnimateDiff-Lightning {message}"):
            MCMPipeline.from_pretrained(source, num_inference_steps=3)
    name = "animatediff_lightning_8step_diffusers.safetensors"
    with pytest.raises(ValueError, match=f"{name} has motion modules for 8 steps, none for 4"):
        MCMPipeline.from_pretrained(root / LIGHTNING / name, num_inference_steps=4)
    shutil.copyfile(root / LIGHTNING / name, tmp_path / name)
    shutil.copyfile(root / LIGHTNING / name.replace("8", "2"), tmp_path / name.replace("8", "2"))
    assert find_motion_model(Location.of(tmp_path)).steps == 8  # the most, where there are none for four


# --- plain ones, and what is none ------------------------------------------------------------------------------------
def test_plain_motion_modules(root, tmp_path, on_hub):
    """AnimateDiff's own, as a folder and as a file: sampled as the base model is."""
    tiny_motion_adapter(1, **SIZES).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "alone").mkdir()
    shutil.copyfile(weights, tmp_path / "alone" / "mm_sd_v15_v2.safetensors")
    pipes = [MCMPipeline.from_pretrained(source) for source in (tmp_path / "adapter", tmp_path / "alone", weights)]
    for pipe in pipes:
        assert pipe.motion_model.kind is PLAIN and type(pipe.scheduler) is MCMScheduler
        assert pipe.get_list_adapters() == {} and pipe.sampling_default("num_inference_steps") == 4
    first, *others = map(sample, pipes)
    assert all(torch.equal(first, other) for other in others)
    base = MCMPipeline.from_pretrained(root / STABLE_DIFFUSION, motion_adapter=tmp_path / "adapter")
    assert torch.equal(sample(base), first) and base.motion_model is None


def test_something_else_is_none(root, tmp_path):
    base = save_tiny_base(tmp_path / "base")
    lora = save_tiny_lora(tmp_path / "lora", base)
    style = shutil.copytree(lora, tmp_path / "style")
    (style / "pytorch_lora_weights.safetensors").rename(style / "turbo_8step.safetensors")
    motion_lora = {f"unet.{key}_lora.down.weight": torch.ones(1) for key in ("down_blocks.0.motion_modules.0.to_q",)}
    save_file(motion_lora, tmp_path / "zoom.safetensors")
    (tmp_path / "mm.ckpt").write_bytes(b"pickled")
    (tmp_path / "empty").mkdir()
    for path in (base, lora, style, tmp_path / "zoom.safetensors", tmp_path / "mm.ckpt", tmp_path / "empty"):
        assert find_motion_model(Location.of(path)) is None, path
    assert find_motion_model(Location.of(root / LCM.split("/")[0])) is None  # it has a folder with such


def test_what_does_not_go_together(root, tmp_path):
    base = save_tiny_base(tmp_path / "base")
    with pytest.raises(ValueError, match="holds motion modules, which go into .* the `base_model` .* is a modelscope"):
        MCMPipeline.from_pretrained(root / LCM, base_model=base)
    with pytest.raises(ValueError, match="makes a AnimateDiffMCMPipeline, not a ModelScopeMCMPipeline"):
        ModelScopeMCMPipeline.from_pretrained(root / LCM, base_model=root / STABLE_DIFFUSION)
    with pytest.raises(ValueError, match="`lora` goes with a base model, but .*AnimateLCM is itself motion modules"):
        MCMPipeline.from_pretrained(root / LCM, lora=tmp_path)
    with pytest.raises(ValueError, match="`motion_adapter` goes with a base model, but .* is itself motion modules"):
        MCMPipeline.from_pretrained(root / LCM, base_model=root / STABLE_DIFFUSION, motion_adapter=root / LCM)
    with pytest.raises(
        ValueError, match=r"sd15_t2v\.ckpt .* is not a \.safetensors file; pickled weights are not read"
    ):
        MCMPipeline.from_pretrained(root / LCM / "AnimateLCM_sd15_t2v.ckpt")
