"""MCM LoRAs in one pipeline after each other: each is sampled, saved and published as it came."""

import pytest
import torch

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, get_base_model, make_scheduler
from diffusers_mcm.lora import LoRA, add_lora, read_lora
from diffusers_mcm.settings import Settings
from tests.tiny import randomise_lora, save_lora
from tests.tiny_wan import SIZE, save_wan_base, tiny_wan_transformer

WAN = get_base_model("wan")
# shift and steps of each
STUDENTS = {"a": (8.0, 2), "b": (3.0, 3)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, and the LoRAs of two trainings."""
    folder = tmp_path_factory.mktemp("world")
    save_wan_base(folder / "base")
    for seed, (name, (shift, steps)) in enumerate(STUDENTS.items()):
        transformer = tiny_wan_transformer()
        add_lora(transformer, WAN.lora_target_modules(transformer), rank=2, alpha=2)
        randomise_lora(transformer, seed)
        sampling = dict(fps=5, num_frames=5, height=SIZE, width=SIZE, num_inference_steps=steps)
        options = dict(scheduler=MCMFlowScheduler(shift=shift), sampling=sampling)
        save_lora(folder / name, transformer, WAN, repository=folder / "base", **options)
    return folder


def bare(folder) -> LoRA:
    """A LoRA as PEFT writes it: without settings, without a scheduler."""
    lora = read_lora(folder)
    lora.settings, lora.scheduler_config = Settings(), None
    return lora


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    return quiet(pipe)(
        "a red ring", generator=torch.Generator().manual_seed(0), output_type="latent", **options
    ).frames


def sampled(pipe):
    """The shift and the steps that a call would have, and the frames."""
    defaults = (pipe.sampling_default(name) for name in ("num_inference_steps", "num_frames"))
    return pipe.scheduler.config.shift, *defaults


# --- one after another -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["beside", "after unloading", "saved in between", "in a pipeline made of the other"])
def test_a_lora_that_says_nothing_is_sampled_as_it_is_alone(world, tmp_path, way):
    pipe = MCMPipeline.from_pretrained(world / "a", adapter_name="a")
    if way == "after unloading":
        pipe.unload_lora_weights()
    if way == "saved in between":
        pipe.save_pretrained(tmp_path / "whole")
        pipe = MCMPipeline.from_pretrained(tmp_path / "whole")
        assert sampled(pipe) == (8.0, 2, 5)
    if way == "in a pipeline made of the other":
        pipe = type(pipe).from_pipe(pipe)
        assert sampled(pipe) == (8.0, 2, 5)
    pipe.load_mcm_lora(bare(world / "b"), "b")
    alone = MCMPipeline.from_pretrained(world / "base")
    alone.load_mcm_lora(bare(world / "b"))
    assert sampled(pipe) == sampled(alone) == (5.0, 4, 81)
    size = dict(num_frames=5, height=SIZE, width=SIZE)
    assert torch.equal(sample(pipe, **size), sample(alone, **size))
    pipe.load_mcm_lora(world / "b", "c")
    assert sampled(pipe) == (3.0, 3, 5)


def test_what_was_set_by_hand_between_two_loras_stays(world):
    """A scheduler of another class is replaced by one on its noise schedule, as for the first LoRA."""
    pipe = MCMPipeline.from_pretrained(world / "a")
    pipe.scheduler = MCMFlowScheduler(shift=6.0)
    pipe.register_to_config(num_inference_steps=7)
    pipe.load_mcm_lora(bare(world / "b"))
    assert sampled(pipe) == (6.0, 7, 81)
    pipe.load_mcm_lora(bare(world / "a"))
    assert sampled(pipe) == (6.0, 7, 81)


def test_what_the_caller_names_wins_over_the_lora(world, tmp_path):
    named = dict(num_inference_steps=6, height=64, scheduler=MCMFlowScheduler(shift=2.0))
    MCMPipeline.from_pretrained(world / "b").save_pretrained(tmp_path / "whole")
    for pipe in (
        MCMPipeline.from_pretrained(world / "a", **named),
        MCMPipeline.from_pretrained(world / "base", lora=world / "a", **named),
        MCMPipeline.from_pretrained(tmp_path / "whole", lora=world / "a", adapter_name="a", **named),
        MCMPipeline.from_pretrained(tmp_path / "whole", **named),
    ):
        assert sampled(pipe) == (2.0, 6, 5)
        assert (pipe.sampling_default("height"), pipe.sampling_default("width")) == (64, SIZE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_pipeline_is_given_another_lora_in_one_line(world, tmp_path, caplog, fused):
    """It acts alone; that which was saved is set aside, and comes back to the bit."""
    pipe = MCMPipeline.from_pretrained(world / "a")
    before = sample(pipe, num_inference_steps=1)
    if fused:
        pipe.fuse_lora()
    pipe.save_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(tmp_path, lora=world / "b")
    assert r"was saved with a LoRA (mcm), which does not act beside the one that is given" in caplog.text
    assert again._loaded == ["mcm", "mcm_1"] and again.get_active_adapters() == ["mcm_1"]
    assert again.num_fused_loras == 0 and sampled(again) == (3.0, 3, 5)
    assert torch.equal(sample(again), sample(MCMPipeline.from_pretrained(world / "b")))
    again.set_adapters("mcm")
    again.scheduler = pipe.scheduler
    assert torch.equal(sample(again, num_inference_steps=1), before)
    with pytest.raises(ValueError, match="An adapter named 'mcm' is loaded already; give another name"):
        MCMPipeline.from_pretrained(tmp_path, lora=world / "b", adapter_name="mcm")


def test_a_name_that_is_given_is_the_adapters(world, tmp_path):
    MCMPipeline.from_pretrained(world / "a").save_pretrained(tmp_path)
    again = MCMPipeline.from_pretrained(tmp_path, lora=world / "b", adapter_name="b")
    assert again._loaded == ["mcm", "b"] and again.get_active_adapters() == ["b"]
    assert MCMPipeline.from_pretrained(world / "a").get_active_adapters() == ["mcm"]


def test_a_lora_whose_scheduler_is_refused_is_out_again(world):
    pipe = MCMPipeline.from_pretrained(world / "a")
    before = sample(pipe)
    broken = read_lora(world / "b")
    broken.scheduler_config = {"shift": -1.0}
    with pytest.raises(ValueError, match="shift"):
        pipe.load_mcm_lora(broken, "b")
    assert pipe._loaded == pipe.get_active_adapters() == ["mcm"] and sampled(pipe) == (8.0, 2, 5)
    assert torch.equal(sample(pipe), before)


# --- saved and published ---------------------------------------------------------------------------------------------
def test_a_lora_is_saved_with_the_scheduler_it_came_with(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "a", adapter_name="a")
    alone = sample(pipe)
    pipe.load_mcm_lora(world / "b", "b")
    for name, expected in (("a", (8.0, 2, 5)), ("b", (3.0, 3, 5))):
        pipe.save_mcm_lora(tmp_path / name, name)
        assert sampled(MCMPipeline.from_pretrained(tmp_path / name)) == expected
    assert torch.equal(sample(MCMPipeline.from_pretrained(tmp_path / "a")), alone)
    pipe.delete_adapters("a")
    assert pipe._adapters.schedulers.keys() == {"b"}


def test_a_sampler_for_comparison_is_not_saved_with_a_lora(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "a")
    pipe.scheduler = make_scheduler("euler", pipe)
    pipe.save_mcm_lora(tmp_path)
    assert MCMPipeline.from_pretrained(tmp_path).scheduler.config.stochastic is True


def test_a_lora_without_a_scheduler_is_saved_with_that_it_was_sampled_with(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "base", num_frames=5)
    pipe.load_mcm_lora(bare(world / "a"), "bare")
    pipe.scheduler = MCMFlowScheduler(shift=6.0)  # as its makers say
    pipe.register_to_config(num_inference_steps=7)
    pipe.save_mcm_lora(tmp_path / "now", "bare")
    pipe.load_mcm_lora(world / "b", "b")
    pipe.save_mcm_lora(tmp_path / "later", "bare")
    for name in ("now", "later"):
        assert sampled(MCMPipeline.from_pretrained(tmp_path / name)) == (6.0, 7, 5)


def test_a_saved_pipeline_keeps_the_scheduler_of_each_lora(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "a", adapter_name="a")
    pipe.load_mcm_lora(world / "b", "b")
    pipe.save_pretrained(tmp_path / "whole")
    again = MCMPipeline.from_pretrained(tmp_path / "whole")
    assert sampled(again) == (3.0, 3, 5)
    again.save_mcm_lora(tmp_path / "a", "a")
    assert sampled(MCMPipeline.from_pretrained(tmp_path / "a")) == (8.0, 2, 5)


def test_the_clip_of_a_published_lora_is_made_with_the_scheduler_that_is_published(world, monkeypatch):
    """And with its steps; afterwards the pipeline goes on as before."""
    pipe = quiet(MCMPipeline.from_pretrained(world / "a", adapter_name="a"))
    pipe.load_mcm_lora(world / "b", "b")
    published = []

    def publish(folder, destination, base_model, lora):
        published.append((lora.scheduler_config["shift"], lora.settings.sampling.num_inference_steps, clips[-1]))

    clips = []
    make = type(pipe)._make_videos
    monkeypatch.setattr(
        type(pipe), "_make_videos", lambda self, **asked: clips.append(sampled(self)) or make(self, **asked)
    )
    monkeypatch.setattr("diffusers_mcm.pipelines.publishing.publish_lora", publish)
    pipe.push_to_hub("me/a", adapter_name="a", prompt="a red ring")
    assert published == [(8.0, 2, (8.0, 2, 5))]
    assert sampled(pipe) == (3.0, 3, 5) and pipe.get_active_adapters() == ["b"]


def test_choosing_an_adapter_leaves_the_scheduler(world):
    """As in diffusers."""
    pipe = MCMPipeline.from_pretrained(world / "a", adapter_name="a")
    pipe.load_mcm_lora(world / "b", "b")
    pipe.set_adapters("a")
    assert sampled(pipe) == (3.0, 3, 5)
