"""Every layout is read back by the library it is for, and computes the same."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMPipeline, MCMScheduler
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.formats import convert
from diffusers_mcm.lora import (
    CONFIG_NAME,
    LoRA,
    load_lora_into,
    lora_state_dict,
    read_lora,
    write_lora_weights,
)
from diffusers_mcm.settings import Settings
from tests.formats.world import (
    ADAPTER,
    MODELSCOPE,
    STABLE_DIFFUSION,
    call,
    edit_json,
    released_unet,
    sample,
    save_released,
    stable_diffusion,
    tiny_motion_adapter,
    tiny_motion_unet,
)
from tests.tiny import EXACT, FEW_MODULES, NUM_FRAMES, SCHEDULER, save_lora, save_tiny_lora

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """PEFT adapters whose scale is not one: alpha 6 at rank 4."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_released(folder / name, name, alpha=6) for name in ("modelscope", "animatediff")}


@pytest.fixture(scope="module")
def places(hub_root):
    """The arguments that say where the base model is."""
    animatediff = dict(base_model=hub_root / STABLE_DIFFUSION, motion_adapter=hub_root / ADAPTER)
    return {"modelscope": dict(base_model=hub_root / MODELSCOPE), "animatediff": animatediff}


both = pytest.mark.parametrize("base_model", ["modelscope", "animatediff"])


