"""What a denoiser is conditioned on is put together and taken apart by batch."""

import pytest
import torch

from diffusers_mcm.conditioning import concatenate, select


def test_two_batches_are_one_and_rows_of_it_are_the_first_again():
    first, second = ({"prompt_embeds": torch.randn(2, 5, 3), "mask": torch.ones(2, 5)} for _ in range(2))
    both = concatenate(first, second)
    assert both["prompt_embeds"].shape == (4, 5, 3)
    for rows, part in ((torch.arange(2), first), (torch.arange(2, 4), second)):
        assert all(torch.equal(value, part[key]) for key, value in select(both, rows).items())


def test_what_differs_in_shape_or_key_is_refused():
    with pytest.raises(ValueError, match=r"the keys and shapes of the text, .*\(1, 5, 3\).*; got .*\(1, 4, 3\)"):
        negative, text = ({"prompt_embeds": torch.zeros(1, length, 3)} for length in (4, 5))
        concatenate(negative, text)
