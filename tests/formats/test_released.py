"""The seven LoRAs of the paper's authors, as peft wrote them, in one line."""

import hashlib
import json
import logging
import shutil

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.base_models import get_base_model, infer_base_model
from diffusers_mcm.lora import fresh_lora, load_lora_into, lora_layers, lora_state_dict, read_lora
from tests.formats.world import (
    ADAPTER,
    MODELSCOPE,
    RELEASED,
    STABLE_DIFFUSION,
    call,
    edit_json,
    peft_model,
    released_unet,
    sample,
)
from tests.hub_server import hub_server
from tests.tiny import EXACT

CLASSES = {"modelscope": ModelScopeMCMPipeline, "animatediff": AnimateDiffMCMPipeline}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXAMPLE = {"modelscope": "modelscopet2v-laion", "animatediff": "animatediff-laion"}


@pytest.fixture(scope="module")
def served(hub_root, tmp_path_factory):
    """`from_pretrained` while the Hub is up."""
    cache = tmp_path_factory.mktemp("cache")
    with hub_server(hub_root):
        yield lambda *args, **kwargs: MCMPipeline.from_pretrained(*args, cache_dir=cache, **kwargs)


@pytest.fixture
def adapter(request, hub_root, tmp_path):
    """A copy of a released LoRA that a test may change."""
    return shutil.copytree(hub_root / "yhzhai/mcm" / EXAMPLE[request.param], tmp_path / request.param)


both = pytest.mark.parametrize("base_model", CLASSES)
adapters_of_both = pytest.mark.parametrize("adapter", CLASSES, indirect=True)


@pytest.mark.parametrize("subfolder", RELEASED)
def test_one_line(served, hub_root, subfolder):
    pipe = served("yhzhai/mcm", subfolder=subfolder)
    base_model = RELEASED[subfolder]
    assert type(pipe) is CLASSES[base_model]
    landed = lora_state_dict(pipe.unet, "mcm")
    written = load_file(hub_root / "yhzhai/mcm" / subfolder / WEIGHTS)
    assert {f"base_model.model.{key}" for key in landed} == written.keys()
    assert all(torch.equal(tensor, written[f"base_model.model.{key}"]) for key, tensor in landed.items())
    config = pipe.scheduler.config
    assert type(pipe.scheduler) is MCMScheduler and config.timestep_scaling == 4.0
    betas = {"modelscope": "scaled_linear", "animatediff": "linear"}[base_model]
    assert (config.beta_schedule, config.beta_start, config.beta_end) == (betas, 0.00085, 0.012)
    assert (config.prediction_type, config.original_inference_steps) == ("epsilon", 50)
    assert pipe.sampling_default("num_inference_steps") == 4 and not pipe.do_classifier_free_guidance
    if subfolder == EXAMPLE[base_model]:
        assert sample(pipe, 1).isfinite().all()


@both
def test_the_network_computes_what_it_does_in_peft(hub_root, base_model):
    """Rank 4 and alpha 10, so that the scale is not one."""
    theirs = peft_model(base_model, alpha=10)
    lora = read_lora(hub_root / "yhzhai/mcm" / EXAMPLE[base_model])
    lora.tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in _peft_tensors(theirs).items()}
    lora.alpha = 10
    ours = released_unet(base_model)
    load_lora_into(ours, lora)
    assert {layer.scaling["default"] for layer in lora_layers(ours).values()} == {2.5}
    if base_model == "modelscope":  # peft's own wrapper cannot run AnimateDiff: `proj_in(input=…)`
        torch.testing.assert_close(call(ours), call(theirs), **EXACT)
    else:
        merged = theirs.double().merge_and_unload()
        torch.testing.assert_close(call(ours), call(merged), **EXACT)


