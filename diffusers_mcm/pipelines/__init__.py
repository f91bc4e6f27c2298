"""Sampling: a pipeline for each base model, all of them alike in `mcm`."""

from .animatediff import AnimateDiffMCMPipeline
from .mcm import MCMPipeline, MCMPipelineOutput
from .modelscope import ModelScopeMCMPipeline

__all__ = ["AnimateDiffMCMPipeline", "MCMPipeline", "MCMPipelineOutput", "ModelScopeMCMPipeline"]
