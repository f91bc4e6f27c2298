"""What the card of a Wan LoRA says to do in diffusers and in ComfyUI, done on tiny components."""

import re

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, get_base_model
from diffusers_mcm.card_text import is_untouched, without_seal
from diffusers_mcm.cards import FLOW_GRID, FLOW_SHIFT, check_card, render_card, render_folder_card
from diffusers_mcm.commands.convert import build_parser
from diffusers_mcm.consistency import FLOW_SHIFT as SHIFT
from diffusers_mcm.consistency import FLOW_STEPS, FlowPath
from diffusers_mcm.location import Location
from diffusers_mcm.lora import LoRA, load_lora_into
from diffusers_mcm.publish import record_sample, stage_lora
from diffusers_mcm.settings import Settings
from tests.formats.world import edit_json
from tests.tiny import save_lora
from tests.tiny_wan import SIZE, save_wan_base, tiny_wan_transformer
from tests.wan_loras import ALPHA, random_differences, random_tensors

PROMPT = "a red ring"


@pytest.fixture(params=[(4, 5.0), (3, 8.0)], ids=["4 steps, shift 5", "3 steps, shift 8"])
def folder(request, tmp_path, monkeypatch):
    """The LoRA `me/mcm` beside its base model `owner/wan`, which `from_pretrained` finds by these names."""
    monkeypatch.chdir(tmp_path)
    save_wan_base(tmp_path / "owner/wan")
    steps, shift = request.param
    transformer = tiny_wan_transformer()
    load_lora_into(transformer, LoRA(random_tensors(), alpha=ALPHA))
    sampling = dict(num_inference_steps=steps, height=SIZE, width=SIZE, num_frames=5, fps=5)
    options = dict(sampling=sampling, scheduler=MCMFlowScheduler(shift=shift), training={"shift": shift})
    wan = get_base_model("wan")
    folder = save_lora(tmp_path / "me/mcm", transformer, wan, repository="owner/wan", **options)
    edit_json(folder / "mcm_config.json", base_model_repository="owner/wan")  # as if it were on the Hub
    record_sample(folder, [[[[0.0] * 3] * 16] * 16] * 5, PROMPT, fps=5)
    return folder


def blocks(text, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def latents():
    return torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def ours(folder, **options):
    """What this package makes of the LoRA without fresh noise."""
    pipe = MCMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MCMFlowScheduler.from_config(pipe.scheduler.config, stochastic=False)
    return pipe(PROMPT, latents=latents(), output_type="np", **options).frames[0]


@pytest.fixture
def stock(folder, monkeypatch):
    """The names that the blocks for stock diffusers leave behind, after the first and after the second."""
    monkeypatch.setattr(WanPipeline, "prepare_latents", lambda *args, **kwargs: latents())
    seen: dict = {}
    for number, block in enumerate(blocks(render_folder_card(folder, "me/mcm"))[1:]):
        exec(block, seen)
        seen[f"frames {number}"], seen[f"scheduler {number}"] = seen["frames"], seen["pipe"].scheduler
    assert number == 1
    return seen


# --- diffusers alone -------------------------------------------------------------------------------------------------
def test_eulers_scheduler_makes_the_video_of_ours(folder, stock):
    frames, timesteps = stock["frames 1"], stock["scheduler 1"].timesteps
    video = ours(folder)
    assert frames.shape == video.shape == (5, SIZE, SIZE, 3)
    np.testing.assert_allclose(frames, video, rtol=0, atol=1e-5)
    scheduler = MCMPipeline.from_pretrained(folder).scheduler
    scheduler.set_timesteps(len(timesteps))
    torch.testing.assert_close(timesteps, scheduler.timesteps)
    without = render_card(Settings(base_model="wan"), title="t", place=Location("me/mcm", remote=True))
    assert f"shift={SHIFT}" in without  # which is known of no LoRA


def test_unipc_makes_it_at_the_times_that_it_tells_the_network(folder, stock, monkeypatch):
    """Its own points are off the grid by less than 1e-3, and what the network is told of them is cut."""
    scheduler, kind = stock["scheduler 0"], type(get_base_model("wan"))
    original = kind.denoise

    def denoise(self, denoiser, latents, timesteps, text):
        return original(self, denoiser, latents, timesteps.floor(), text)

    monkeypatch.setattr(kind, "denoise", denoise)
    points = scheduler.sigmas[:-1].double() * 1000
    assert scheduler.timesteps.tolist() == points.floor().tolist()
    video = ours(folder, num_inference_steps=None, timesteps=points.tolist())
    np.testing.assert_allclose(stock["frames 0"], video, rtol=0, atol=1e-5)
    exact = stock["scheduler 1"].sigmas.double() * 1000
    assert 0 < (points - exact[:-1]).abs().max() < 1.0


# --- ComfyUI ---------------------------------------------------------------------------------------------------------
def test_the_settings_for_comfyui(folder):
    text = render_folder_card(folder, "me/mcm").split("With ComfyUI:")[1].split("## Training")[0]
    steps, shift = Settings.read(Location.of(folder)).steps, MCMPipeline.from_pretrained(folder).scheduler.config.shift
    assert f"| ModelSamplingSD3 | shift {shift} |" in text
    assert f"| KSampler | steps {steps}, cfg 1, sampler `lcm`, scheduler `simple`, denoise 1 |" in text
    command = re.search(r"^diffusers-mcm convert (.*)$", text, re.MULTILINE)[1]
    assert build_parser().parse_args(command.split()).to == "comfyui"


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_comfyuis_simple_visits_the_grid_of_the_student(steps, shift):
    """From its sources: the table σ(i / 1000) for i = 1, …, 1000, of which entry `-(1 + int(x · 1000 / steps))`."""
    u = [(1000 - int(x * 1000 / steps)) / 1000 for x in range(steps)]
    sigmas = torch.tensor([shift * each / (1 + (shift - 1) * each) for each in u])
    scheduler = MCMFlowScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    # of thirds and sixths its table has none; they are less than one of its thousand entries away, as fifths and
    # sevenths are of one of the 48 of the grid
    farthest = {3: 2e-3, 6: 2e-3, 5: 2e-2, 7: 2e-2}.get(steps, 1e-6)
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=0, atol=farthest)


