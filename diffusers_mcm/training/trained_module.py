"""A module that is trained, with all that belongs to it: parameters, optimiser, schedule, moving average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..wording import first_names
from .config import TrainingConfig

# Under this sum of the rates over a run no LoRA is known to have learnt anything; the paper's is a hundred times that.
LEAST_SUM_OF_RATES = 0.0015
# fp16 halves the scale of a loss for each step that it skips: so many in a row take it from 65,536 to under 0.001.
MOST_SKIPPED = 27
_PAPERS_SUM = "the paper's is 5e-6 × 30,000 steps = 0.15"


class MissingGradient(RuntimeError):
    """Something that is trained got no gradient in a step; no weight was changed by it."""


class SkippedSteps(RuntimeError):
    """fp16 skipped the steps of something that is trained, as its gradients were not finite: it does not learn."""


class TrainedModule:
    """The "student" or the "discriminator", wrapped for its processes, with its optimiser and schedule.

    `rate` is the full learning rate, `ema_decay` that of a moving average of what is trained; 0 for none.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rate: float,
        config: TrainingConfig,
        accelerator: Accelerator,
        ema_decay: float = 0.0,
    ):
        self.name, self.num_steps = name, config.max_train_steps
        self.made, self.skipped = 0, 0  # steps since the start of the process, and those that fp16 skipped just now
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.module = accelerator.prepare_model(module)
        # Not prepared by accelerate: its wrapper updates the fp16 scale once per optimiser, and there are two.
        betas, decay = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas, config.adam_epsilon, decay)
        steps = dict(num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps)
        self.schedule = get_scheduler(config.lr_scheduler, self.optimizer, **steps)
        self.average = EMAModel(self.parameters, decay=ema_decay) if ema_decay else None

    @property
    def rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def sum_of_rates(self) -> float:
        """The learning rates of all steps of the run, added up: about how far AdamW can move a weight."""
        (full,), (factor,) = self.schedule.base_lrs, self.schedule.lr_lambdas
        return full * sum(factor(step) for step in range(self.num_steps))

    def check_gradients(self, step: int) -> None:
        """Stop the run if anything that is trained has no gradient after all micro-batches of a step.

        None is what is looked for. A gradient of zeros is one: matrix A of a fresh LoRA has it in the first step, and
        so has a discriminator that is sure of everything.
        """
        missing = [name for name, parameter in zip(self.names, self.parameters) if parameter.grad is None]
        if missing:
            raise MissingGradient(
                f"Training stopped at step {step}: {len(missing)} of {len(self.names)} trained parameters of the "
                f"{self.name} have no gradient ({first_names(missing)}), so they would be saved as they were at the "
                "start. No weight was changed by this step. Likely causes: autocast gives weights back that it "
                "converted where no gradients are kept (a torch before 2.11, with its cache on), a layer whose input "
                "or output is detached or that these clips never reach, or a module that was frozen or exchanged "
                "after the optimiser was made."
            )

    def clip(self, max_norm: float, scaler: Any) -> torch.Tensor:
        """Scale the gradients down to `max_norm`; returns the norm they had."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def count_step(self, norm: float, step: int) -> None:
        """Take note of whether fp16 will skip this step, as it does where the gradients' norm is not finite.

        A few in a row are how it finds the scale of the loss. If there is no end to them, the run stops.
        """
        if math.isfinite(norm):
            self.made, self.skipped = self.made + 1, 0
            return
        self.skipped += 1
        if self.skipped > MOST_SKIPPED:
            raise SkippedSteps(f"Training stopped at step {step}: {self._told_skipped()}")

    def check_learnt(self) -> None:
        """Raise `SkippedSteps` if fp16 skipped every step that was to be made, so that nothing was trained."""
        if self.skipped and not self.made:
            raise SkippedSteps(f"Nothing was trained, so no LoRA is written: {self._told_skipped()}")

    def _told_skipped(self) -> str:
        return (
            f"the last {self.skipped} steps of the {self.name} were skipped, because its gradients are not finite in "
            "fp16, and its weights are what they were before. A run of a few steps needs more of them to find the "
            "scale of the loss; else use --mixed_precision bf16 or no."
        )

    def update(self, scaler: Any) -> None:
        """Move the weights along their gradients, which are gone then, and the schedule by a step."""
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module with the moving average for weights, if there is one."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        # Where the run has another number of steps by now, the next step's rate is that of the schedule as it is.
        step = self.schedule.last_epoch
        rates = [full * factor(step) for full, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.schedule._last_lr = rates

    def load_average(self, state: dict[str, Any] | None) -> None:
        """Go on with a moving average; it begins at the weights as they are if the run had none so far."""
        if self.average is not None:
            begun = state or {"shadow_params": [parameter.detach() for parameter in self.parameters]}
            self.average.load_state_dict({**begun, "decay": self.average.decay})
            self.average.to(self.parameters[0].device)


def slow_learning(student: TrainedModule, config: TrainingConfig, total_batch: int) -> str | None:
    """What to warn of if the student's rates over the whole run are too small to learn by; None if they are not."""
    total, full = student.sum_of_rates(), config.learning_rates(total_batch)[0]
    if total >= LEAST_SUM_OF_RATES:
        return None
    scaled, batch = "not scaled", ""
    if config.scale_lr:
        scaled = f"scaled to {full:.2g} by a total batch of {total_batch}"
        batch = "a larger batch (--gradient_accumulation_steps, --train_batch_size, more processes), "
    return (
        f"The student's learning rates add up to {total:.2g} over the {config.max_train_steps} steps of this run, and "
        f"below {LEAST_SUM_OF_RATES} a LoRA learns next to nothing ({_PAPERS_SUM}): --learning_rate "
        f"{config.learning_rate:g} is {scaled}, the schedule is {config.lr_scheduler} with --lr_warmup_steps "
        f"{config.lr_warmup_steps}. Take {batch}more --max_train_steps or a larger --learning_rate."
    )
