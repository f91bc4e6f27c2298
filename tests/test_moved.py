"""Names are found where they were before."""

import pytest

from diffusers_mcm import AnimateDiffMCMPipeline, ModelScopeMCMPipeline
from diffusers_mcm.base_models import animatediff, modelscope


def test_pipelines_are_still_found_beside_their_base_models():
    assert animatediff.AnimateDiffMCMPipeline is AnimateDiffMCMPipeline
    assert modelscope.ModelScopeMCMPipeline is ModelScopeMCMPipeline
    with pytest.raises(AttributeError, match="module 'diffusers_mcm.base_models.modelscope' has no attribute 'Other'"):
        modelscope.Other  # noqa: B018
