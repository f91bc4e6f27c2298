"""Known values in the world of shapes: what the measures say of the truth, and what each of them does not see."""

import numpy as np
import pytest

from diffusers_mcm.evaluation.distances import paired_interval, resampled, unit
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
    """73.0 on 240 truths, here 60; a frozen video's is no lower, which is the blindness that it is known for.

    With a caption of another video it is about 0. Single permutations stray by 4 around their mean, for there are
    captions that have much in common; the mean over all pairs of a video and another's caption is that of all of them.
    """
    clip, words = load_clip("mcm-shapes-clip"), [str(caption) for caption in CAPTIONS]
    clipsim = clipsim_measure(clip, 8).compute
    own, frozen = (float(clipsim(video, words).mean()) for video in (truth, np.repeat(truth[:, :1], 16, 1)))
    assert own == pytest.approx(73.0, abs=0.5)
    assert frozen >= own
    images = np.stack([unit(clip(video)).mean(0) for video in truth])
    pairs = 100 * images @ unit(clip.text(words)).T  # of every video with every caption
    order = np.random.default_rng(0).permutation(len(words))
    others = clipsim(truth, [words[place] for place in order])
    np.testing.assert_allclose(others, pairs[np.arange(len(words)), order], atol=0.01)  # float32, other batches
    assert abs(pairs[~np.eye(len(words), dtype=bool)].mean()) < 2  # it is -1.3; of true captions 72.8


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