def assert_same_tensors(first: Path, second: Path, prefixes=("", "")):
    first, second = load_file(first), load_file(second)
    first = {key.removeprefix(prefixes[0]): tensor for key, tensor in first.items()}
    second = {key.removeprefix(prefixes[1]): tensor for key, tensor in second.items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


# --- PEFT and diffusers ----------------------------------------------------------------------------------------------
@both
def test_peft_to_diffusers_and_back_is_exact(adapters, places, tmp_path, base_model):
    original = adapters[base_model]
    there = convert(original, tmp_path / "diffusers", "diffusers")
    back = convert(there, tmp_path / "peft", "peft")
    assert_same_tensors(original / PEFT_WEIGHTS, there / WEIGHTS, ("base_model.model.", "unet."))
    assert_same_tensors(original / PEFT_WEIGHTS, back / PEFT_WEIGHTS)
    assert (back / PEFT_CONFIG).read_bytes() == (original / PEFT_CONFIG).read_bytes()
    again = convert(back, tmp_path / "again", "diffusers")
    assert {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in there.iterdir() if p.is_file()
    }
    expected = sample(MCMPipeline.from_pretrained(original, **places[base_model]))
    for folder in (there, back):
        assert torch.equal(sample(MCMPipeline.from_pretrained(folder, **places[base_model])), expected)


def test_settings_of_ours_survive_both_ways(hub_root, tmp_path):
    scheduler = MCMScheduler(**SCHEDULER, timestep_scaling=7.0)
    original = save_tiny_lora(tmp_path / "original", base=hub_root / MODELSCOPE, scheduler=scheduler)
    (original / "motion_head.safetensors").write_bytes(b"a head")
    config = json.loads((original / CONFIG_NAME).read_text())
    peft = convert(original, tmp_path / "deep/down/peft", "peft")
    back = convert(peft, tmp_path / "back", "diffusers")
    assert (back / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
    for folder in (peft, back):
        recorded = json.loads((folder / CONFIG_NAME).read_text())
        assert recorded | {"base_model_repository": None} == config | {"base_model_repository": None}
        assert (folder / recorded["base_model_repository"]).samefile(hub_root / MODELSCOPE)
        name = "scheduler/scheduler_config.json"
        assert (folder / name).read_bytes() == (original / name).read_bytes()
        assert (folder / "motion_head.safetensors").read_bytes() == b"a head"
    assert json.loads((peft / PEFT_CONFIG).read_text())["base_model_name_or_path"] is None


@both
def test_one_file_is_enough(adapters, places, tmp_path, base_model):
    """Scale, settings and scheduler are in the header."""
    scheduler = MCMScheduler(beta_schedule="linear", timestep_scaling=7.0)
    unet = released_unet(base_model)
    load_lora_into(unet, read_lora(adapters[base_model]))
    sampling = dict(num_inference_steps=3, num_frames=NUM_FRAMES)
    options = dict(repository="owner/base", sampling=sampling, scheduler=scheduler)
    folder = save_lora(tmp_path / "lora", unet, get_base_model(base_model), **options)
    for source in (folder, convert(folder, tmp_path / "peft", "peft") / PEFT_WEIGHTS):
        alone = convert(source, tmp_path / f"{source.name}-alone.safetensors", "diffusers")
        pipe = MCMPipeline.from_pretrained(alone, **places[base_model])
        assert (pipe.scheduler.config.timestep_scaling, pipe.config.num_inference_steps) == (7.0, 3)
        written = read_lora(alone)
        assert (written.alpha, written.ranks()) == (6, read_lora(folder).ranks())
        assert written.settings == read_lora(folder).settings
        assert_same_tensors(alone, folder / WEIGHTS)


@both
def test_peft_reads_what_we_write(tmp_path, base_model):
    """A LoRA that was never PEFT's, with a rank of its own for some modules."""
    unet = released_unet(base_model)
    names = (
        FEW_MODULES if base_model == "modelscope" else ["mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"]
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for rank, name in enumerate(names, start=2):
        shape = unet.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    lora = LoRA(tensors, alpha=5, alpha_pattern={names[0]: 7}, settings=Settings(base_model=base_model))
    write_lora_weights(tmp_path / "ours.safetensors", {"unet": lora})
    folder = convert(tmp_path / "ours.safetensors", tmp_path / "peft", "peft")
    theirs = PeftModel.from_pretrained(released_unet(base_model), str(folder)).eval()
    load_lora_into(unet, read_lora(tmp_path / "ours.safetensors"))
    torch.testing.assert_close(call(unet), call(theirs), **EXACT)


# --- stock diffusers -------------------------------------------------------------------------------------------------
def stock_pipeline(scheduler: Path | None = None, **components) -> AnimateDiffPipeline:
    """diffusers' own, with its own few-step scheduler, told what a few-step LoRA needs."""
    config = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, timestep_scaling=4.0)
    parts = stable_diffusion().components
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet")} | components
    parts.setdefault("motion_adapter", tiny_motion_adapter())
    scheduler = LCMScheduler.from_pretrained(scheduler) if scheduler else LCMScheduler(**config)
    return AnimateDiffPipeline(**parts, scheduler=scheduler)


def test_stock_animatediff_loads_it_fully_and_computes_the_same(adapters, places, tmp_path):
    folder = convert(adapters["animatediff"], tmp_path / "diffusers", "diffusers")
    stock = stock_pipeline(scheduler=folder / "scheduler")
    assert stock.scheduler.config.timestep_scaling == 4.0 and stock.scheduler.config.beta_schedule == "linear"
    stock.load_lora_weights(folder, adapter_name="mcm")
    landed, written = lora_state_dict(stock.unet, "mcm"), load_file(folder / WEIGHTS)
    assert {f"unet.{key}" for key in landed} == written.keys()
    assert all(torch.equal(tensor, written[f"unet.{key}"]) for key, tensor in landed.items())
    stock.to(dtype=torch.float64)  # fusing in float32 would round the sums
    stock.fuse_lora()
    stock.unload_lora_weights()  # diffusers cannot call peft's layers, fused or not: `proj_in(input=…)`
    ours = MCMPipeline.from_pretrained(folder, **places["animatediff"])
    latents = sample(ours)
    torch.testing.assert_close(sample(stock), latents, **EXACT)
    ours.fuse_lora()
    torch.testing.assert_close(sample(ours), latents, **EXACT)


# --- kohya files and motion modules ----------------------------------------------------------------------------------
def fused_unet(adapter: Path):
    """The base with the LoRA fused in by our own pipeline code."""
    unet = tiny_motion_unet()
    load_lora_into(unet, read_lora(adapter))
    fused = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.get_base_layer().weight
            fused[f"{name}.weight"] = base + module.get_delta_weight("default")
    return fused


def test_kohya_file_is_the_spatial_half_to_stock_diffusers(adapters, tmp_path):
    file = convert(adapters["animatediff"], tmp_path / "spatial.safetensors", "kohya")
    lora = read_lora(adapters["animatediff"])
    spatial = [name for name in lora.modules if ".motion_modules." not in name]
    tensors = load_file(file)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"lora_unet_{name.replace('.', '_')}.{part}" for name in spatial for part in parts}
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")} == {6.0}
    pipe = stable_diffusion()
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after, expected = pipe.unet.state_dict(), fused_unet(adapters["animatediff"])
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {f"{name}.weight" for name in spatial}
    for key in changed:
        torch.testing.assert_close(after[key], expected[key])


def test_motion_module_loads_back_with_diffusers_own_converter(adapters, hub_root, tmp_path):
    options = dict(motion_adapter=hub_root / ADAPTER)
    file = convert(adapters["animatediff"], tmp_path / "motion.safetensors", "motion-module", **options)
    base, expected = tiny_motion_adapter().state_dict(), fused_unet(adapters["animatediff"])
    adapter = MotionAdapter.from_single_file(file, config=str(hub_root / ADAPTER)).state_dict()
    assert adapter.keys() == base.keys()
    fused = {key for key in base if key in expected}
    assert len(fused) == len([name for name in expected if ".motion_modules." in name]) > 0
    for key, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected.get(key, base[key]), msg=key)
        assert torch.equal(tensor, base[key]) == (key not in fused)


