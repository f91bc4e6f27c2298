"""The training loop, from a configuration to a LoRA folder."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..cards import DEFAULT_PROMPT
from ..distillation.adversarial import AdversarialStep
from ..distillation.discriminator import PenaltyWeight
from ..distillation.draws import Coins, draw_adversarial, draw_step
from ..distillation.motion import update_ema
from ..distillation.trajectory import TIMESTEPS
from ..files import atomic_files
from ..lora import LoRA, lora_state_dict, set_lora_state_dict
from .acceleration import build_accelerator, start_trackers, with_accelerate_settings
from .batches import Batch, build_batches, open_data
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .disk import room_for, size_of
from .networks import build_networks, describe
from .output import prepare_push, push_to_hub, write_lora_folder
from .parts import TrainedPart, slow_learning
from .record import RunRecord, find_checkpoint, go_on
from .resuming import check_identity, circumstances, identity, told_changes
from .tracking import LossLog, PictureLog, check_finite, saved_in
from .validation import sample_clip, write_validation

try:
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError("Training needs accelerate: pip install 'diffusers-mcm[train]'") from error

logger = logging.getLogger(__name__)


class Trainer:
    """A run: `Trainer(config).train()`."""

    def __init__(self, config: TrainingConfig):
        self.config = config = with_accelerate_settings(config)
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        checkpoint = find_checkpoint(self.output_dir, config.resume_from_checkpoint)
        if config.push_to_hub and self.accelerator.is_main_process:
            prepare_push(config)
        with room_for("the tracker's log", self.output_dir):
            start_trackers(self.accelerator, config)
        self.networks = build_networks(config, self.device)
        self.total_batch = (
            config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        )
        rates = config.learning_rates(self.total_batch)
        self.student = TrainedPart("student", self.networks.student, rates[0], config, self.accelerator)
        self.average = EMAModel(self.student.parameters, decay=config.ema_decay) if config.ema_decay else None
        self.parts = [self.student]
        self.discriminator = None
        if self.networks.discriminator is not None:
            self.discriminator = TrainedPart(
                "discriminator", self.networks.discriminator, rates[1], config, self.accelerator
            )
            self.parts.append(self.discriminator)
        grid = self.networks.student.path.solver_timesteps(config.num_solver_steps)
        self.timesteps = TIMESTEPS[config.timesteps](grid)
        self.data = open_data(config, self.networks.clip_size)
        self.penalty_weight = PenaltyWeight(config.gradient_penalty_weight, config.gradient_penalty_growth)
        self.step, self.seconds, self.last_checkpoint = 0, 0.0, None
        self.sums: dict[str, torch.Tensor] = {}
        self.data_sizes: dict[str, int] = {}
        self.pictures = PictureLog(self.accelerator.trackers)
        self.run = RunRecord(self.output_dir)
        if checkpoint is not None:
            self.resume(checkpoint)
        elif config.resume_from_checkpoint:
            self.warn(f"There is no checkpoint in {self.output_dir} yet: training starts anew.")
        self.accelerator.wait_for_everyone()  # nothing is written before all have read what is there

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
        self.check_all_steps_made()
        self.finish(batches.skipped)
        return self.output_dir

    def backward(self, batch: Batch) -> None:
        """Gradients of one micro-batch: the student's and motion head's, then the discriminator's."""
        captions, networks = batch.captions, self.networks
        text, negative_text = networks.text(captions), networks.text([""] * len(captions))
        draws = self.draw(batch)
        adversary = self.adversary(batch)
        losses = self.student.module(batch.pixels.to(self.device), text, negative_text, draws, adversary)
        self.accelerator.backward(losses.total)
        self.record(loss=losses.total, consistency=losses.consistency)
        if adversary is None:
            return
        with self.accelerator.autocast():
            hinge, penalty = adversary.discriminator_loss(self.discriminator.module, losses.generator.features)
        self.accelerator.backward(hinge if penalty is None else hinge + self.penalty_weight.value * penalty)
        self.record(adversarial=losses.generator.loss, discriminator=hinge, gradient_penalty=penalty)

    def update(self) -> dict[str, float]:
        """One step of both optimisers, unless something is missing or not finite; the losses of the whole batch."""
        scaler = self.accelerator.scaler
        for part in self.parts:
            part.check_gradients(self.step + 1)
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
        if self.discriminator is not None:
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
    @property
    def samples_per_coin(self) -> int:
        """With --coin batch, what all processes work on at the same time."""
        together = self.config.train_batch_size * self.accelerator.num_processes
        return together if self.config.coin == "batch" else 1

    def draw(self, batch: Batch):
        networks = self.networks
        draws = draw_step(
            self.config.seed,
            batch.indices,
            networks.latent_shape,
            self.timesteps,
            networks.guidance_range,
            self.config.num_adversarial_frames,
            Coins(self.config.lambda_real, self.total_batch, self.samples_per_coin),
        )
        return draws.to(self.device)

    def adversary(self, batch: Batch) -> AdversarialStep | None:
        """The discriminator with what it compares against; None if there is none."""
        if self.discriminator is None:
            return None
        networks = self.networks
        return AdversarialStep(
            networks.discriminator,
            self.config,
            draw_adversarial(self.config.seed, batch.indices, self.config.num_adversarial_frames),
            networks.discriminator_text(batch.fake_texts)["embedding"],
            batch.images.to(self.device),
            networks.discriminator_text(batch.real_texts)["embedding"],
        )

    def open_batches(self):
        batches = build_batches(
            self.config,
            self.data,
            self.step,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            pin_memory=self.device.type == "cuda",
        )
        if self.last_checkpoint is not None:
            self.warn(told_changes(self.data_sizes, batches.sizes, self.last_checkpoint))
        self.data_sizes = batches.sizes
        return batches

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
        with room_for("the run's log", self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.run.write()
            log = LossLog(self.output_dir, self.step)
        logger.info(
            "%s; total batch %d; precision %s", describe(self.networks), self.total_batch, self.config.mixed_precision
        )
        self.warn(slow_learning(self.student, self.config, self.total_batch))
        self.tell_image_text()
        return log

    def warn(self, message: str | None) -> None:
        """Say it once, whatever the number of processes."""
        if message is not None and self.accelerator.is_main_process:
            logger.warning(message)

    def tell_image_text(self) -> None:
        """Which text real images get in this run, and why."""
        text = self.data.image_text
        if self.discriminator is not None:
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
            with room_for("the run's log", self.output_dir):
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
            with room_for("the tracker's pictures", self.output_dir):
                self.pictures.write("validation", picture, self.step)
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
        """What must not change between the parts of this run."""
        image_text = self.data.image_text.rule
        return identity(self.config, self.networks, self.total_batch, self.samples_per_coin, image_text)

    def state(self) -> dict[str, Any]:
        student = self.networks.student
        discriminator, scaler = self.networks.discriminator, self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds,
            "run": self.run.id,
            "identity": json.dumps(self.identity()),
            "circumstances": json.dumps(circumstances(self.config, self.output_dir)),
            "data_sizes": self.data_sizes,
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
            self.last_checkpoint = save_checkpoint(self.output_dir, self.step, self.state(), self.write_folder)
            with room_for("the run's record", self.output_dir):
                self.run.add(self.last_checkpoint)
            if self.config.checkpoints_total_limit is not None:
                self.run.drop_beyond(self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def write_folder(
        self, folder: Path, sample: tuple[str, np.ndarray] | None = None, relative_to: Path | None = None
    ) -> LoRA:
        rates = self.config.learning_rates(self.total_batch)
        progress = {
            "steps": self.step,
            "total_batch": self.total_batch,
            "effective_learning_rate": rates[0],
            "effective_discriminator_learning_rate": rates[1] if self.discriminator else None,
            "hours": round(self.seconds / 3600, 3),
            "image_text": self.data.image_text.rule,
        }
        name = self.output_dir.resolve().name
        with self.averaged():
            return write_lora_folder(folder, self.config, self.networks, progress, name, sample, relative_to)

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

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        state, student = load_checkpoint(folder), self.networks.student
        check_identity(state["identity"], self.identity(), folder)
        self.run = go_on(self.output_dir, folder, state.get("run"))
        if state["step"] > self.config.max_train_steps:
            raise ValueError(
                f"{folder} is of step {state['step']}, beyond --max_train_steps {self.config.max_train_steps}."
            )
        if others := self.run.others:
            self.warn(
                f"{', '.join(other.name for other in others)} in {self.output_dir} do not lead to {folder.name}: "
                "'latest' will not mean them, and each is replaced when this run writes one of its name."
            )
        if then := state.get("circumstances"):
            self.warn(told_changes(json.loads(then), circumstances(self.config, self.output_dir), folder))
        self.data_sizes = state.get("data_sizes", {})
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

    def check_all_steps_made(self) -> None:
        if self.step != self.config.max_train_steps:
            raise RuntimeError(
                f"{self.step} of {self.config.max_train_steps} steps were made when the data came to an end, so no"
                f" LoRA is written. {saved_in(self.last_checkpoint)} Accumulation is over"
                f" {self.config.gradient_accumulation_steps} micro-batches here and over"
                f" {self.accelerator.gradient_accumulation_steps} for accelerate."
            )

    def finish(self, skipped: list[str]) -> None:
        config = self.config
        skipped = set(gather_object(skipped))  # each process read other samples
        if self.accelerator.is_main_process:
            prompts = config.validation_prompts or ((DEFAULT_PROMPT,) if config.push_to_hub else ())
            sample = (prompts[0], self.clip(prompts[0])) if prompts else None
            with (
                room_for("the LoRA", self.output_dir, size_of(lora_state_dict(self.networks.student.denoiser))),
                atomic_files(self.output_dir, last="pytorch_lora_weights.safetensors") as folder,
            ):
                lora = self.write_folder(folder, sample, relative_to=self.output_dir)
            if skipped:
                first = ", ".join(sorted(skipped)[:5]) + (", …" if len(skipped) > 5 else "")
                logger.warning("%d items of the data could not be used: %s", len(skipped), first)
            logger.info("The LoRA is in %s", self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if config.push_to_hub and self.accelerator.is_main_process:
            logger.info("Published: %s", push_to_hub(config, lora))


def train(config: TrainingConfig) -> Path:
    """Distil as the configuration says; the folder with the LoRA."""
    return Trainer(config).train()