# --- the card itself -------------------------------------------------------------------------------------------------
def test_the_defaults_are_those_of_a_training():
    assert (FLOW_SHIFT, FLOW_GRID) == (SHIFT, FLOW_STEPS) and FlowPath(SHIFT).shift == FLOW_SHIFT


def test_a_card_without_a_scheduler_beside_it_has_the_shift_of_the_training(folder):
    (folder / "scheduler/scheduler_config.json").unlink()
    settings = Settings.read(Location.of(folder))
    assert f"flow_shift={settings.training['shift']}" in render_folder_card(folder, "me/mcm")


def test_a_new_sample_keeps_the_shift_of_the_card(folder):
    card = render_folder_card(folder, "me/mcm")
    (folder / "README.md").write_text(card)
    record_sample(folder, [[[[1.0] * 3] * 16] * 16] * 5, "a blue ring", fps=5)
    new = (folder / "README.md").read_text()
    assert is_untouched(new) and without_seal(new) == without_seal(card).replace(PROMPT, "a blue ring")


@pytest.mark.parametrize(("name", "layout"), [("wan", "peft"), ("wan-ti2v", "diffusers"), ("wan-ti2v", "peft")])
def test_every_wan_has_a_card(name, layout):
    settings = Settings(base_model=name, base_model_repository="owner/wan")
    text = render_card(settings, title="t", place=Location("me/mcm", remote=True), layout=layout)
    check_card(text)
    assert "$" not in text and len(blocks(text)) == 3
    assert ("--to diffusers mcm" in text) == (layout == "peft") == ('load_lora_weights("mcm")' in text)


def test_what_is_pushed_has_its_shift_and_nothing_that_diffusers_would_refuse(folder, tmp_path):
    shift = MCMPipeline.from_pretrained(folder).scheduler.config.shift
    stage_lora(folder, tmp_path / "staged", "me/mcm")
    staged = MCMPipeline.from_pretrained(tmp_path / "staged").scheduler
    assert staged.config.shift == shift
    assert f"flow_shift={shift}" in (tmp_path / "staged/README.md").read_text()
    lora = LoRA(random_tensors(), differences=random_differences(tiny_wan_transformer()), settings=Settings("wan"))
    with pytest.raises(ValueError, match="adds to 14 parameters .*published in diffusers' layout, which has no names"):
        stage_lora(folder, tmp_path / "other", "me/mcm", lora=lora)
