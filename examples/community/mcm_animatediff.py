"""AnimateDiff in a few steps, for `DiffusionPipeline.from_pretrained(…, custom_pipeline="…/mcm_animatediff.py")`.

Needs the package: this file only names its pipeline and puts the few-step scheduler in place of the repository's,
whose betas are the image model's.
"""

from diffusers_mcm import scheduler as schedulers
from diffusers_mcm.pipelines import animatediff


class AnimateDiffMCMPipeline(animatediff.AnimateDiffMCMPipeline):
    def register_modules(self, **components) -> None:
        scheduler = components.get("scheduler")
        if scheduler is not None and not isinstance(scheduler, schedulers.MCMScheduler):
            components["scheduler"] = self.base_model.image_models_scheduler(scheduler.config)
        super().register_modules(**components)