def _peft_tensors(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@both
def test_full_size_layouts_land_whole(base_model):
    """All 964 / 1060 tensors of rank 64, on the full-size networks; nothing is allocated."""
    expected = {
        "modelscope": (482, 96_022_528, "b087f1860273652022b181bb8067ca67b61a2662b1c74e81f39f353c36a39559"),
        "animatediff": (530, 108_335_104, "ad08173a5734e059c1bdcbdb3dd4e6f77dda90fa440b54d37389e0b6f00a9edf"),
    }
    model, (modules, parameters, digest) = get_base_model(base_model), expected[base_model]
    with torch.device("meta"):
        unet = full_size_unet(base_model)
        lora = fresh_lora(unet, model.lora_target_modules(unet), rank=64, alpha=64)
    assert len(lora.modules) == modules and sum(tensor.numel() for tensor in lora.tensors.values()) == parameters
    layout = sorted((f"base_model.model.{key}", list(tensor.shape)) for key, tensor in lora.tensors.items())
    assert hashlib.sha256(json.dumps(layout).encode()).hexdigest() == digest
    assert infer_base_model(lora_modules=lora.modules) is model
    load_lora_into(unet, lora)
    landed = lora_state_dict(unet)
    assert {key: tensor.shape for key, tensor in landed.items()} == {k: t.shape for k, t in lora.tensors.items()}
    assert len(landed) == 2 * modules


def full_size_unet(base_model):
    if base_model == "modelscope":
        return UNet3DConditionModel(sample_size=32)
    # the configuration of Stable Diffusion 1.5; the rest are the class's defaults, those of the motion adapter
    return UNetMotionModel(sample_size=64, cross_attention_dim=768, num_attention_heads=8)


# --- where the base model is -----------------------------------------------------------------------------------------
@both
def test_from_a_folder_and_from_the_file(hub_root, base_model):
    places = {"modelscope": {}, "animatediff": {"motion_adapter": hub_root / ADAPTER}}[base_model]
    places["base_model"] = hub_root / {"modelscope": MODELSCOPE, "animatediff": STABLE_DIFFUSION}[base_model]
    folder = hub_root / "yhzhai/mcm"
    subfolder = EXAMPLE[base_model]
    expected = sample(MCMPipeline.from_pretrained(folder, subfolder=subfolder, **places))
    assert torch.equal(sample(MCMPipeline.from_pretrained(folder / subfolder / WEIGHTS, **places)), expected)
    with_lora = MCMPipeline.from_pretrained(places.pop("base_model"), lora=folder, subfolder=subfolder, **places)
    assert torch.equal(sample(with_lora), expected)


@pytest.mark.parametrize("adapter", ["modelscope"], indirect=True)
def test_pefts_configuration_may_name_the_base_model(served, hub_root, adapter, caplog):
    shutil.copytree(hub_root / MODELSCOPE, hub_root / "someone/fine-tune", dirs_exist_ok=True)
    edit_json(adapter / CONFIG, base_model_name_or_path="someone/fine-tune")
    assert served(adapter).config._name_or_path.find("fine-tune") > 0
    edit_json(adapter / CONFIG, base_model_name_or_path="/home/author/weights")
    with caplog.at_level(logging.WARNING):
        assert served(adapter).config._name_or_path.find("text-to-video-ms") > 0
    assert "names a base model that is not here, '/home/author/weights'; its default is used" in caplog.text


def test_without_a_subfolder_it_says_which_there_are(served, hub_root):
    names = ", ".join(sorted(RELEASED))
    for source in ("yhzhai/mcm", hub_root / "yhzhai/mcm"):
        with pytest.raises(ValueError, match=f"holds neither .* There are LoRAs in its subfolders: {names}; name one"):
            served(source)
    with pytest.raises(FileNotFoundError, match="No LoRA in .*There are LoRAs in its subfolders: animatediff-laion"):
        read_lora(hub_root / "yhzhai/mcm")


# --- full or not at all ----------------------------------------------------------------------------------------------
@both
def test_on_the_wrong_base_model(served, hub_root, base_model):
    other = "animatediff" if base_model == "modelscope" else "modelscope"
    pipe = served("yhzhai/mcm", subfolder=EXAMPLE[base_model])
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=f"was made for base model '{other}'; this is '{base_model}'"):
        pipe.load_mcm_lora(hub_root / "yhzhai/mcm", subfolder=EXAMPLE[other])
    assert not lora_layers(pipe.unet)


