"""`WanA14BMCMPipeline` against diffusers' `WanPipeline` with two tiny random transformers, and LoRAs in pairs."""

import logging
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, WanA14BMCMPipeline, get_base_model, make_scheduler
from diffusers_mcm.formats import convert, describe
from diffusers_mcm.lora import WEIGHTS_NAME, add_lora
from tests.hub_server import hub_server
from tests.pipelines.hooks import record_calls
from tests.tiny import assert_close_in_parts_of_the_largest, randomise_lora, realign, save_lora
from tests.tiny_wan import BOUNDARY, SIZE, save_wan_base, tiny_wan_transformer, wan_components

A14B = get_base_model("wan-a14b")
ROUNDING = dict(rtol=0, atol=1e-6)  # of latents
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
FILES = {expert: f"{expert}_model.safetensors" for expert in EXPERTS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_wan_base(tmp_path_factory.mktemp("a14b") / "base", "wan-a14b")


def save_half(folder, base, expert, seed, alpha=2, **options):
    transformer = tiny_wan_transformer()
    add_lora(transformer, A14B.lora_target_modules(transformer), rank=2, alpha=alpha)
    randomise_lora(transformer, seed)
    options = dict(scheduler=MCMFlowScheduler(shift=3.0, boundary=BOUNDARY), boundary=BOUNDARY) | options
    sampling = dict(fps=5, num_frames=5, height=SIZE, width=SIZE)
    return save_lora(folder, transformer, A14B, repository=base, sampling=sampling, expert=expert, **options)


@pytest.fixture(scope="module")
def halves(base):
    """The folders that two trainings leave."""
    return tuple(save_half(base.parent / expert, base, expert, seed) for seed, expert in enumerate(EXPERTS))


@pytest.fixture
def bare(halves, tmp_path):
    """The weights of a pair and nothing else, called as those of Wan2.2-Lightning are."""
    for expert, half in zip(EXPERTS, halves):
        save_file(load_file(half / WEIGHTS_NAME), tmp_path / FILES[expert])
    return tmp_path


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    components = wan_components("wan-a14b") | dict(scheduler=MCMFlowScheduler(boundary=BOUNDARY))
    return quiet(WanA14BMCMPipeline(**components, boundary_ratio=BOUNDARY, height=SIZE, width=SIZE, num_frames=5))


def start(batch=1):
    return torch.randn(batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def sample(pipe, **options):
    options = dict(num_inference_steps=4, output_type="latent", height=SIZE, width=SIZE, num_frames=5) | options
    return quiet(pipe)("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


# --- as diffusers' own pipeline samples ------------------------------------------------------------------------------
def both(base, scheduler, steps, dtype=torch.float32, **guidance):
    """Ours and theirs with one scheduler; noise is added from the global generator, for theirs cannot be told one."""
    pipe = quiet(MCMPipeline.from_pretrained(base, dtype=dtype))
    assert type(pipe) is WanA14BMCMPipeline
    pipe.scheduler = scheduler or pipe.scheduler
    theirs = quiet(WanPipeline(**pipe.components, boundary_ratio=BOUNDARY))
    options = dict(prompt=["a red ring", "a square"], height=SIZE, width=SIZE, num_frames=5, latents=start(2))
    options |= dict(num_inference_steps=steps, output_type="latent") | (guidance or dict(guidance_scale=1.0))
    if guidance:
        options["negative_prompt"] = ["a still", "red"]
    torch.manual_seed(1)
    video = pipe(**options).frames
    torch.manual_seed(1)
    return video, theirs(**options).frames


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("stochastic", [True, False])
def test_our_scheduler_is_a_drop_in_for_diffusers_own_pipeline(base, steps, stochastic):
    """The step at the boundary is the second expert's in theirs, too."""
    scheduler = MCMFlowScheduler(boundary=BOUNDARY, stochastic=stochastic)
    torch.testing.assert_close(*both(base, scheduler, steps), **ROUNDING)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("scales", [(5.0, None), (4.0, 3.0), (4.0, 1.0)])
def test_diffusers_own_schedulers_and_guidance_sample_the_same(base, scheduler, scales):
    """The networks in float64, where nothing of the way to round is seen."""
    guidance = dict(guidance_scale=scales[0], guidance_scale_2=scales[1])
    latents, expected = both(base, scheduler, 6, dtype=torch.float64, **guidance)
    assert_close_in_parts_of_the_largest(latents.double(), expected.double())


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        (dict(num_inference_steps=1), 1, 0),
        (dict(num_inference_steps=2), 1, 1),
        (dict(num_inference_steps=4), 2, 2),
        (dict(num_inference_steps=8), 4, 4),
        (dict(num_inference_steps=None, timesteps=[1000, 900]), 2, 0),
        (dict(num_inference_steps=None, timesteps=[875, 400]), 0, 2),
        (dict(num_inference_steps=None, timesteps=[1000, 875.5, 874.5]), 2, 1),
    ],
)
def test_each_step_is_its_experts(pipe, options, first, second):
    order = record_calls(pipe, "transformer", "transformer_2")
    sample(pipe, **options)
    assert order == ["transformer"] * first + ["transformer_2"] * second


def test_where_the_second_expert_is_not_guided_it_is_asked_once_a_step(pipe):
    order = record_calls(pipe, "transformer", "transformer_2")
    guided = sample(pipe, guidance_scale=3.0, guidance_scale_2=1.0)
    assert order == ["transformer"] * 4 + ["transformer_2"] * 2
    assert not torch.equal(guided, sample(pipe, guidance_scale=3.0))
    assert torch.equal(sample(pipe, guidance_scale=3.0, guidance_scale_2=3.0), sample(pipe, guidance_scale=3.0))
    with pytest.raises(ValueError, match=r"`guidance_scale_2` \(3\) has no effect at a `guidance_scale` of 1, which"):
        sample(pipe, guidance_scale_2=3.0)
    with pytest.raises(ValueError, match="`guidance_scale_2` must be a finite number, got 'much'"):
        sample(pipe, guidance_scale=3.0, guidance_scale_2="much")


def test_a_callback_may_switch_guidance_off_for_both_and_sees_all_steps(pipe):
    order, seen = record_calls(pipe, "transformer", "transformer_2"), []

    def off(pipe, i, t, tensors):
        seen.append((i, round(float(t))))
        pipe._guidance_scale = 0.0 if i == 0 else pipe._guidance_scale
        return {}

    sample(pipe, guidance_scale=3.0, guidance_scale_2=4.0, callback_on_step_end=off)
    assert order == ["transformer"] * 3 + ["transformer_2"] * 2
    assert seen == list(enumerate([1000, 938, 875, 625]))


def test_half_precision_networks_are_given_float32_latents(base):
    pipe = MCMPipeline.from_pretrained(base, dtype=torch.bfloat16)
    video, exact = sample(pipe), sample(MCMPipeline.from_pretrained(base))
    assert pipe.transformer_2.dtype == video.dtype == torch.bfloat16
    assert 0 < (video.float() - exact).norm() / exact.norm() < 0.05


def test_hooks_run_in_the_order_of_the_offload(pipe):
    order = record_calls(pipe, "text_encoder", "transformer", "transformer_2", "vae")
    sample(pipe, output_type="pt")
    assert list(dict.fromkeys(order)) == pipe.model_cpu_offload_seq.split("->")


def test_sequential_offload_makes_the_same_video(pipe, halves):
    from accelerate import cpu_offload

    expected = sample(pipe)
    for name in ("text_encoder", "transformer", "transformer_2", "vae"):
        cpu_offload(getattr(pipe, name), "cpu")
    assert torch.equal(sample(pipe), expected)
    with pytest.raises(ValueError, match="weights are offloaded; load the LoRA before enabling the offload"):
        pipe.load_lora_weights(halves)


# --- one expert alone ------------------------------------------------------------------------------------------------
def test_one_expert_samples_its_own_steps_and_no_other(base, pipe):
    high = quiet(MCMPipeline.from_pretrained(base, transformer_2=None))
    low = quiet(MCMPipeline.from_pretrained(base, transformer=None))
    assert high.transformer_2 is None and low.transformer is None and low.denoiser is low.transformer_2
    for one, timesteps in ((high, [1000, 937.5]), (low, [875, 625])):
        given = dict(num_inference_steps=None, timesteps=timesteps)
        realign(one)
        assert torch.equal(sample(one, **given), sample(pipe, **given))
    with pytest.raises(
        ValueError, match=r"no low_noise expert \(`transformer_2` is None\), which some of the timesteps"
    ):
        sample(high)
    with pytest.raises(
        ValueError, match=r"no high_noise expert \(`transformer` is None\), which some .* change at 875"
    ):
        sample(low)
    components = wan_components("wan-a14b") | dict(transformer=None, transformer_2=None)
    with pytest.raises(ValueError, match="Expected `transformer`, `transformer_2` or both; got neither"):
        WanA14BMCMPipeline(**components, boundary_ratio=BOUNDARY)


@pytest.mark.parametrize("boundary", [None, 0.0, 1.0, 875, True, "0.9"])
def test_a_pipeline_without_a_boundary_is_refused(boundary):
    with pytest.raises(ValueError, match=f"Expected a `boundary_ratio` between 0 and 1, .* got {boundary!r}"):
        WanA14BMCMPipeline(**wan_components("wan-a14b"), boundary_ratio=boundary)


def test_a_scheduler_with_another_boundary_is_refused(pipe):
    pipe.scheduler = MCMFlowScheduler(boundary=0.9)
    with pytest.raises(ValueError, match="meet at a `boundary` of 0.9, the pipeline's at a `boundary_ratio` of 0.875"):
        sample(pipe)
    pipe.scheduler = MCMFlowScheduler()  # for LoRAs that are no students of a phase
    order = record_calls(pipe, "transformer", "transformer_2")
    sample(pipe)
    assert [round(t) for t in pipe.scheduler.timesteps.tolist()] == [1000, 938, 833, 625]
    assert order == ["transformer"] * 2 + ["transformer_2"] * 2


def test_the_sampler_of_the_base_model_changes_experts_where_they_meet(base, tmp_path):
    pipe = MCMPipeline.from_pretrained(base)
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.boundary) == (5.0, BOUNDARY)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert make_scheduler("mcm", pipe).config.boundary == BOUNDARY


