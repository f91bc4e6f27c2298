"""The training loop, from a configuration to a LoRA folder."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ..cards import DEFAULT_PROMPT
from ..discriminator import PenaltyWeight
from ..files import whole_files
from ..lora import lora_state_dict, set_lora_state_dict
from ..motion import update_ema
from ..trajectory import TIMESTEPS
from .batches import Batch, build_batches, open_data
from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .config import VALUES_BEFORE_FLAGS, TrainingConfig, default_values
from .networks import build_networks, describe
from .output import prepare_push, push_to_hub, write_lora_folder
from .randomness import draw_adversarial, draw_step
from .step import Judge
from .tracking import LossLog, check_finite
from .validation import sample_clip, write_validation

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
    from accelerate.utils import ProjectConfiguration, gather_object, is_tensorboard_available
except ImportError as error:
    raise ImportError("Training needs accelerate: pip install 'diffusers-mcm[train]'") from error

logger = logging.getLogger(__name__)
TRACKER_PROJECT = "mcm"
# With one of these changed, or a flag of the method, it would not be the same run that goes on.
_FIXED_ON_RESUME = (
    "base_model clip_size lora_rank lora_alpha seed total_batch learning_rate discriminator_learning_rate scale_lr "
    "lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm frame_interval"
).split()


class TrainedPart:
    """One of the two things that are trained: its wrapped module, parameters, optimiser and schedule."""

    def __init__(self, name: str, module: nn.Module, rate: float, config: TrainingConfig, accelerator: Accelerator):
        self.name = name
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.module = accelerator.prepare_model(module)
        # Not prepared by accelerate: its wrapper updates the fp16 scale once per optimiser, and there are two.
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )

    @property
    def rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def clip(self, max_norm: float, scaler: Any) -> torch.Tensor:
        """Scale the gradients down to `max_norm`; the norm they had."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def update(self, scaler: Any) -> None:
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


