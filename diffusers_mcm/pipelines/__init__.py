"""Sampling: a pipeline for each base model, all of them alike in `mcm`."""

from .animatediff import AnimateDiffMCMPipeline
from .mcm import MCMPipeline, MCMPipelineOutput
from .modelscope import ModelScopeMCMPipeline
from .samplers import make_scheduler

__all__ = ["AnimateDiffMCMPipeline", "MCMPipeline", "MCMPipelineOutput", "ModelScopeMCMPipeline", "make_scheduler"]
