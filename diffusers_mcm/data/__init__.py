"""Training data: videos and images with captions, from folders, WebDataset tars or the Hub."""

from .dataset import FrameDataset, ImageDataset, KeyedDataset, VideoDataset, to_unit_range
from .loading import StepLoader, StepSampler

__all__ = [
    "FrameDataset",
    "ImageDataset",
    "KeyedDataset",
    "StepLoader",
    "StepSampler",
    "VideoDataset",
    "to_unit_range",
]
