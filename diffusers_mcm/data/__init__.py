"""Training data: videos and images with captions, from folders, WebDataset tars or the Hub."""

from .dataset import ImageDataset, KeyedDataset, VideoDataset, to_unit_range
from .loading import StepLoader, StepSampler, default_workers

__all__ = [
    "ImageDataset",
    "KeyedDataset",
    "StepLoader",
    "StepSampler",
    "VideoDataset",
    "default_workers",
    "to_unit_range",
]
