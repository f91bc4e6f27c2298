"""Sampling: one pipeline for every base model."""

from .mcm import MCMPipeline, MCMPipelineOutput

__all__ = ["MCMPipeline", "MCMPipelineOutput"]
