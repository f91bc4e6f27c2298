"""Measures of generated videos: FVD, KVD, CLIPSIM, FID, KID, CMMD and motion, with the protocol they were taken by."""

from .distances import cmmd, frechet_distance, kernel_distance
from .evaluate import Options, evaluate, write_prompts
from .i3d import InceptionI3d

__all__ = [
    "InceptionI3d",
    "Options",
    "cmmd",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "write_prompts",
]
