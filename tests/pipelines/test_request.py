"""What one call is asked for is one object."""

import pytest
import torch

from diffusers_mcm.pipelines.request import Request


def test_a_request_is_checked_as_it_is_made():
    request = Request(4, 16, 16, ["a", "b"], None, None, None, guidance_scale=torch.tensor(2.0), timesteps=(999, 499))
    assert request.guidance_scale == 2.0 and request.guided and request.timesteps == [999, 499]
    assert request.count_prompts() == 2 and Request(4, 16, 16, "a", None, None, None).count_prompts() == 1
    assert Request(4, 16, 16, None, None, torch.zeros(3, 2, 2), None).count_prompts() == 3
    with pytest.raises(ValueError, match="`eta` must lie between 0 and 1, got 2"):
        Request(4, 16, 16, "a", None, None, None, eta=2)
