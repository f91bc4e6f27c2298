"""Sampling: a pipeline for each base model, all of them alike in `mcm`."""

from .animatediff import AnimateDiffMCMPipeline
from .mcm import MCMPipeline, MCMPipelineOutput
from .modelscope import ModelScopeMCMPipeline
from .samplers import make_scheduler
from .wan import WanMCMPipeline, WanTI2VMCMPipeline
from .wan_a14b import WanA14BMCMPipeline

__all__ = [
    *("AnimateDiffMCMPipeline", "MCMPipeline", "MCMPipelineOutput", "ModelScopeMCMPipeline"),
    *("WanA14BMCMPipeline", "WanMCMPipeline", "WanTI2VMCMPipeline", "make_scheduler"),
]
