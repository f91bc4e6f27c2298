"""ModelScope in a few steps, for `DiffusionPipeline.from_pretrained(…, custom_pipeline="…/mcm_modelscope.py")`.

Needs the package: this file only names its pipeline and puts the few-step scheduler in place of the repository's.
"""

from diffusers_mcm.pipelines import modelscope


class ModelScopeMCMPipeline(modelscope.ModelScopeMCMPipeline):
    def register_modules(self, **components) -> None:
        if "scheduler" in components:
            components["scheduler"] = self.base_model.few_step_scheduler(components["scheduler"])
        super().register_modules(**components)