# --- pairs of LoRAs --------------------------------------------------------------------------------------------------
def test_a_pair_is_loaded_saved_and_fused(base, halves, tmp_path):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    assert pipe.get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm"]}
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.boundary) == (3.0, BOUNDARY)
    assert [pipe.sampling_default(name) for name in ("fps", "num_frames")] == [5, 5]
    video = sample(pipe)
    for given in (halves[::-1], [str(half / WEIGHTS_NAME) for half in halves]):
        assert torch.equal(sample(MCMPipeline.from_pretrained(base, lora=given)), video)
    assert torch.equal(sample(MCMPipeline.from_pretrained(halves)), video)  # their settings name the base model
    pipe.save_pretrained(tmp_path / "saved")
    for name in EXPERTS.values():
        weights = load_file(tmp_path / "saved" / name / "diffusion_pytorch_model.safetensors")
        assert not any(".lora_" in key or ".base_layer." in key for key in weights)
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(sample(again), video) and again.scheduler.config.shift == 3.0
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), video, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path / "fused")
    assert MCMPipeline.from_pretrained(tmp_path / "fused").fused_loras == {"mcm"}
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), video)
    pipe.disable_lora()
    assert not torch.allclose(sample(pipe), video)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    stock = MCMPipeline.from_pretrained(base)
    stock.scheduler = pipe.scheduler
    assert torch.equal(sample(stock), sample(pipe)) and pipe.get_list_adapters() == {}


