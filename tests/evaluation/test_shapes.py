"""Known values in the world of shapes: what the measures say of the truth, and what each of them does not see."""

import numpy as np
import pytest

from diffusers_mcm.evaluation.distances import paired_interval, resampled
from diffusers_mcm.evaluation.measuring import clipsim_measure, video_measure
from diffusers_mcm.evaluation.metrics import draws_of, frechet_scores
from diffusers_mcm.evaluation.networks import load_clip, load_videomae
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.render import render_video

CAPTIONS = held_out_captions()


def truths(seed):
    return np.stack([render_video(caption, seed, "video") for caption in CAPTIONS])


@pytest.fixture(scope="module")
def truth():
    return truths(0)


def test_clipsim_of_the_truth_and_of_other_captions(truth):
    """73.0 and 1 on 240 truths; here 60. A frozen video's is no lower, which is the blindness that it is known for."""
    clipsim = clipsim_measure(load_clip("mcm-shapes-clip"), 8).compute
    words = [str(caption) for caption in CAPTIONS]
    own, frozen = (float(clipsim(video, words).mean()) for video in (truth, np.repeat(truth[:, :1], 16, 1)))
    assert own == pytest.approx(73.0, abs=1.0)
    assert frozen > own - 0.5
    others = [words[place] for place in np.random.default_rng(0).permutation(len(words))]
    assert abs(float(clipsim(truth, others).mean())) < 20  # single ones are 45 apart, so the mean is 6 off


def test_fvd_sees_frames_out_of_their_order(truth):
    """With the packaged video network; the paired interval over captions excludes 0."""
    features = video_measure(load_videomae("mcm-shapes-video"), 8).compute
    order = np.random.default_rng(0).permutation(16)
    against = frechet_scores(np.concatenate([features(truths(seed), []) for seed in (1, 2, 3)]), "sample")
    groups = [np.array([place]) for place in range(len(CAPTIONS))]
    everything, drawn = np.arange(len(CAPTIONS)), resampled(len(CAPTIONS), 100)
    scores = [against(features(video, [])) for video in (truth, truth[:, order], np.repeat(truth[:, :1], 16, 1))]
    whole = [score(everything) for score in scores]
    assert whole[0] < whole[1] and whole[0] < whole[2]
    draws = [draws_of(score, groups, drawn) for score in scores]
    for other in (1, 2):
        found = paired_interval(whole[other] - whole[0], draws[other] - draws[0])
        assert found.low > 0