def test_a_motion_adapter_that_is_given_stands_in_for_one_that_has_gone(adapters, hub_root, tmp_path):
    folder = convert(adapters["animatediff"], tmp_path / "lora", "diffusers")
    edit_json(folder / "mcm_config.json", extra_repositories={"motion_adapter": "../gone"})
    with pytest.raises(FileNotFoundError, match=r"'../gone', but .* Say where it is with `motion_adapter=`"):
        convert(folder, tmp_path / "motion.safetensors", "motion-module")
    convert(folder, tmp_path / "motion.safetensors", "motion-module", motion_adapter=hub_root / ADAPTER)
    assert load_file(tmp_path / "motion.safetensors")


def test_a_motion_adapter_beside_the_lora_is_found_from_wherever_the_module_is_written(adapters, hub_root, tmp_path):
    folder = convert(adapters["animatediff"], tmp_path / "lora", "diffusers")
    shutil.copytree(hub_root / ADAPTER, folder / "adapter")
    edit_json(folder / "mcm_config.json", extra_repositories={"motion_adapter": "./adapter"})
    convert(folder, tmp_path / "deep" / "down" / "motion.safetensors", "motion-module")
    with safe_open(tmp_path / "deep" / "down" / "motion.safetensors", framework="pt") as file:
        recorded = json.loads(file.metadata()["mcm_config"])
    assert recorded["extra_repositories"] == {"motion_adapter": "../../lora/adapter"}


def test_motion_module_has_animatediffs_own_keys(adapters, hub_root, tmp_path):
    options = dict(motion_adapter=hub_root / ADAPTER)
    file = convert(adapters["animatediff"], tmp_path / "motion.safetensors", "motion-module", **options)
    tensors = load_file(file)
    inside = "temporal_transformer.transformer_blocks.0"
    attention = [f"attention_blocks.{i}.{name}" for i in (0, 1) for name in (
        *("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias", "pos_encoder.pe"),
    )]  # fmt: skip
    norms = [f"{name}.{part}" for name in ("norms.0", "norms.1", "ff_norm") for part in ("weight", "bias")]
    ff = [f"ff.net.{name}.{part}" for name in ("0.proj", "2") for part in ("weight", "bias")]
    outer = [
        f"temporal_transformer.{name}.{part}"
        for name in ("norm", "proj_in", "proj_out")
        for part in ("weight", "bias")
    ]
    each = {*outer, *(f"{inside}.{name}" for name in (*attention, *norms, *ff))}
    places = [f"{way}_blocks.{block}.motion_modules.{i}" for way, count in (("down", 1), ("up", 2)) for block in (0, 1)
              for i in range(count)]  # fmt: skip
    assert tensors.keys() == {f"{place}.{key}" for place in (*places, "mid_block.motion_modules.0") for key in each}
    positions = tensors[f"mid_block.motion_modules.0.{inside}.attention_blocks.1.pos_encoder.pe"]
    assert positions.shape == (1, 32, 16)
    torch.testing.assert_close(positions[0, 3, :2], torch.tensor([math.sin(3), math.cos(3)]))


def test_kohya_file_and_motion_module_together_are_the_whole_lora(adapters, hub_root, places, tmp_path):
    options = dict(motion_adapter=hub_root / ADAPTER)
    spatial = convert(adapters["animatediff"], tmp_path / "spatial.safetensors", "kohya")
    motion = convert(adapters["animatediff"], tmp_path / "motion.safetensors", "motion-module", **options)
    pipe = stock_pipeline(motion_adapter=MotionAdapter.from_single_file(motion, config=str(hub_root / ADAPTER)))
    pipe.load_lora_weights(spatial)
    latents = sample(MCMPipeline.from_pretrained(adapters["animatediff"], **places["animatediff"]))
    # What the file holds are sums, rounded to float32.
    torch.testing.assert_close(sample(pipe), latents, rtol=1e-3, atol=1e-4 * float(latents.abs().max()))