def test_the_pair_is_saved_in_two_files_as_the_field_names_them(base, halves, tmp_path):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    video = sample(pipe)
    shutil.copyfile(halves[0] / "mcm_config.json", tmp_path / "mcm_config.json")  # of an older save of something else
    pipe.save_mcm_lora(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES.values())
    for expert, half in zip(EXPERTS, halves):
        saved, trained = load_file(tmp_path / FILES[expert]), load_file(half / WEIGHTS_NAME)
        assert saved.keys() == trained.keys() and all(torch.equal(saved[key], trained[key]) for key in saved)
        with safe_open(tmp_path / FILES[expert], "pt") as file:
            assert f'"expert": "{expert}"' in file.metadata()["mcm_config"]
    for again in (
        MCMPipeline.from_pretrained(tmp_path),
        MCMPipeline.from_pretrained(base, lora=tmp_path),
        MCMPipeline.from_pretrained(tmp_path, weight_name=tuple(FILES.values())),
        MCMPipeline.from_pretrained(base, lora=tmp_path.parent, subfolder=tmp_path.name),
    ):
        assert torch.equal(sample(again), video) and again.scheduler.config.shift == 3.0


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_both_files_do_the_same_in_diffusers_own_pipeline(base, layout, tmp_path):
    """Of a rank with another alpha, as Wan2.2-Lightning's."""
    halves = [save_half(tmp_path / expert, base, expert, seed, alpha=0.25) for seed, expert in enumerate(EXPERTS)]
    pipe = quiet(MCMPipeline.from_pretrained(base, lora=halves))
    pipe.save_mcm_lora(tmp_path / "pair")
    convert(tmp_path / "pair", tmp_path / layout, layout)
    plain = quiet(MCMPipeline.from_pretrained(base))
    theirs = quiet(WanPipeline.from_pretrained(base))
    theirs.scheduler = pipe.scheduler
    theirs.load_lora_weights(tmp_path / layout, weight_name=FILES["high_noise"])
    theirs.load_lora_weights(tmp_path / layout, weight_name=FILES["low_noise"], load_into_transformer_2=True)
    options = dict(num_inference_steps=4, height=SIZE, width=SIZE, num_frames=5, output_type="latent", latents=start())
    torch.manual_seed(1)
    video = pipe("a red ring", **options).frames
    torch.manual_seed(1)
    torch.testing.assert_close(video, theirs("a red ring", guidance_scale=1.0, **options).frames, **ROUNDING)
    plain.scheduler = pipe.scheduler
    torch.manual_seed(1)
    assert not torch.allclose(video, plain("a red ring", **options).frames, rtol=0, atol=1e-3)


