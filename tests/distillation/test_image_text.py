"""How alike two sets of captions are, and which texts go with which images."""

import numpy as np
import pytest

from diffusers_mcm.distillation.image_text import caption_overlap, pair_texts


def test_overlap_is_what_the_texts_alone_leave_of_the_hinge():
    """Against the least hinge over all functions of the text, which is the sum over texts of 2 min(p, q)."""
    images, videos = ["a"] * 6 + ["b"] * 2 + ["c"] * 2, ["a"] * 2 + ["b", "d"]
    overlap = caption_overlap(images, videos)
    assert overlap == pytest.approx(0.5 + 0.2)
    p, q = (np.array([texts.count(text) / len(texts) for text in "abcd"]) for texts in (images, videos))
    least = [min(a * max(0, 1 - s) + b * max(0, 1 + s) for s in np.linspace(-1, 1, 201)) for a, b in zip(p, q)]
    assert 2 * overlap == pytest.approx(sum(least))
    assert caption_overlap(videos, videos * 3) == 1.0 and caption_overlap("ab", "cd") == 0.0


def test_what_each_rule_pairs():
    prompts, captions = ["one", "one", "two", "two"], ["a", "", "b", "c"]
    assert pair_texts("own", prompts, captions) == (["one", "", "two", "two"], captions)
    assert pair_texts("prompt", prompts, captions) == (prompts, prompts)
    assert pair_texts("none", prompts, captions) == ([""] * 4, [""] * 4)
    with pytest.raises(ValueError, match="one of the rules own, prompt and none, got 'auto'"):
        pair_texts("auto", prompts, captions)
