"""LoRAs for Stable Diffusion, as others write them, beside the MCM one."""

import pytest
import torch
from diffusers import AnimateDiffPipeline
from safetensors.torch import load_file, save_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler
from tests.pipelines.test_animatediff import PROMPT, random_lora
from tests.tiny import ANIMATEDIFF_SCHEDULER, EXACT, NUM_FRAMES, SIZE, tiny_animatediff_components

SPATIAL = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.1.attentions.0.proj_in",
]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]
ALPHA = 1.5


@pytest.fixture
def pipe():
    return make(AnimateDiffMCMPipeline)


def make(pipeline_class, **components):
    components = tiny_animatediff_components() | dict(scheduler=MCMScheduler(**ANIMATEDIFF_SCHEDULER)) | components
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    size = dict(num_frames=NUM_FRAMES, height=SIZE, width=SIZE, num_inference_steps=1, guidance_scale=1.0)
    options = size | dict(output_type="latent", generator=torch.Generator().manual_seed(0)) | options
    pipe.to(dtype=torch.float64)
    return pipe(prompt=PROMPT, **options).frames


@pytest.fixture(scope="module")
def parts():
    components = tiny_animatediff_components()
    return {
        "unet": random_lora(components["unet"], SPATIAL, seed=1).tensors,
        "text_encoder": random_lora(components["text_encoder"], TEXT, seed=2).tensors,
    }


