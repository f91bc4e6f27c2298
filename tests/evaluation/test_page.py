"""The page: everything that a reader of the numbers has to know, in words."""

from dataclasses import replace

import pytest

from diffusers_mcm.evaluation.distances import Interval
from diffusers_mcm.evaluation.records import Difference
from tests.evaluation.conftest import evaluation, method


def test_the_page_shows_protocol_methods_differences_and_what_was_skipped():
    clear = Difference("lcm4", "mcm4", "fvd.i3d", Interval(200.0, 150.0, 240.0), 200)
    unclear = Difference("lcm4", "mcm4", "motion.change", Interval(0.1, -0.2, 0.3), 200)
    page = evaluation(
        differences=[clear, unclear], mcm4=method(), lcm4=method(700.0, skipped={"a.mp4": "it is broken"})
    ).page()
    assert "| `reference.num_videos` | 500 |" in page and "| `window.num_frames` | 16 |" in page
    assert "| (reference) | 4 | 500 | – | 4.500 |" in page
    assert "| mcm4 | 4 | 500 | 500.0 | 4.000 |" in page
    assert "| lcm4 | **200.0 (150.0 to 240.0)** | 0.100 (-0.200 to 0.300) |" in page
    assert "- lcm4: a.mp4: it is broken" in page and "A still video raises CLIPSIM" in page


def test_a_difference_is_turned_so_that_it_is_less_the_first():
    page = evaluation(
        differences=[Difference("mcm4", "lcm4", "fvd.i3d", Interval(-200.0, -240.0, -150.0), 200)],
        mcm4=method(),
        lcm4=method(700.0),
    ).page()
    assert "| lcm4 | **200.0 (150.0 to 240.0)** |" in page


def test_notes_stand_below_the_table():
    page = evaluation(notes=["2 videos count for no method."], mcm4=method()).page()
    assert "| 0.500 |\n\n2 videos count for no method." in page


def test_the_page_says_how_the_samples_were_made_and_how_much_was_skipped():
    """Sampler, LoRA, seeds and frame rate of each method; resamples in the head; counts on the console too."""
    made = {"sampler": "ddim", "guidance_scale": 1.5, "lora_sha256": "ab12", "lora": None, "versions": {"torch": "2"}}
    found = evaluation(
        mcm4=method(settings=made, seeds="0 to 499", fps=[8.0, 8.0]),
        theirs=method(skipped={"a.mp4": "broken", "b.mp4": "broken"}, fps=[8.0, 8.125]),
    )
    found = replace(found, resamples=200, reference=replace(found.reference, skipped={"c.mp4": "cut"}, fps=[8, 8]))
    page = found.page()
    assert (
        "- mcm4: sampler ddim, guidance_scale 1.5, lora_sha256 ab12, versions.torch 2, seeds 0 to 499, 8 frames"
        in page
    )
    assert (
        "- theirs: seeds unknown, 8 to 8.125 frames a second" in page and "- the reference: 8 frames a second" in page
    )
    assert "| `resamples` | 200 of the captions, for the intervals |" in page
    assert "2 of theirs:\n\n- theirs: a.mp4: broken\n- theirs: b.mp4: broken" in page
    assert "Skipped: 1 of the reference, 2 of theirs." in found.summary()
    assert "frames a second, but" not in page


@pytest.mark.parametrize(
    "fps, told",
    [([8.0, 8.0], None), ([7.9, 8.1], None), ([24.0, 24.0], "those of mcm4 24:"), ([8, 30], "those of mcm4 8 to 30:")],
)
def test_other_frame_rates_are_told_below_the_table(fps, told):
    found = replace(evaluation(mcm4=method(fps=fps)), reference=method(fps=[8.0, 8.0]))
    sentence = f"The clips of the reference have 8 frames a second, but {told} at two rates the same motion"
    assert (sentence in found.summary()) == (told is not None)


def test_whose_steps_are_told_by_the_name_and_who_is_not_in_the_picture():
    found = evaluation(lcm4=method(steps=4, steps_by_name=True), theirs=method(steps=None), mcm8=method(steps=8))
    assert "The steps are those in the name, not in the files, for lcm4." in found.summary()
    assert "Not in the picture, because nothing says their steps: theirs." in found.summary()
    assert "theirs" not in found.series()


@pytest.mark.parametrize(
    "resamples, captions, why",
    [(0, 500, "--resamples was 0"), (200, 1, "there is one caption"), (200, 500, "measure all of them in one call")],
)
def test_what_has_no_interval_is_said_in_words(resamples, captions, why):
    methods = {name: method(num_captions=captions) for name in ("mcm4", "lcm4")}
    page = replace(evaluation(**methods), resamples=resamples).page()
    assert f"## Differences\n\nThere are no intervals: {why}" in page or f"{why}." in page.split("## Differences")[1]
    assert "| ---" not in page.split("## Differences")[1]
    assert "## Differences" not in evaluation(mcm4=method()).page()


def test_motion_alone():
    page = evaluation(mcm4=method(values={"motion.change": 4.0})).page()
    assert "\n\nA still video raises CLIPSIM" in page
