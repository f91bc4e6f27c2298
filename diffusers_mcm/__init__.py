"""Motion consistency models: text to video in one to eight steps."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

# Imported when first used, so that `import diffusers_mcm` costs nothing.
_EXPORTS = {
    "AnimateDiffMCMPipeline": ".pipelines",
    "MCMFlowScheduler": ".scheduler",
    "MCMPipeline": ".pipelines",
    "MCMPipelineOutput": ".pipelines",
    "MCMScheduler": ".scheduler",
    "ModelScopeMCMPipeline": ".pipelines",
    "WanA14BMCMPipeline": ".pipelines",
    "WanMCMPipeline": ".pipelines",
    "WanTI2VMCMPipeline": ".pipelines",
    "BASE_MODELS": ".base_models",
    "get_base_model": ".base_models",
    "make_scheduler": ".pipelines",
}

if TYPE_CHECKING:
    from .base_models import BASE_MODELS, get_base_model
    from .pipelines import (
        AnimateDiffMCMPipeline,
        MCMPipeline,
        MCMPipelineOutput,
        ModelScopeMCMPipeline,
        WanA14BMCMPipeline,
        WanMCMPipeline,
        WanTI2VMCMPipeline,
        make_scheduler,
    )
    from .scheduler import MCMFlowScheduler, MCMScheduler

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