def kohya(parts):
    tensors = {}
    for prefix, part in (("lora_unet", parts["unet"]), ("lora_te_text_model", parts["text_encoder"])):
        for key, tensor in part.items():
            module, _, half = key.partition(".lora_")
            name = f"{prefix}_{module.replace('.', '_')}"
            tensors[f"{name}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def older_diffusers(parts):
    tensors = {}
    for key, tensor in parts["unet"].items():
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        tensors[f"unet.{key}"] = tensor.double() * ALPHA / 2 if ".up." in key else tensor
    for key, tensor in parts["text_encoder"].items():
        key = key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")
        tensors[f"text_encoder.text_model.{key}"] = tensor.double() * ALPHA / 2 if ".up." in key else tensor
    return tensors


def write(folder, tensors, name="style.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def load_as_stock(parts, tmp_path):
    stock = make(AnimateDiffPipeline, motion_adapter=None)
    stock.load_lora_weights(write(tmp_path, kohya(parts)), adapter_name="style")
    return stock


# --- namings ---------------------------------------------------------------------------------------------------------
def test_a_kohya_lora_is_what_diffusers_makes_of_it(pipe, parts, tmp_path):
    plain = sample(pipe)
    stock = load_as_stock(parts, tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    torch.testing.assert_close(sample(pipe), sample(stock), **EXACT)
    assert not torch.allclose(sample(pipe), plain, rtol=1e-2)
    for weight in (0.4, {"unet": 0.3, "text_encoder": 0.8}):
        pipe.set_adapters("style", weight)
        stock.set_adapters("style", dict(weight) if isinstance(weight, dict) else weight)
        torch.testing.assert_close(sample(pipe), sample(stock), **EXACT)


@pytest.mark.parametrize("naming", [kohya, older_diffusers], ids=lambda f: f.__name__)
def test_every_naming_is_the_same_lora(pipe, parts, naming):
    pipe.load_lora_weights(kohya(parts), "a")
    expected = sample(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(naming(parts), "b")
    torch.testing.assert_close(sample(pipe), expected, **EXACT)


def one_trainer(parts):
    tensors = {}
    for prefix, part in (("lora_unet", parts["unet"]), ("clip_l.text_model", parts["text_encoder"])):
        for key, tensor in part.items():
            module, _, half = key.partition(".lora_")
            tensors[f"{prefix}.{module}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
            tensors[f"{prefix}.{module}.alpha"] = torch.tensor(ALPHA, dtype=torch.bfloat16)
    return tensors


def original_names(parts):
    """The UNet's modules as Stable Diffusion's first code called them, in kohya's form."""
    names = {"down_blocks_0_attentions_0": "input_blocks_1_1", "up_blocks_1_attentions_0": "output_blocks_2_1"}
    tensors = kohya(parts)
    for ours, theirs in names.items():
        tensors = {key.replace(ours, theirs): tensor for key, tensor in tensors.items()}
    assert not any("attentions" in key for key in tensors)
    return tensors


def mixed(parts):
    """Two namings in one file, and matrices as convolutions of one pixel."""
    module = SPATIAL[0].replace(".", "_")
    tensors = {key: tensor for key, tensor in kohya(parts).items() if module not in key}
    tensors |= {key: tensor for key, tensor in one_trainer(parts).items() if SPATIAL[0] in key}
    return {
        key: tensor[:, :, None, None] if tensor.ndim == 2 and "lora_unet" in key else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("naming", [one_trainer, original_names, mixed], ids=lambda f: f.__name__)
def test_the_layers_and_scales_of_every_naming(pipe, parts, naming):
    def found():
        return {name: (layer.scaling["a"], layer.lora_A["a"].weight.clone()) for name, layer in pipe._layers.items()}

    pipe.load_lora_weights(kohya(parts), "a")
    expected = found()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(naming(parts), "a")
    loaded = found()
    assert loaded.keys() == expected.keys()
    for name, (scale, weight) in loaded.items():
        assert scale == expected[name][0] and torch.equal(weight, expected[name][1])


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet."])
def test_a_file_whose_halves_alone_have_pefts_names(pipe, parts, tmp_path, prefix):
    tensors = {
        key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): t for key, t in kohya(parts).items()
    }
    tensors = {key.replace("lora_unet_", prefix): t for key, t in tensors.items() if not key.endswith(".alpha")}
    save_file(tensors, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", "file")
    pipe.load_lora_weights(tensors, "tensors")
    assert pipe.get_list_adapters() == {"unet": ["file", "tensors"], "text_encoder": ["file", "tensors"]}
    for layer in pipe._layers.values():
        assert torch.equal(layer.lora_A["file"].weight, layer.lora_A["tensors"].weight)
        assert layer.scaling["file"] == layer.scaling["tensors"]


def test_a_tensor_that_is_there_twice(pipe, parts):
    twice = f"unet.{SPATIAL[0]}.lora_A.weight"
    with pytest.raises(ValueError, match=rf"lora_A.weight of the unet twice, as 'lora_unet_.*' and as '{twice}'"):
        pipe.load_lora_weights(kohya(parts) | {twice: parts["unet"][f"{SPATIAL[0]}.lora_A.weight"]})


def test_adapters_of_other_kinds_are_named(pipe, parts):
    for key, message in {
        "bundle_emb.<style>.clip_l": "bundles textual inversions with the LoRA .<style>;.*load_textual_inversion",
        "lora_unet_mid_block_resnets_0_conv1.hada_w1_a": "It is a LoHa, and only plain LoRA is supported",
        "lora_unet_mid_block_resnets_0_conv1.lokr_w1": "It is a LoKr, and only plain LoRA is supported",
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": "It is a LoCon with a third matrix",
        "lora_unet_mid_block_resnets_0_conv1.diff": "It is a difference of whole weights",
    }.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(kohya(parts) | {key: torch.zeros(2, 2)})
    assert pipe.get_list_adapters() == {}


# --- the verbs reach the text encoder too ----------------------------------------------------------------------------
def test_scale_fuse_and_unload(pipe, parts):
    plain = sample(pipe)
    pipe.load_lora_weights(kohya(parts), "style")
    full = sample(pipe)
    pipe.set_adapters("style", 0.5)
    half = sample(pipe)
    pipe.set_adapters("style")
    torch.testing.assert_close(sample(pipe, lora_scale=0.5), half, **EXACT)
    assert torch.equal(sample(pipe, lora_scale=0.0), plain)
    pipe.fuse_lora(lora_scale=0.5)
    assert (pipe.fused_loras, pipe.num_fused_loras) == ({"style"}, 1)
    torch.testing.assert_close(sample(pipe), half, **EXACT)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), full)
    pipe.disable_lora()
    assert torch.equal(sample(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain) and pipe.get_list_adapters() == {}
    assert not any("lora" in name for name, _ in pipe.text_encoder.named_modules())


def test_beside_the_mcm_lora_each_with_its_weight(pipe, parts, tmp_path):
    targets = [name for name in pipe.base_model.lora_target_modules(pipe.unet) if "mid_block.motion" in name]
    mcm = random_lora(pipe.unet, [*targets, SPATIAL[0]])
    pipe.load_mcm_lora(mcm)
    alone = sample(pipe)
    pipe.load_lora_weights(kohya(parts), "style")
    assert pipe.get_active_adapters() == ["mcm", "style"]
    pipe.set_adapters(["mcm", "style"], [1.0, {"unet": 0.6, "text_encoder": 0.2}])
    both = sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(again), both, **EXACT)
    assert again.get_list_adapters() == {"unet": ["mcm", "style"], "text_encoder": ["style"]}
    assert not any("lora" in key for key in load_file(tmp_path / "text_encoder" / "model.safetensors"))
    with pytest.raises(ValueError, match="'style' lies on unet, text_encoder; an MCM LoRA lies on the denoiser alone"):
        pipe.save_mcm_lora(tmp_path / "lora", "style")
    # The saved style is a LoRA that diffusers reads.
    stock = make(AnimateDiffPipeline, motion_adapter=None)
    stock.load_lora_weights(tmp_path / "mcm_adapters" / "style", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(stock), sample(load_as_stock(parts, tmp_path)), **EXACT)
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe), alone) and pipe.get_list_adapters() == {"unet": ["mcm"]}


# --- what is refused -------------------------------------------------------------------------------------------------
def test_what_does_not_fit_wholly_changes_nothing(pipe, parts, tmp_path):
    plain, good = sample(pipe), kohya(parts)
    for strange in (
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_unet_nowhere.lora_up.weight",
    ):
        with pytest.raises(ValueError, match=rf"1 of its {len(good) + 1} keys are no part of a LoRA.*{strange}"):
            pipe.load_lora_weights(good | {strange: torch.zeros(2, 2)})
    for half in ("up", "down"):
        missing = dict(good)
        del missing[f"lora_te_text_model_encoder_layers_1_mlp_fc1.lora_{half}.weight"]
        with pytest.raises(ValueError, match=r"have only one of lora_A and lora_B, such as .*layers.1.mlp.fc1'"):
            pipe.load_lora_weights(missing)
    key = "lora_unet_up_blocks_1_attentions_0_proj_in"
    with pytest.raises(ValueError, match="DoRA"):
        pipe.load_lora_weights(good | {f"{key}.dora_scale": torch.ones(8)})
    path = tmp_path / "style.ckpt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a .safetensors file; pickled weights are not read"):
        pipe.load_lora_weights(path)
    assert pipe.get_list_adapters() == {} and torch.equal(sample(pipe), plain)
    spatial = {key: tensor for key, tensor in good.items() if key.startswith("lora_unet_")}
    pipe.load_lora_weights(spatial, "style")
    with pytest.raises(ValueError, match="An adapter named 'style' is loaded already"):
        pipe.load_lora_weights(good, "style")  # which has a part for the text encoder besides
    assert pipe.get_list_adapters() == {"unet": ["style"]}


def test_weights_of_adapters_that_make_no_sense(pipe, parts):
    pipe.load_lora_weights(kohya(parts), "style")
    for weight in ({"unet": {"mid": 0.5}}, {"vae": 0.5}):
        with pytest.raises(ValueError, match="a number, or one for each of unet, text_encoder; got"):
            pipe.set_adapters("style", weight)


def test_ranks_and_alphas_may_differ(pipe):
    unet = pipe.unet
    one, other = random_lora(unet, SPATIAL[:1], rank=2).tensors, random_lora(unet, SPATIAL[2:], rank=3).tensors
    pipe.load_lora_weights(kohya({"unet": one | other, "text_encoder": {}}), "style")
    scaling = {name: layer.scaling["style"] for name, layer in pipe._layers.items()}
    assert scaling == {f"unet.{SPATIAL[0]}": ALPHA / 2, f"unet.{SPATIAL[2]}": ALPHA / 3}
    pipe.unload_lora_weights()
    tensors = kohya({"unet": one | other, "text_encoder": {}})
    tensors[f"lora_unet_{SPATIAL[2].replace('.', '_')}.alpha"] = torch.tensor(6.0)
    pipe.load_lora_weights(tensors, "style")
    assert pipe._layers[f"unet.{SPATIAL[2]}"].scaling["style"] == 2.0
