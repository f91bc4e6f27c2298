"""A transformer of Wan in one file: it is the base model, whatever its maker put before and beside its names."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm import MCMPipeline, WanMCMPipeline, WanTI2VMCMPipeline
from diffusers_mcm.lora.wan_names import original_wan_module
from diffusers_mcm.pipelines.wan_files import load_wan_transformer, wan_index, wan_repository
from tests.tiny import realign
from tests.tiny_wan import save_wan_base, tiny_wan_transformer
from tests.wan_loras import original_file, random_tensors, sample, write


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_wan_base(tmp_path_factory.mktemp("wan") / "base")


def original_state(transformer, prefix=""):
    """Its parameters under the names that Wan's authors gave them."""
    state = {}
    for name, tensor in transformer.state_dict().items():
        module, _, kind = name.rpartition(".")
        table = kind == "scale_shift_table"
        own = original_wan_module(name) if table else f"{original_wan_module(module)}.{kind}"
        state[prefix + own] = tensor.clone()
    return state


def student():
    return tiny_wan_transformer(seed=5)


def rcm(transformer):
    """As rCM has it: a matrix for the patches, and what its trainer counts."""
    state = original_state(transformer, "net.")
    state["net.patch_embedding.weight"] = state["net.patch_embedding.weight"].flatten(1)
    return state | {"net.accum_iteration": torch.tensor(7), "net.accum_train_in_hours": torch.tensor([1.5])}


FILES = {
    "plain": original_state,
    "diffusion_model.": lambda transformer: original_state(transformer, "model.diffusion_model."),
    "rCM": rcm,
    "bfloat16": lambda transformer: {name: each.bfloat16() for name, each in original_state(transformer).items()},
}


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("how", ["alone", "base_model"])
def test_a_file_is_the_base_model(base, tmp_path, layout, how):
    path = tmp_path / "rcm.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in FILES[layout](student()).items()}, path)
    whole = MCMPipeline.from_pretrained(base, transformer=student())
    if layout == "bfloat16":
        whole.transformer.load_state_dict({n: t.bfloat16().float() for n, t in student().state_dict().items()})
    if how == "alone":
        pipe = MCMPipeline.from_pretrained(path, config=base)
    else:
        lora = write(tmp_path / "lora.safetensors", original_file(random_tensors()))
        pipe = MCMPipeline.from_pretrained(lora, base_model=path, config=base)
        whole.load_mcm_lora(lora)
    assert type(pipe) is WanMCMPipeline and pipe.scheduler.config.shift == 5.0
    options = dict(generator=torch.Generator().manual_seed(0))
    realign(pipe)
    realign(whole)
    video = sample(pipe, **options)
    assert torch.equal(video, sample(whole, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(video, sample(MCMPipeline.from_pretrained(base)), atol=1e-2)


def test_half_types_leave_what_diffusers_leaves_in_float32(base, tmp_path):
    save_file(original_state(student()), tmp_path / "x.safetensors")
    pipe = MCMPipeline.from_pretrained(tmp_path / "x.safetensors", config=base, dtype=torch.bfloat16)
    student().save_pretrained(tmp_path / "folder")
    expected = type(student()).from_pretrained(tmp_path / "folder", dtype=torch.bfloat16).state_dict()
    found = pipe.transformer.state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(each.is_meta for each in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))


@pytest.mark.parametrize(
    ("width", "repository", "expand"),
    [
        (1536, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", False),
        (5120, "Wan-AI/Wan2.1-T2V-14B-Diffusers", False),
        (3072, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", True),
    ],
)
def test_the_rest_is_that_of_a_wan_of_its_size(tmp_path, width, repository, expand):
    path = tmp_path / "x.safetensors"
    save_file({"net.blocks.0.self_attn.q.weight": torch.zeros(width, width, dtype=torch.uint8)}, path)
    assert wan_repository(path) == repository and wan_index(path)["expand_timesteps"] is expand


def test_one_of_ti2v(tmp_path):
    base = save_wan_base(tmp_path / "base", "wan-ti2v")
    save_file(original_state(tiny_wan_transformer("wan-ti2v", seed=5)), tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"proj_out.bias has shape \(192,\), expected \(64,\). `config=` names another"
    ):
        MCMPipeline.from_pretrained(tmp_path / "x.safetensors", config=save_wan_base(tmp_path / "other"))
    transformer = load_wan_transformer(tmp_path / "x.safetensors", base, torch.float32)
    pipe = MCMPipeline.from_pretrained(base, transformer=transformer)
    assert type(pipe) is WanTI2VMCMPipeline and pipe.transformer is transformer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.ffn.2.bias": None}, "of 69 parameters it lacks 1, such as 'blocks.1.ffn.net.2.bias'"),
        ({"blocks.2.ffn.2.bias": torch.zeros(24)}, "it has 1 more, as 'blocks.2.ffn.net.2.bias'"),
        (
            {"blocks.0.gate.weight": torch.zeros(24, 24)},
            "1 of its 70 tensors are none of its, such as 'blocks.0.gate.w",
        ),
        ({"blocks.0.self_attn.q.weight_scale": torch.zeros(24)}, "such as 'blocks.0.self_attn.q.weight_scale'.*quant"),
        ({"patch_embedding.weight": torch.zeros(24, 7)}, r"patch_embedding.weight has shape \(24, 7\), expected"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(base, tmp_path, change, message):
    state = {name: each for name, each in (original_state(student()) | change).items() if each is not None}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        MCMPipeline.from_pretrained(tmp_path / "x.safetensors", config=base)


def test_a_configuration_that_has_none(tmp_path):
    save_file(original_state(student()), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="has no transformer/config.json, which the transformer in .* is made by"):
        MCMPipeline.from_pretrained(tmp_path / "x.safetensors", config=tmp_path)