def damaged(change):
    """The tensors of a LoRA with one mistake in them."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


A_MODULE = "base_model.model.mid_block.attentions.0.proj_in"
DAMAGES = {
    "half a pair": (
        damaged(lambda tensors: tensors.pop(f"{A_MODULE}.lora_B.weight")),
        "mid_block.attentions.0.proj_in has only one of lora_A and lora_B",
    ),
    "one module too many": (
        damaged(lambda tensors: tensors.update({"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 8)})),
        "1 of its .* modules do not exist there, such as 'nowhere'",
    ),
    "another shape": (
        damaged(lambda tensors: tensors.update({f"{A_MODULE}.lora_A.weight": torch.zeros(4, 3)})),
        r"mid_block.attentions.0.proj_in has a weight of shape \(16, 16.*made for another base model",
    ),
    "magnitudes": (
        damaged(lambda tensors: tensors.update({f"{A_MODULE}.lora_magnitude_vector": torch.zeros(16)})),
        "is a DoRA; only plain LoRA is supported",
    ),
    "a DoRA": (lambda folder: edit_json(folder / CONFIG, use_dora=True), "is a DoRA; only plain LoRA is supported"),
    "no LoRA": (
        damaged(lambda tensors: tensors.update({"base_model.model.conv_in.weight": torch.zeros(1)})),
        "1 of its .* keys are not lora_A/lora_B weights, such as 'conv_in.weight'",
    ),
}


@adapters_of_both
def test_what_is_not_whole_is_not_loaded(served, adapter):
    pipe = served("yhzhai/mcm", subfolder=EXAMPLE[adapter.name])
    pipe.unload_lora_weights()
    before = sample(pipe, 1)
    whole = {name: (adapter / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    for damage, message in DAMAGES.values():
        damage(adapter)
        with pytest.raises(ValueError, match=message):
            pipe.load_mcm_lora(adapter)
        for name, content in whole.items():
            (adapter / name).write_bytes(content)
    assert not lora_layers(pipe.unet) and torch.equal(sample(pipe, 1), before)


@pytest.mark.parametrize("adapter", ["modelscope"], indirect=True)
def test_a_peft_file_without_its_configuration_warns_of_its_alpha(adapter, caplog):
    (adapter / CONFIG).unlink()
    with caplog.at_level(logging.WARNING):
        assert read_lora(adapter / WEIGHTS).alpha is None
    assert "no adapter_config.json beside" in caplog.text and "alpha is taken to be its rank" in caplog.text


# --- several, with weights -------------------------------------------------------------------------------------------
@both
def test_strength_is_the_same_on_both_bases_however_it_is_given(served, hub_root, base_model):
    """Against the definition: B times the strength."""
    pipe = served("yhzhai/mcm", subfolder=EXAMPLE[base_model])
    full = sample(pipe, 1)
    given = [sample(pipe, 1, lora_scale=0.3), sample(pipe, 1, cross_attention_kwargs={"scale": 0.3})]
    pipe.set_adapters("mcm", 0.3)
    given.append(sample(pipe, 1))
    pipe.fuse_lora()
    given.append(sample(pipe, 1))
    pipe.unfuse_lora()
    pipe.set_adapters("mcm", 1.0)
    assert torch.equal(sample(pipe, 1), full)
    pipe.unload_lora_weights()
    lora = read_lora(hub_root / "yhzhai/mcm" / EXAMPLE[base_model])
    lora.tensors = {key: tensor.double() * (0.3 if "lora_B" in key else 1) for key, tensor in lora.tensors.items()}
    pipe.load_mcm_lora(lora)
    expected = sample(pipe, 1)
    assert (expected - full).abs().max() > 0.1 * full.abs().max()
    for latents in given:
        torch.testing.assert_close(latents, expected, **EXACT)


@both
def test_two_adapters_with_weights(served, hub_root, base_model):
    """The second has twice the first's B, so that 0.4 of one and 0.3 of the other are the whole of the first."""
    first, second = (
        f"{base_model}{'t2v' if base_model == 'modelscope' else ''}-{name}" for name in ("webvid", "laion")
    )
    pipe = served("yhzhai/mcm", subfolder=first)
    expected = sample(pipe, 1)
    pipe.load_lora_weights(hub_root / "yhzhai/mcm" / second, adapter_name="second")
    assert not torch.allclose(sample(pipe, 1), expected, rtol=1e-2)
    pipe.set_adapters(["mcm", "second"], [0.4, 0.3])
    torch.testing.assert_close(sample(pipe, 1), expected, **EXACT)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe, 1), expected, **EXACT)
    pipe.unfuse_lora()
    pipe.delete_adapters("second")
    pipe.set_adapters("mcm")
    assert torch.equal(sample(pipe, 1), expected)