def test_each_expert_has_a_weight_of_its_own(base, halves):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    whole = sample(pipe)
    pipe.set_adapters("mcm", {"transformer": 1.0, "transformer_2": 0.8})
    weighed = sample(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), weighed, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    first = dict(num_inference_steps=None, timesteps=[1000, 900])
    second = dict(num_inference_steps=None, timesteps=[875, 400])
    partly = [sample(pipe, **given) for given in (first, second)]
    pipe.set_adapters("mcm")
    whole_parts = [sample(pipe, **given) for given in (first, second)]
    assert torch.equal(partly[0], whole_parts[0]) and not torch.allclose(partly[1], whole_parts[1])
    assert not torch.allclose(weighed, whole)
    pipe.set_adapters(["mcm"], [{"transformer": 0.0}])
    assert not torch.allclose(sample(pipe, **first), whole_parts[0])
    assert torch.equal(sample(pipe, **second), whole_parts[1])
    with pytest.raises(ValueError, match="a number, or one for each of transformer, transformer_2, text_encoder; got"):
        pipe.set_adapters("mcm", {"unet": 1.0})


def test_an_expert_with_a_fused_lora_is_not_taken_without_the_other(base, halves):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    pipe.fuse_lora()
    for missing in ("transformer", "transformer_2"):
        with pytest.raises(ValueError, match="A LoRA is fused into the weights of this WanTransformer3DModel by"):
            WanA14BMCMPipeline(**pipe.components | {missing: None}, boundary_ratio=BOUNDARY)
    both = WanA14BMCMPipeline(**pipe.components, boundary_ratio=BOUNDARY)
    assert both.fused_loras == {"mcm"}


