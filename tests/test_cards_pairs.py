"""What the card of a pair, and that of one of its halves, say to do, done on tiny components."""

import shlex

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from diffusers_mcm import MCMFlowScheduler, MCMPipeline
from diffusers_mcm.cards import BOUNDARY as BOUNDARY_OF_A_CARD
from diffusers_mcm.cards import check_card, render_card, render_folder_card
from diffusers_mcm.cli import main
from diffusers_mcm.location import Location
from diffusers_mcm.lora import PAIR_NAMES
from diffusers_mcm.settings import Settings
from tests.test_cards_wan import blocks
from tests.test_publish_pairs import save_half
from tests.tiny_wan import BOUNDARY, save_wan_base

EXPERTS = tuple(PAIR_NAMES)


def card_of_a_pair(steps=4, shift=5.0):
    high, low = (
        Settings.from_dict(
            {
                "base_model": "wan-a14b",
                "base_model_repository": "owner/a14b",
                "expert": expert,
                "boundary": BOUNDARY,
                "sampling": {"num_inference_steps": steps, "height": 32, "width": 32, "num_frames": 5},
                "training": {"steps": number},
            }
        )
        for number, expert in enumerate(EXPERTS, 1)
    )
    place, scheduler = Location("me/mcm", remote=True), {"shift": shift, "boundary": BOUNDARY}
    return render_card(high, title="mcm", place=place, scheduler=scheduler, second=low)


def latents():
    return torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """`me/high` and `me/low` beside their base model `owner/a14b`, which are found by these names."""
    monkeypatch.chdir(tmp_path)
    save_wan_base(tmp_path / "owner/a14b", "wan-a14b")
    monkeypatch.setattr(WanPipeline, "prepare_latents", lambda *args, **kwargs: latents())
    return [
        save_half(tmp_path / "me" / name, expert, i) for i, (name, expert) in enumerate(zip(("high", "low"), EXPERTS))
    ]


def ours():
    """What this package makes of the pair without fresh noise."""
    pipe = MCMPipeline.from_pretrained(("me/high", "me/low"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MCMFlowScheduler.from_config(pipe.scheduler.config, stochastic=False)
    return pipe("a red ring", latents=latents(), output_type="np").frames[0]


def test_a_card_of_a_pair_makes_the_video_of_ours_in_diffusers_alone(halves):
    assert main(["convert", "me/high", "me/low", "me/mcm", "--to", "diffusers"]) == 0
    python = blocks(card_of_a_pair(shift=3.0).replace("a cat walking through grass", "a red ring"))
    assert len(python) == 2
    whole: dict = {}
    exec(python[0], whole)
    assert whole["pipe"].get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm"]}
    assert whole["pipe"].scheduler.config.boundary == BOUNDARY
    stock: dict = {}
    exec(python[1], stock)
    video = ours()
    np.testing.assert_allclose(stock["frames"], video, rtol=0, atol=1e-5)
    stock["pipe"].unload_lora_weights()
    exec("frames = " + python[1].partition("frames = ")[2], stock)
    assert not np.allclose(stock["frames"], video, rtol=0, atol=1e-2)  # which only the LoRAs make


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_card_of_a_half_names_the_other_one(halves, tmp_path, number, layout):
    """Its commands and its code are run with the other half in the place that the card leaves for it."""
    folder, expert, other = halves[number], EXPERTS[number], EXPERTS[1 - number]
    if layout == "peft":
        folder = tmp_path / "me" / "half"
        assert main(["convert", f"me/{halves[number].name}", "me/half", "--to", "peft"]) == 0
    text = render_folder_card(folder, f"me/{folder.name}")
    check_card(text)
    assert f"**This is the half for the {expert} expert**" in text and f"a LoRA for the {other} expert" in text
    assert "The two meet at σ = 0.875." in text and "Half of a motion consistency model" in text
    filled = text.replace(f"path/to/{other}", f"me/{halves[1 - number].name}")
    assert filled != text and "$" not in filled
    for command in (line for block in blocks(filled, "bash") for line in block.splitlines()):
        assert main(shlex.split(command)[1:]) == 0
    assert {path.name for path in (tmp_path / "comfyui_pair").iterdir()} == set(PAIR_NAMES.values())
    seen: list[dict] = []
    for code in blocks(filled.replace("a cat walking through grass", "a red ring")):
        seen.append({})
        exec(code, seen[-1])
    assert seen[0]["pipe"].get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm"]}
    np.testing.assert_allclose(seen[1]["frames"], ours(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 17.0])
def test_the_points_of_a_card_are_those_of_the_scheduler(steps, shift):
    text = card_of_a_pair(steps, shift)
    line = next(line for line in text.splitlines() if line.startswith("sigmas = "))
    sigmas = eval(line.removeprefix("sigmas = ").partition("#")[0])
    scheduler = MCMFlowScheduler(shift=shift, boundary=BOUNDARY)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(torch.tensor(sigmas), scheduler.sigmas[:-1], rtol=0, atol=2e-6)
    first = int((scheduler.timesteps >= 1000 * BOUNDARY).sum())  # as `WanPipeline` tells the experts apart
    assert sum(sigma >= BOUNDARY for sigma in sigmas) == first and f"| SplitSigmas | step {first} |" in text
    assert f"| ManualSigmas | `{', '.join(map(str, [*sigmas, 0.0]))}` |" in text


def test_both_trainings_are_in_the_card_of_a_pair():
    text = card_of_a_pair()
    check_card(text)
    assert "| | high_noise | low_noise |\n|---|---|---|\n| optimiser steps | 1 | 2 |" in text
    assert "a pair of LoRAs with which" in text and "Two to eight steps and guidance off" in text
    assert "half for the" not in text and f"boundary={BOUNDARY_OF_A_CARD}" in text