class Trainer:
    """A run: `Trainer(config).train()`."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        if config.push_to_hub and self.accelerator.is_main_process:
            prepare_push(config)
        self.networks = build_networks(config, self.device)
        self.total_batch = (
            config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        )
        rates = config.learning_rates(self.total_batch)
        self.student = TrainedPart("student", self.networks.student, rates[0], config, self.accelerator)
        self.average = EMAModel(self.student.parameters, decay=config.ema_decay) if config.ema_decay else None
        self.parts = [self.student]
        self.critic = None
        if self.networks.discriminator is not None:
            self.critic = TrainedPart("discriminator", self.networks.discriminator, rates[1], config, self.accelerator)
            self.parts.append(self.critic)
        grid = self.networks.student.path.solver_timesteps(config.num_solver_steps)
        self.timesteps = TIMESTEPS[config.timesteps](grid)
        self.data = open_data(config, self.networks.clip_size)
        self.penalty_weight = PenaltyWeight(config.gradient_penalty_weight, config.gradient_penalty_growth)
        self.step, self.seconds, self.last_checkpoint = 0, 0.0, None
        self.sums: dict[str, torch.Tensor] = {}
        self.resume()

    # --- the algorithm -----------------------------------------------------------------------------------------------
    def train(self) -> Path:
        """Run to `max_train_steps` and write the LoRA folder; its path."""
        batches = self.open_batches()
        log = self.open_log()
        bar = tqdm(
            total=self.config.max_train_steps,
            initial=self.step,
            desc="distilling",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        started = time.perf_counter()
        for batch in batches:
            with self.accelerator.accumulate(*(part.module for part in self.parts)):
                self.backward(batch)
                if not self.accelerator.sync_gradients:
                    continue
                losses = self.update()
            self.seconds, started = self.seconds + time.perf_counter() - started, time.perf_counter()
            self.step += 1
            self.report(losses, log, bar)
            self.save_and_validate()
        bar.close()
        self.finish(batches.skipped)
        return self.output_dir

    def backward(self, batch: Batch) -> None:
        """Gradients of one micro-batch: the student's and motion head's, then the discriminator's."""
        captions, networks = batch.captions, self.networks
        text, negative_text = networks.text(captions), networks.text([""] * len(captions))
        draws = self.draw(batch)
        judge = self.judge(batch)
        losses = self.student.module(batch.pixels.to(self.device), text, negative_text, draws, judge)
        self.accelerator.backward(losses.total)
        self.record(loss=losses.total, consistency=losses.consistency)
        if judge is None:
            return
        with self.accelerator.autocast():
            hinge, penalty = judge.discriminator_loss(self.critic.module, losses.judgement.features)
        self.accelerator.backward(hinge if penalty is None else hinge + self.penalty_weight.value * penalty)
        self.record(adversarial=losses.judgement.loss, discriminator=hinge, gradient_penalty=penalty)

    def update(self) -> dict[str, float]:
        """One step of both optimisers, unless something is not finite; the losses of the whole batch."""
        scaler = self.accelerator.scaler
        norms = {f"{part.name}_grad_norm": part.clip(self.config.max_grad_norm, scaler) for part in self.parts}
        losses = self.mean_losses()
        gradients = {name: norm.item() for name, norm in norms.items()}
        # With fp16 an infinite gradient is how the scaler finds its scale: it skips that step by itself.
        samples = range(self.step * self.total_batch, (self.step + 1) * self.total_batch)
        checked = losses if scaler is not None else {**losses, **gradients}
        check_finite(checked, self.step + 1, samples, self.last_checkpoint)
        rates = {f"{part.name}_learning_rate": part.rate for part in self.parts}
        for part in self.parts:
            part.update(scaler)
        if scaler is not None:
            scaler.update()
        if self.average is not None:
            self.average.step(self.student.parameters)
        update_ema(self.networks.student.target_motion, self.networks.student.motion, self.config.motion_ema_decay)
        if self.critic is not None:
            self.networks.discriminator.update_spectral_norm()
        return {**losses, **gradients, **rates, **self.follow_penalty(losses)}

    def follow_penalty(self, losses: dict[str, float]) -> dict[str, float]:
        """The penalty's weight in this step. That of the next is decided here, by all processes alike."""
        if "gradient_penalty" not in losses:
            return {}
        weight = self.penalty_weight.value
        self.penalty_weight.follow(losses["gradient_penalty"], self.step + 1)
        return {"gradient_penalty_weight": weight}

    # --- its inputs --------------------------------------------------------------------------------------------------
    def draw(self, batch: Batch):
        networks = self.networks
        draws = draw_step(
            self.config.seed,
            batch.indices,
            networks.latent_shape,
            self.timesteps,
            networks.guidance_range,
            self.config.num_adversarial_frames,
        )
        return draws.to(self.device)

    def judge(self, batch: Batch) -> Judge | None:
        """The discriminator with what it compares against; None if there is none."""
        if self.critic is None:
            return None
        networks = self.networks
        return Judge(
            networks.discriminator,
            self.config,
            draw_adversarial(self.config.seed, batch.indices, self.config.num_adversarial_frames),
            networks.judge_text(batch.fake_texts)["embedding"],
            batch.images.to(self.device),
            networks.judge_text(batch.real_texts)["embedding"],
        )

    def open_batches(self):
        return build_batches(
            self.config,
            self.data,
            self.step,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            pin_memory=self.device.type == "cuda",
        )

    # --- what it tells -----------------------------------------------------------------------------------------------
    def record(self, **losses: torch.Tensor | None) -> None:
        """Add one micro-batch's losses to the step's means."""
        share = 1 / self.config.gradient_accumulation_steps
        for name, value in losses.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + share * value.detach().float()

    def mean_losses(self) -> dict[str, float]:
        """The step's losses over all processes; the sums start anew."""
        names, values = list(self.sums), torch.stack(list(self.sums.values()))
        self.sums = {}
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist()))

    def open_log(self) -> LossLog | None:
        if not self.accelerator.is_main_process:
            return None
        self.output_dir.mkdir(parents=True, exist_ok=True)
        logger.info("%s; total batch %d", describe(self.networks), self.total_batch)
        self.tell_image_text()
        return LossLog(self.output_dir, self.step)

    def tell_image_text(self) -> None:
        """Which text real images get in this run, and why."""
        text = self.data.image_text
        if self.critic is not None:
            logger.info("Text beside real images: %s (%s).", text.rule, text.reason)
            if text.warning:
                logger.warning(text.warning)

    def report(self, losses: dict[str, float], log: LossLog | None, bar: tqdm) -> None:
        if log is None:
            return
        bar.update()
        shown = ("loss", "consistency", "adversarial", "discriminator")
        bar.set_postfix({name: f"{losses[name]:.4g}" for name in shown if name in losses}, refresh=False)
        if self.step % self.config.logging_steps == 0 or self.step == self.config.max_train_steps:
            log.write({"step": self.step, **losses, "seconds": round(self.seconds, 3)})
            self.accelerator.log(losses, step=self.step)

    # --- what it writes ----------------------------------------------------------------------------------------------
    def save_and_validate(self) -> None:
        config, last = self.config, self.step == self.config.max_train_steps
        if config.checkpointing_steps and self.step % config.checkpointing_steps == 0:
            self.save()
        if config.validation_prompts and (last or self.step % config.validation_steps == 0):
            self.validate()

    def validate(self) -> None:
        if self.accelerator.is_main_process:
            clips = {prompt: self.clip(prompt, index) for index, prompt in enumerate(self.config.validation_prompts)}
            picture = write_validation(self.validation_folder(self.step), clips, self.config.fps)
            for tracker in self.accelerator.trackers:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": picture[None]}, step=self.step, **options)
        self.accelerator.wait_for_everyone()

    def clip(self, prompt: str, index: int = 0) -> np.ndarray:
        """A clip of the student as it is, (T, H, W, 3) uint8."""
        config, networks = self.config, self.networks
        with self.accelerator.autocast(), self.averaged():
            return sample_clip(
                networks.student,
                networks.scheduler,
                networks.text([prompt]),
                networks.latent_shape,
                config.num_inference_steps,
                config.seed,
                index,
            )

    def validation_folder(self, step: int) -> Path:
        return self.output_dir / "validation" / f"step-{step:06d}"

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of one run."""
        values = {**self.config.to_dict(), "total_batch": self.total_batch, "clip_size": list(self.networks.clip_size)}
        values["base_model"] = self.networks.base.name
        values["image_text"] = self.data.image_text.rule
        method = [entry.name for entry in dataclasses.fields(self.config) if entry.metadata["group"] == "method"]
        return {name: values[name] for name in (*_FIXED_ON_RESUME, *method)}

    def state(self) -> dict[str, Any]:
        student = self.networks.student
        discriminator, scaler = self.networks.discriminator, self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds,
            "identity": json.dumps(self.identity()),
            "lora": lora_state_dict(student.denoiser),
            "motion": student.motion.state_dict(),
            "target_motion": student.target_motion.state_dict(),
            "heads": None if discriminator is None else discriminator.heads.state_dict(),
            "parts": {part.name: part.state() for part in self.parts},
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "penalty_weight": self.penalty_weight.state_dict(),
        }

    def save(self) -> None:
        if self.accelerator.is_main_process:
            self.last_checkpoint = save_checkpoint(
                self.output_dir, self.step, self.state(), self.write_folder, self.config.checkpoints_total_limit
            )
        self.accelerator.wait_for_everyone()

    def write_folder(
        self, folder: Path, sample: tuple[str, np.ndarray] | None = None, relative_to: Path | None = None
    ) -> None:
        rates = self.config.learning_rates(self.total_batch)
        progress = {
            "steps": self.step,
            "total_batch": self.total_batch,
            "effective_learning_rate": rates[0],
            "effective_discriminator_learning_rate": rates[1] if self.critic else None,
            "hours": round(self.seconds / 3600, 3),
            "image_text": self.data.image_text.rule,
        }
        name = self.output_dir.resolve().name
        with self.averaged():
            write_lora_folder(folder, self.config, self.networks, progress, name, sample, relative_to)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its moving average for weights, if it has one."""
        if self.average is None:
            yield
            return
        self.average.store(self.student.parameters)
        self.average.copy_to(self.student.parameters)
        try:
            yield
        finally:
            self.average.restore(self.student.parameters)

    def resume(self) -> None:
        """Go on from the checkpoint that is asked for, if there is one."""
        wanted = self.config.resume_from_checkpoint
        folder = find_checkpoint(self.output_dir, wanted) if wanted else None
        if folder is None:
            if wanted:
                logger.warning("There is no checkpoint in %s yet: training starts anew.", self.output_dir)
            return
        state, student = load_checkpoint(folder), self.networks.student
        self.check_identity(folder, json.loads(state["identity"]))
        self.step, self.seconds, self.last_checkpoint = state["step"], state["seconds"], folder
        set_lora_state_dict(student.denoiser, state["lora"])
        student.motion.load_state_dict(state["motion"])
        student.target_motion.load_state_dict(state["target_motion"])
        if self.networks.discriminator is not None:
            self.networks.discriminator.heads.load_state_dict(state["heads"])
        for part in self.parts:
            part.load(state["parts"][part.name])
        if self.average is not None:  # begun here, if the run had none so far
            begun = state.get("average") or {"shadow_params": [p.detach() for p in self.student.parameters]}
            self.average.load_state_dict({**begun, "decay": self.config.ema_decay})
            self.average.to(self.device)
        if "penalty_weight" in state:  # before it could grow, it was what its flag says
            self.penalty_weight.load_state_dict(state["penalty_weight"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            logger.info("Resumed from %s at step %d.", folder, self.step)

    def check_identity(self, folder: Path, recorded: dict[str, Any]) -> None:
        """Refuse to go on with another run than the one whose settings the checkpoint in `folder` recorded."""
        # What a checkpoint does not record was no flag yet, and was done as its default says, or in a way of its own.
        before = VALUES_BEFORE_FLAGS if self.critic is not None else {}
        then, now = default_values() | before | recorded, self.identity()
        changed = [name for name in now if then[name] != now[name]]
        if not changed:
            return
        settings = "; ".join(f"{name} was {then[name]}, is {now[name]}" for name in changed)
        flags = " ".join(f"--{name} {then[name]}" for name in changed if name in before.keys() - recorded.keys())
        raise ValueError(
            f"The run in {folder} cannot be gone on with other settings: {settings}."
            + (f" It began before there were flags for all of them; go on with {flags}" if flags else "")
        )

    def finish(self, skipped: list[str]) -> None:
        config = self.config
        skipped = set(gather_object(skipped))  # each process read other samples
        if self.accelerator.is_main_process:
            prompts = config.validation_prompts or ((DEFAULT_PROMPT,) if config.push_to_hub else ())
            sample = (prompts[0], self.clip(prompts[0])) if prompts else None
            with whole_files(self.output_dir, last="pytorch_lora_weights.safetensors") as folder:
                self.write_folder(folder, sample, relative_to=self.output_dir)
            if skipped:
                logger.warning("%d items of the data could not be used.", len(skipped))
            logger.info("The LoRA is in %s", self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if config.push_to_hub and self.accelerator.is_main_process:
            logger.info("Published: %s", push_to_hub(config))


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """One process or many; DDP is the only kind of parallelism whose results the tests vouch for."""
    report_to = None if config.report_to == "none" else config.report_to
    output_dir = Path(config.output_dir)
    accelerator = Accelerator(
        # Left to itself on a CPU it would not notice `torchrun`, and every process would train alone.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
        # The buffers (spectral norms) are the same in every process; sending them about would only cost time.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(f"{accelerator.distributed_type} is not supported; launch with plain data parallelism (DDP).")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if report_to is not None:
        values = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in config.to_dict().items()
        }
        if report_to == "tensorboard" and not is_tensorboard_available():
            raise ImportError(
                "--report_to tensorboard needs it: pip install 'diffusers-mcm[train]', or --report_to none"
            )
        accelerator.init_trackers(TRACKER_PROJECT, config=values)
    return accelerator


def train(config: TrainingConfig) -> Path:
    """Distil as the configuration says; the folder with the LoRA."""
    return Trainer(config).train()
