"""ModelScope in a few steps, for `DiffusionPipeline.from_pretrained(…, custom_pipeline="…/mcm_modelscope.py")`.

Needs the package: this file only names its pipeline and puts the few-step scheduler in place of the repository's.
"""

from diffusers_mcm.pipelines import loading, modelscope


class ModelScopeMCMPipeline(modelscope.ModelScopeMCMPipeline):
    def register_modules(self, **components) -> None:
        if "scheduler" in components:
            components["scheduler"] = loading.few_step_scheduler(self.base_model, components["scheduler"])
        super().register_modules(**components)
