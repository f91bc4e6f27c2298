"""What `MCMPipeline.from_pretrained` takes, and what `save_pretrained` gives back."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet3DConditionModel
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMPipeline, MCMScheduler, ModelScopeMCMPipeline, hub
from diffusers_mcm.location import Location
from diffusers_mcm.lora import CONFIG_NAME, WEIGHTS_NAME, lora_layers
from tests.hub_server import hub_server
from tests.tiny import NUM_FRAMES, SCHEDULER, SIZE, realign, save_tiny_base, save_tiny_lora, tiny_unet

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model and an MCM LoRA for it, side by side."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    save_tiny_lora(folder / "lora", base=folder / "base")
    return folder


@pytest.fixture(scope="module")
def pipe(world):
    """Tests that change it put it back."""
    return MCMPipeline.from_pretrained(world / "lora")


@pytest.fixture(scope="module")
def video(pipe):
    return sample(pipe)


def sample(pipe, **options):
    realign(pipe)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_frames=NUM_FRAMES) | options
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **options).frames


# --- a LoRA ----------------------------------------------------------------------------------------------------------
def test_a_lora_folder_is_ready_to_sample(pipe, video):
    assert type(pipe) is ModelScopeMCMPipeline and isinstance(pipe, MCMPipeline)
    assert type(pipe.unet) is UNet3DConditionModel and type(pipe.scheduler) is MCMScheduler
    assert pipe.get_active_adapters() == ["mcm"] and pipe.unet.dtype == torch.float32
    assert (pipe.config.num_inference_steps, pipe.config.num_frames, pipe.config.height) == (2, NUM_FRAMES, SIZE)
    assert pipe.guidance_scale == 1 and not pipe.do_classifier_free_guidance
    assert video.shape == (1, NUM_FRAMES, 3, SIZE, SIZE) and video.std() > 0
    assert pipe.num_timesteps == 2
    assert not any(module.training for module in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_a_lora_file_does_the_same(world, video):
    pipe = MCMPipeline.from_pretrained(world / "lora" / WEIGHTS_NAME)
    assert torch.equal(sample(pipe), video)


def test_a_base_model_with_a_lora_does_the_same(world, video):
    pipe = MCMPipeline.from_pretrained(world / "base", lora=world / "lora")
    assert torch.equal(sample(pipe), video)
    assert pipe.config.num_inference_steps == 2


def test_a_lora_in_a_subfolder(world, tmp_path, video):
    shutil.copytree(world / "lora", tmp_path / "loras" / "webvid")
    options = dict(subfolder="webvid", base_model=world / "base")
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "loras", **options)), video)
    pipe = MCMPipeline.from_pretrained(world / "base", lora=tmp_path / "loras", subfolder="webvid")
    assert torch.equal(sample(pipe), video)
    with pytest.raises(ValueError, match=r"loras \(subfolder 'laion'\) holds neither"):
        MCMPipeline.from_pretrained(tmp_path / "loras", subfolder="laion")


def test_a_base_model_alone(world, video):
    pipe = MCMPipeline.from_pretrained(world / "base")
    assert isinstance(pipe, ModelScopeMCMPipeline) and pipe.get_list_adapters() == {}
    assert type(pipe.scheduler) is MCMScheduler
    sample(pipe)
    assert pipe.num_timesteps == 4
    pipe.load_mcm_lora(world / "lora")
    assert torch.equal(sample(pipe), video)


def test_the_world_can_be_moved(world, tmp_path, video):
    shutil.copytree(world, tmp_path / "moved")
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "moved" / "lora")), video)
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(FileNotFoundError, match="recorded as '../base', but .* Say where it is with `base_model=`"):
        MCMPipeline.from_pretrained(tmp_path / "moved" / "lora")
    moved = MCMPipeline.from_pretrained(tmp_path / "moved" / "lora", base_model=world / "base")
    assert torch.equal(sample(moved), video)


def test_the_packaged_model(world, tmp_path, monkeypatch, video):
    monkeypatch.setattr(hub, "PACKAGED_FOLDER", tmp_path)
    shutil.copytree(world / "base", tmp_path / "mcm-shapes-teacher")
    save_tiny_lora(tmp_path / "mcm-shapes", base="mcm-shapes-teacher")
    assert torch.equal(sample(MCMPipeline.from_pretrained("mcm-shapes")), video)


def test_half_precision_files_load_as_float32_unless_told(world, tmp_path):
    save_tiny_base(tmp_path / "base", unet=tiny_unet().half())
    lora = save_tiny_lora(tmp_path / "lora", base=tmp_path / "base", dtype=torch.float16)
    pipe = MCMPipeline.from_pretrained(lora)
    kinds = {parameter.dtype for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]}
    assert kinds == {torch.float32}
    for name in ("dtype", "torch_dtype"):
        pipe = MCMPipeline.from_pretrained(lora, **{name: torch.bfloat16})
        kinds = {parameter.dtype for parameter in [*pipe.unet.parameters(), *pipe.vae.parameters()]}
        assert kinds == {torch.bfloat16}


def test_a_base_model_that_is_there_in_half_precision_alone(world, tmp_path):
    """As `save_pretrained(variant="fp16")` leaves it, but for the VAE, which has plain weights."""
    pipe = MCMPipeline.from_pretrained(world / "base")
    pipe.save_pretrained(tmp_path, variant="fp16")
    vae = tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.safetensors"))
    message = r"has no plain weights .* give `variant='fp16'` \(--variant fp16\)"
    with pytest.raises(OSError, match=message):
        MCMPipeline.from_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(world / "lora", base_model=tmp_path, variant="fp16")
    base = MCMPipeline.from_pretrained(tmp_path, variant="fp16")
    for unet in (again.unet, base.unet):
        assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight)


# --- schedulers and sizes --------------------------------------------------------------------------------------------
def test_the_base_models_noise_schedule_is_kept(tmp_path):
    stock = DDIMScheduler(beta_schedule="linear", beta_end=0.015, prediction_type="v_prediction", clip_sample=True)
    save_tiny_base(tmp_path, scheduler=stock)
    config = MCMPipeline.from_pretrained(tmp_path).scheduler.config
    assert (config.beta_schedule, config.beta_end, config.prediction_type) == ("linear", 0.015, "v_prediction")
    assert (config.timestep_scaling, config.original_inference_steps, config.clip_sample) == (4.0, 50, False)


def test_the_loras_scheduler_wins_over_the_base_models(world, tmp_path):
    scheduler = MCMScheduler(**SCHEDULER | {"prediction_type": "sample"}, timestep_scaling=7.0)
    lora = save_tiny_lora(tmp_path, base=world / "base", scheduler=scheduler)
    config = MCMPipeline.from_pretrained(lora).scheduler.config
    assert (config.prediction_type, config.timestep_scaling) == ("sample", 7.0)
    without = save_tiny_lora(tmp_path / "without", base=world / "base", scheduler=None)
    assert MCMPipeline.from_pretrained(without).scheduler.config.prediction_type == "epsilon"


def test_sizes_of_the_base_model(tmp_path):
    save_tiny_base(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"num_frames": 3, "fps": 5}))
    pipe = MCMPipeline.from_pretrained(tmp_path)
    names = ("num_frames", "height", "width", "fps", "num_inference_steps")
    assert [pipe.sampling_default(name) for name in names] == [3, SIZE, SIZE, 5, 4]


# --- saving ----------------------------------------------------------------------------------------------------------
def test_saving_writes_the_clean_base_and_the_adapter(world, pipe, tmp_path, video):
    pipe.save_pretrained(tmp_path)
    saved, base = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tmp_path, world / "base"))
    assert saved.keys() == base.keys() and all(torch.equal(saved[key], base[key]) for key in base)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ModelScopeMCMPipeline"
    assert index["unet"] == ["diffusers", "UNet3DConditionModel"]
    assert index["scheduler"] == ["diffusers_mcm.scheduler", "MCMScheduler"]
    assert torch.equal(sample(pipe), video)  # the pipeline itself has not changed
    for text in (path.read_text() for path in tmp_path.rglob("*.json")):
        assert str(world) not in text and str(tmp_path) not in text


def test_reloading_is_bit_identical(pipe, tmp_path, video):
    pipe.save_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(again), video)
    assert again.config.num_inference_steps == 2 and again.get_active_adapters() == ["mcm"]
    assert torch.equal(sample(ModelScopeMCMPipeline.from_pretrained(tmp_path)), video)
    # The adapter in it is a LoRA folder like any other.
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "mcm_adapters" / "mcm")), video)


def test_reloading_fused_is_bit_identical(world, pipe, tmp_path, video):
    pipe.set_adapters("mcm", 0.7)
    pipe.fuse_lora(lora_scale=0.9)
    fused = sample(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sample(pipe), fused)
    saved, base = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tmp_path, world / "base"))
    assert all(torch.equal(saved[key], base[key]) for key in base)
    again = MCMPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(again), fused)
    again.unfuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(sample(again), sample(pipe))
    pipe.set_adapters("mcm")
    assert torch.equal(sample(pipe), video)


def test_reloading_in_half_precision_is_bit_identical(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "lora", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(sample(again), sample(pipe))


def test_saved_state_of_several_adapters(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "lora")
    other = save_tiny_lora(tmp_path / "other", base=world / "base", seed=1, rank=2)
    pipe.load_lora_weights(other, "style")
    pipe.set_adapters(["mcm", "style"], [0.9, 0.35])
    expected = sample(pipe)
    pipe.disable_lora()
    off = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(sample(again), off)
    again.enable_lora()
    assert torch.equal(sample(again), expected)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")  # over the old one: no adapter is left behind
    assert MCMPipeline.from_pretrained(tmp_path / "saved").get_list_adapters() == {}


def test_a_saved_base_opens_in_stock_diffusers(pipe, tmp_path, world):
    pipe.save_pretrained(tmp_path)
    unet = UNet3DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert not lora_layers(unet)
    components = {name: part for name, part in pipe.components.items() if name != "unet"}
    assert isinstance(ModelScopeMCMPipeline(**components, unet=unet), DiffusionPipeline)


# --- the Hub ---------------------------------------------------------------------------------------------------------
def test_from_the_hub(world, tmp_path, video, monkeypatch):
    """A LoRA in a subfolder, whose base model is on the Hub too; then all of it again from the cache, offline."""
    shutil.copytree(world / "base", tmp_path / "owner" / "base")
    save_tiny_lora(tmp_path / "owner" / "lora" / "webvid", base="owner/base")
    options = dict(cache_dir=tmp_path / "cache")
    with hub_server(tmp_path) as server:
        pipe = MCMPipeline.from_pretrained("owner/lora", subfolder="webvid", token="secret", **options)
        assert torch.equal(sample(pipe), video)
        assert "Bearer secret" in server.tokens
        with pytest.raises(ValueError, match="owner/lora holds neither a pipeline .* nor a LoRA"):
            MCMPipeline.from_pretrained("owner/lora", **options)
        with pytest.raises(OSError, match="owner/missing"):
            MCMPipeline.from_pretrained("owner/missing", **options)
    offline = MCMPipeline.from_pretrained("owner/lora", subfolder="webvid", local_files_only=True, **options)
    assert torch.equal(sample(offline), video)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Location.of("owner/lora", subfolder="webvid", **options).file("model_index.json") is None
    with pytest.raises(OSError, match="never-asked-for.json of owner/lora is not in the cache"):
        Location.of("owner/lora", **options).file("never-asked-for.json")


# --- what cannot be loaded -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "part, weight", [("text_encoder", "k_proj"), ("unet", "conv_out"), ("vae", "decoder.conv_in")]
)
def test_weights_that_a_base_model_lacks_are_not_made_up(world, tmp_path, part, weight):
    shutil.copytree(world / "base", tmp_path / "base")
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(file).items() if weight not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} of .*base does not hold all weights of a \w+: .*{weight}.* random"):
        MCMPipeline.from_pretrained(world / "lora", base_model=tmp_path / "base")


def test_neither_a_pipeline_nor_a_lora(tmp_path):
    with pytest.raises(ValueError, match="holds neither a pipeline .model_index.json. nor a LoRA"):
        MCMPipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a file or folder here, not a packaged model"):
        MCMPipeline.from_pretrained("no-such-model")


def test_a_pipeline_that_is_not_text_to_video(tmp_path):
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="CogVideoXPipeline.*Supported: modelscope"):
        MCMPipeline.from_pretrained(tmp_path)


def test_a_lora_for_an_unknown_base_model(world, tmp_path):
    shutil.copytree(world / "lora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / CONFIG_NAME).read_text())
    (tmp_path / "lora" / CONFIG_NAME).write_text(json.dumps(config | {"base_model": "sora"}))
    with pytest.raises(ValueError, match="Unknown base model 'sora'. Known base models"):
        MCMPipeline.from_pretrained(tmp_path / "lora")


def test_a_lora_whose_base_model_has_other_sizes(world, tmp_path):
    save_tiny_base(tmp_path, unet=tiny_unet(block_out_channels=(8, 32)))
    with pytest.raises(ValueError, match="made for another base model"):
        MCMPipeline.from_pretrained(world / "lora", base_model=tmp_path)


def test_a_lora_on_a_lora(world):
    with pytest.raises(ValueError, match="is itself a LoRA"):
        MCMPipeline.from_pretrained(world / "lora", lora=world / "lora")


def test_a_base_model_that_is_none(world):
    with pytest.raises(ValueError, match="is not a text-to-video model: it has no model_index.json"):
        MCMPipeline.from_pretrained(world / "lora", base_model=world / "lora")