def test_a_pair_beside_another_and_one_of_them_taken_out(base, halves):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    video = sample(pipe)
    pipe.load_lora_weights(halves, "other")
    assert pipe.get_active_adapters() == ["mcm", "other"] and not torch.allclose(sample(pipe), video)
    pipe.delete_adapters("other")
    assert torch.equal(sample(pipe), video)
    pipe.load_lora_weights(halves[1], "low", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm", "low"]}
    pipe.delete_adapters("mcm")
    assert pipe.get_list_adapters() == {"transformer_2": ["low"]}


def test_pairs_of_other_makers_are_known_by_their_names(base, bare, halves):
    pipe = MCMPipeline.from_pretrained(base)
    pipe.load_lora_weights(bare)
    expected = MCMPipeline.from_pretrained(base)
    expected.load_lora_weights(halves)
    video = sample(expected)
    assert torch.equal(sample(pipe), video)
    for high, low in (("x_high_noise_lora_rank64", "x_low_noise_lora_rank64"), ("T2V_HIGH_fp16", "T2V_LOW_fp16")):
        for expert, name in zip(EXPERTS, (high, low)):
            shutil.copyfile(bare / FILES[expert], (bare / name).with_suffix(".safetensors"))
        pipe.unload_lora_weights()
        pipe.load_lora_weights((bare / f"{low}.safetensors", bare / f"{high}.safetensors"))  # in whatever order
        assert torch.equal(sample(pipe), video)
    tensors = [load_file(bare / name) for name in FILES.values()]
    for nameless in (tensors, tuple(tensors)):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(nameless)  # high noise first
        assert torch.equal(sample(pipe), video)
    for name in FILES.values():
        (bare / name).unlink()
    with pytest.raises(
        ValueError, match="several files for the high_noise expert in .*: T2V_HIGH.*, x_high_noise.*the t"
    ):
        pipe.load_lora_weights(bare)


def test_a_pair_that_says_nothing_is_sampled_as_it_is_alone_after_another_too(base, bare, halves):
    pipe = MCMPipeline.from_pretrained(base, lora=halves)
    assert (pipe.scheduler.config.shift, pipe.sampling_default("num_frames")) == (3.0, 5)
    pipe.load_mcm_lora(bare, "bare")
    alone = MCMPipeline.from_pretrained(base, lora=bare)
    for each in (pipe, alone):
        config = each.scheduler.config
        assert (config.shift, config.boundary, each.sampling_default("num_frames")) == (5.0, BOUNDARY, 81)
    assert torch.equal(sample(pipe), sample(alone))


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_a_pair_that_says_nothing_is_sampled_the_same_when_it_has_been_converted(base, bare, layout, tmp_path):
    settings = describe(bare)["high_noise"]["settings"]
    assert (settings["boundary"], settings["shift"]) == (BOUNDARY, 5.0)
    made = convert(bare, tmp_path / "made", layout)
    assert torch.equal(*(sample(MCMPipeline.from_pretrained(base, lora=pair)) for pair in (bare, made)))


def test_a_pair_in_a_repository(base, halves, tmp_path):
    """In one subfolder, as Wan2.2-Lightning has it; then from the cache, with no Hub to ask."""
    MCMPipeline.from_pretrained(base, lora=halves).save_mcm_lora(tmp_path / "owner" / "pair" / "four-steps")
    video = sample(MCMPipeline.from_pretrained(base, lora=halves))
    given = dict(lora="owner/pair", subfolder="four-steps", cache_dir=tmp_path / "cache")
    with hub_server(tmp_path):
        assert torch.equal(sample(MCMPipeline.from_pretrained(base, **given)), video)
        pipe = MCMPipeline.from_pretrained(base)
        options = dict(subfolder="four-steps", weight_name=tuple(FILES.values()), cache_dir=tmp_path / "cache")
        pipe.load_lora_weights(("owner/pair", "owner/pair"), **options)
        pipe.scheduler = MCMFlowScheduler(shift=3.0, boundary=BOUNDARY)
        assert torch.equal(sample(pipe), video)
    assert torch.equal(sample(MCMPipeline.from_pretrained(base, local_files_only=True, **given)), video)


def test_what_a_half_says_of_itself(halves):
    about = describe(halves[1])
    assert (about["base_model"], about["settings"]["boundary"]) == ("wan-a14b", BOUNDARY)


def test_settings_in_a_file_count_more_than_those_beside_it(base, halves, tmp_path):
    """A training's own folder, into which the other half was put."""
    MCMPipeline.from_pretrained(base, lora=halves).save_mcm_lora(tmp_path)
    shutil.copyfile(halves[1] / "mcm_config.json", tmp_path / "mcm_config.json")
    video = sample(MCMPipeline.from_pretrained(base, lora=halves))
    assert torch.equal(sample(MCMPipeline.from_pretrained(base, lora=tmp_path)), video)


# --- half a pair -----------------------------------------------------------------------------------------------------
def test_half_a_pair_is_an_error_that_says_what_is_missing(base, halves, bare):
    alone = (
        r"is for the high_noise expert, and there is no LoRA for the other one. Give both: a folder with high_noise_m"
    )
    for load in (
        lambda: MCMPipeline.from_pretrained(base, lora=halves[0]),
        lambda: MCMPipeline.from_pretrained(halves[0]),
        lambda: MCMPipeline.from_pretrained(base).load_lora_weights(halves[0]),
    ):
        with pytest.raises(ValueError, match=alone):
            load()
    pipe = MCMPipeline.from_pretrained(base)
    (bare / FILES["low_noise"]).unlink()
    with pytest.raises(ValueError, match=alone):
        pipe.load_lora_weights(bare)
    (bare / FILES["high_noise"]).rename(bare / "mine.safetensors")
    with pytest.raises(
        ValueError, match="mine.safetensors does not say which of the two experts it is for, and there"
    ):
        pipe.load_lora_weights(bare)
    assert pipe.get_list_adapters() == {}
    with pytest.raises(
        ValueError, match="Both LoRAs are for the high_noise expert, .*: a pair is one for each of high"
    ):
        pipe.load_lora_weights((halves[0], halves[0]))
    with pytest.raises(ValueError, match=r"one LoRA for each of two experts, \(high, low\); got \["):
        pipe.load_lora_weights([halves[0]])
    with pytest.raises(ValueError, match="`load_into_transformer_2` is for a LoRA of one expert; got a pair for both"):
        pipe.load_lora_weights(halves, load_into_transformer_2=True)
    with pytest.raises(
        ValueError, match="is for the high_noise expert; `load_into_transformer_2=True` means the other"
    ):
        pipe.load_lora_weights(halves[0], load_into_transformer_2=True)


def test_keys_of_the_second_transformer_are_the_low_noise_half(base, halves, tmp_path):
    """Both LoRAs in one file, or the second in a file of its own."""
    high, low = (load_file(half / WEIGHTS_NAME) for half in halves)
    second = {key.replace("transformer.", "transformer_2."): tensor for key, tensor in low.items()}
    save_file(second, tmp_path / "second.safetensors")
    save_file(high | second, tmp_path / "both.safetensors")
    expected = MCMPipeline.from_pretrained(base)
    expected.load_lora_weights(halves)
    video = sample(expected)
    for given in (
        tmp_path / "both.safetensors",
        high | second,
        (halves[0], tmp_path / "second.safetensors"),
        (tmp_path / "second.safetensors", high),
        (second, high),
    ):
        pipe = MCMPipeline.from_pretrained(base)
        pipe.load_lora_weights(given)
        assert torch.equal(sample(pipe), video)
    pipe = MCMPipeline.from_pretrained(base)
    pipe.load_mcm_lora(tmp_path / "both.safetensors")
    for each in (pipe, MCMPipeline.from_pretrained(base, lora=tmp_path / "both.safetensors")):
        assert each.get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm"]}
        assert torch.equal(sample(each), video)
    assert describe(tmp_path / "second.safetensors")["expert"] == "low_noise"
    assert describe(tmp_path / "second.safetensors")["base_model"] == "wan-a14b"
    pipe = MCMPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match="second.safetensors is for the low_noise expert, and there is no LoRA for"):
        pipe.load_lora_weights(tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="is for the low_noise expert; `load_into_transformer_2=False` means the ot"):
        pipe.load_lora_weights(tmp_path / "second.safetensors", load_into_transformer_2=False)
    with pytest.raises(ValueError, match="both.safetensors holds both LoRAs of a pair; it goes with no other"):
        pipe.load_lora_weights((tmp_path / "both.safetensors", halves[0]))
    pipe.load_lora_weights(tmp_path / "second.safetensors", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer_2": ["default"]}


def test_half_a_pair_can_be_asked_for(base, halves, bare, tmp_path):
    pipe = MCMPipeline.from_pretrained(base)
    pipe.load_lora_weights(halves[0], "first", load_into_transformer_2=False)
    (bare / FILES["low_noise"]).rename(bare / "mine.safetensors")
    pipe.load_lora_weights(bare / "mine.safetensors", "second", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["first"], "transformer_2": ["second"]}
    both = MCMPipeline.from_pretrained(base)
    both.load_lora_weights(halves)
    video = sample(both)
    assert torch.equal(sample(pipe), video)
    pipe.save_pretrained(tmp_path / "saved")
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    assert again.get_list_adapters() == pipe.get_list_adapters() and torch.equal(sample(again), video)
    pipe.save_mcm_lora(tmp_path / "half", "second")
    assert (tmp_path / "half" / WEIGHTS_NAME).is_file()
    with pytest.raises(ValueError, match="is for the low_noise expert, and there is no LoRA for the other one"):
        MCMPipeline.from_pretrained(base, lora=tmp_path / "half")


def test_students_of_different_phases_or_grids_are_no_pair(base, halves, tmp_path):
    elsewhere = save_half(tmp_path / "elsewhere", base, "low_noise", 1, boundary=0.9)
    with pytest.raises(
        ValueError, match="for experts that meet at a boundary of 0.9; those of this pipeline meet at 0.8"
    ):
        MCMPipeline.from_pretrained(base, lora=(halves[0], elsewhere))
    other = save_half(tmp_path / "other", base, "low_noise", 1, scheduler=MCMFlowScheduler(boundary=BOUNDARY))
    with pytest.raises(
        ValueError, match="sampled together, with the same shift; got 3.0 of .*high_noise.* and 5.0 of "
    ):
        MCMPipeline.from_pretrained(base, lora=(halves[0], other))


def test_a_pair_is_for_two_experts(halves, tmp_path):
    pipe = MCMPipeline.from_pretrained(save_wan_base(tmp_path / "wan"))
    with pytest.raises(ValueError, match="A wan has one denoiser, and takes one LoRA at a time; got 2 together"):
        pipe.load_lora_weights(halves)
    with pytest.raises(ValueError, match="was made for base model 'wan-a14b'; this is 'wan'"):
        pipe.load_lora_weights(halves[0])


def test_one_step_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        sample(pipe, num_inference_steps=1)
    assert "No step of 1 lies below the boundary 0.875" in caplog.text