def test_rank_stabilised_alphas(adapters, tmp_path):
    """alpha / √rank = 6 / 2 is alpha / rank of a file whose alpha is 12."""
    edit_json(_copy(adapters["animatediff"], tmp_path / "rs") / PEFT_CONFIG, use_rslora=True)
    file = convert(tmp_path / "rs", tmp_path / "spatial.safetensors", "kohya")
    assert {float(tensor) for key, tensor in load_file(file).items() if key.endswith("alpha")} == {12.0}


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# --- whole or not at all ---------------------------------------------------------------------------------------------
def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_destination_is_only_replaced_when_told(adapters, tmp_path):
    for name, to in (("folder", "peft"), ("file.safetensors", "diffusers")):
        destination = tmp_path / name
        convert(adapters["modelscope"], destination, to)
        with pytest.raises(FileExistsError, match=f"{name} exists already; choose another name, or overwrite it"):
            convert(adapters["animatediff"], destination, to)
        convert(adapters["animatediff"], destination, to, overwrite=True)
        assert read_lora(destination).settings.base_model == "animatediff"
    (tmp_path / "folder/notes.txt").write_text("mine")
    convert(adapters["animatediff"], tmp_path / "folder", "diffusers", overwrite=True)
    assert sorted(listing(tmp_path / "folder")) == sorted(
        ["notes.txt", CONFIG_NAME, WEIGHTS, "scheduler/scheduler_config.json"]
    )
    with pytest.raises(FileExistsError, match="folder.safetensors exists already and is a folder"):
        (tmp_path / "folder.safetensors").mkdir()
        convert(adapters["modelscope"], tmp_path / "folder.safetensors", "diffusers", overwrite=True)


def test_onto_itself(adapters, tmp_path):
    folder = _copy(adapters["modelscope"], tmp_path / "lora")
    convert(folder, folder, "diffusers", overwrite=True)
    assert sorted(listing(folder)) == ["README.md", CONFIG_NAME, WEIGHTS, "scheduler/scheduler_config.json"]
    assert_same_tensors(folder / WEIGHTS, adapters["modelscope"] / PEFT_WEIGHTS, ("unet.", "base_model.model."))


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_a_failure_leaves_what_was_there(adapters, tmp_path, monkeypatch, name):
    destination = tmp_path / "out" / name
    convert(adapters["modelscope"], destination, "diffusers")
    before = listing(tmp_path / "out")

    def full(path, *_):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("diffusers_mcm.formats.conversion.write_lora_weights", full)
    for target in (destination, destination.with_name(f"another-{name}")):
        with pytest.raises(OSError, match="no space left"):
            convert(adapters["animatediff"], target, "diffusers", overwrite=True)
    assert listing(tmp_path / "out") == before and len(os.listdir(tmp_path / "out")) == 1


def test_what_cannot_be_converted(adapters, hub_root, tmp_path):
    source = adapters["modelscope"]
    with pytest.raises(
        ValueError, match="Unknown layout 'onnx'; valid are peft, diffusers, comfyui, kohya, motion-module"
    ):
        convert(source, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="The layout 'kohya' is a file that ends in .safetensors, got '.*x'"):
        convert(source, tmp_path / "x", "kohya")
    with pytest.raises(ValueError, match="The layout 'peft' is a folder, got '.*x.safetensors'"):
        convert(source, tmp_path / "x.safetensors", "peft")
    with pytest.raises(
        ValueError, match="has .* spatial and 0 motion modules; this layout is for an AnimateDiff LoRA"
    ):
        convert(source, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(ValueError, match="is a LoRA for modelscope, which has no motion adapter"):
        convert(source, tmp_path / "x.safetensors", "motion-module")
    small = MotionAdapter(block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=4)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"does not fit the motion adapter .*small: it changes .*has there \(8, 8\)"):
        convert(
            adapters["animatediff"], tmp_path / "x.safetensors", "motion-module", motion_adapter=tmp_path / "small"
        )
    small.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(OSError, match="pickled has no safetensors weights .* pickled weights are not read"):
        convert(
            adapters["animatediff"], tmp_path / "x.safetensors", "motion-module", motion_adapter=tmp_path / "pickled"
        )
    with pytest.raises(FileNotFoundError, match="No LoRA in .*There are LoRAs in its subfolders: animatediff-laion"):
        convert(hub_root / "yhzhai/mcm", tmp_path / "x", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled", "small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("base_model.model.mid_block.attentions.0.proj_in.lora_B.weight"),
         "is incomplete: 1 of its .* modules have only one of lora_A and lora_B, such as 'mid_block.attentions"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_magnitude_vector": torch.zeros(2)}), "is a DoRA"),
        (lambda tensors: tensors.update({"lora_unet_x.alpha": torch.zeros(2)}), "keys are not lora_A/lora_B weights"),
    ],
)  # fmt: skip
def test_damaged_loras_are_not_converted(adapters, tmp_path, change, message):
    folder = _copy(adapters["animatediff"], tmp_path / "lora")
    tensors = load_file(folder / PEFT_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / PEFT_WEIGHTS)
    for to, name in (("diffusers", "x"), ("kohya", "x.safetensors")):
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / name, to)
        assert not (tmp_path / name).exists()
