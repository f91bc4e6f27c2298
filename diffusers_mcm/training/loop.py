"""The training loop, from a configuration to a LoRA folder."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..cards import DEFAULT_PROMPT
from ..distillation.adversarial import AdversarialStep, RealPairs
from ..distillation.discriminator.penalty import PenaltyWeight
from ..distillation.draws import Coins, StepDraws, draw_adversarial, draw_step
from ..distillation.motion import update_ema
from ..distillation.trajectory import TIMESTEPS, neighbours, pick_frames
from ..files import atomic_files
from ..lora import LoRA, lora_state_dict
from .acceleration import build_accelerator, told_by_one, with_accelerate_settings
from .batches import Batch, Batches, build_batches, open_data, told_skipped
from .checkpoint import RunRecord, find_checkpoint, go_on, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .defaults import with_base_defaults
from .disk import room_for, size_of
from .networks import CachedTextEncoder, build_networks, teacher_index
from .output import prepare_push, push_to_hub, unusable, write_lora_folder
from .resuming import check_data, check_identity, check_same_everywhere, circumstances, identity, told_changes
from .tracking import LossLog, PictureLog, check_finite, saved_in
from .trained_module import TrainedModule, slow_learning
from .validation import NonFiniteSample, sample_clip, write_validation

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
        self.config = config = with_base_defaults(config, teacher_index(config)[0])
        with room_for("the tracker's log", self.output_dir):
            plain = {key: v if isinstance(v, int | float | str) else str(v) for key, v in config.to_dict().items()}
            self.accelerator.init_trackers("mcm", config=plain)
        self.networks = build_networks(config, self.device)
        self.total_batch = config.train_batch_size * config.accumulation * self.accelerator.num_processes
        rates = config.learning_rates(self.total_batch)
        run = (config, self.accelerator)
        self.student = TrainedModule("student", self.networks.student, rates[0], *run, config.ema_decay)
        self.discriminator = None
        if self.networks.discriminator is not None:
            self.discriminator = TrainedModule("discriminator", self.networks.discriminator, rates[1], *run)
        self.trained = [module for module in (self.student, self.discriminator) if module is not None]
        grid = self.networks.student.path.solver_timesteps(config.method.num_solver_steps)
        self.timesteps = TIMESTEPS[config.timesteps](grid)
        with told_by_one(self.accelerator):
            self.data = open_data(config, self.networks.clip_size)
        self.penalty_weight = PenaltyWeight(config.gradient_penalty_weight, config.gradient_penalty_growth)
        self.step, self.seconds = 0, 0.0
        self.last_checkpoint: Path | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.data_sizes: dict[str, Any] = {}
        self.pictures = PictureLog(self.accelerator.trackers)
        self.run = RunRecord(self.output_dir)
        if checkpoint is not None:
            self.resume(checkpoint)
        elif config.resume_from_checkpoint:
            self.warn(f"There is no checkpoint in {self.output_dir} yet: training starts anew.")
        self.accelerator.wait_for_everyone()  # nothing is written before all have read what is there

    # --- the algorithm -----------------------------------------------------------------------------------------------
    def train(self) -> Path:
        """Run to `max_train_steps`, write the LoRA folder and return its path."""
        batches = self.open_batches()
        log = self.open_log()
        progress = dict(total=self.config.max_train_steps, initial=self.step, unit="step", desc="distilling")
        bar = tqdm(**progress, disable=log is None)
        started = time.perf_counter()
        for batch in batches:
            with self.accelerator.accumulate(*(trained.module for trained in self.trained)):
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
        networks, pixels = self.networks, batch.pixels.to(self.device)
        negative = [self.config.negative_prompt or ""] * len(batch.captions)
        text, negative_text = networks.text(batch.captions), networks.text(negative)
        draws = self.draw(batch)
        adversary = self.adversary(batch, draws)
        losses = self.student.module(pixels, text, negative_text, draws, adversary)
        self.accelerator.backward(losses.total)
        self.record(loss=losses.total, consistency=losses.consistency, temporal=losses.temporal)
        if self.discriminator is None or adversary is None:
            return
        with self.accelerator.autocast():
            hinge, penalty, of_changes = adversary.discriminator_loss(self.discriminator.module, losses.generator)
        total = hinge if of_changes is None else hinge + of_changes
        self.accelerator.backward(total if penalty is None else total + self.penalty_weight.value * penalty)
        self.record(adversarial=losses.generator.loss, discriminator=hinge, gradient_penalty=penalty)
        self.record(adversarial_change=losses.generator.change_loss, discriminator_change=of_changes)

    def update(self) -> dict[str, float]:
        """One step of both optimisers, unless something is missing or not finite; the losses of the whole batch."""
        scaler, step = self.accelerator.scaler, self.step + 1
        for trained in self.trained:
            trained.check_gradients(step)
        norms = [trained.clip(self.config.max_grad_norm, scaler) for trained in self.trained]
        losses = self.mean_losses()
        told = {f"{trained.name}_grad_norm": norm.item() for trained, norm in zip(self.trained, norms)}
        # With fp16 an infinite gradient is how the scaler finds its scale: it skips that step by itself.
        samples = range(self.step * self.total_batch, step * self.total_batch)
        check_finite(losses if scaler is not None else losses | told, step, samples, self.last_checkpoint)
        for trained in self.trained:
            trained.count_step(told[f"{trained.name}_grad_norm"], step)
        told |= {f"{trained.name}_learning_rate": trained.rate for trained in self.trained}
        for trained in self.trained:
            trained.update(scaler)
        if scaler is not None:
            scaler.update()
        update_ema(self.networks.student.target_motion, self.networks.student.motion, self.config.motion_ema_decay)
        if self.networks.discriminator is not None:
            self.networks.discriminator.update_spectral_norm()
        if "gradient_penalty" in losses:  # that of all processes: they decide alike on the weight of the next step
            told["gradient_penalty_weight"] = self.penalty_weight.value
            self.penalty_weight.follow(losses["gradient_penalty"], step)
        return losses | told

    # --- its inputs --------------------------------------------------------------------------------------------------
    @property
    def samples_per_coin(self) -> int:
        """How many samples share a coin; with --coin batch, all that processes work on together."""
        together = self.config.train_batch_size * self.accelerator.num_processes
        return together if self.config.coin == "batch" else 1

    def draw(self, batch: Batch) -> StepDraws:
        config, networks = self.config, self.networks
        coins = Coins(config.lambda_real, self.total_batch, self.samples_per_coin)
        ranges = (networks.latent_shape, self.timesteps, networks.guidance_range, config.num_adversarial_frames)
        return draw_step(config.seed, batch.indices, *ranges, coins).to(self.device)

    def adversary(self, batch: Batch, draws: StepDraws) -> AdversarialStep | None:
        """The discriminator with what it compares against; None if there is none."""
        discriminator, encode_text = self.networks.discriminator, self.networks.discriminator_text
        if discriminator is None or encode_text is None or batch.images is None:
            return None
        return AdversarialStep(
            discriminator,
            self.config.method,
            draw_adversarial(self.config.seed, batch.indices, self.config.num_adversarial_frames),
            encode_text(batch.fake_texts)["embedding"],
            batch.images.to(self.device),
            encode_text(batch.real_texts)["embedding"],
            self.real_pairs(batch, draws, encode_text) if self.config.lambda_change else None,
        )

    def real_pairs(self, batch: Batch, draws: StepDraws, encode_text: CachedTextEncoder) -> RealPairs:
        """Those frames of the videos that the student's are decoded at, and the ones beside them."""
        clips, count = batch.pixels.to(self.device).transpose(1, 2), batch.pixels.shape[2]  # (B, T, 3, H, W)
        frames = pick_frames(count, draws.frames)
        samples = torch.arange(len(clips), device=self.device)[:, None]
        images, beside = (clips[samples, each].flatten(0, 1) for each in (frames, neighbours(frames, count)))
        captions = [caption for caption in batch.captions for _ in range(frames.shape[1])]
        return RealPairs(images, beside, encode_text(captions)["embedding"])

    def open_batches(self) -> Batches:
        batches = build_batches(self.config, self.data, self.step, self.accelerator)
        sizes = batches.sizes
        check_same_everywhere(gather_object([sizes]))
        if self.last_checkpoint is not None:
            check_data(self.data_sizes, sizes, self.last_checkpoint, batches.skipped)
        self.data_sizes = sizes
        return batches

    # --- what it tells -----------------------------------------------------------------------------------------------
    def record(self, **losses: torch.Tensor | None) -> None:
        """Add one micro-batch's losses to the step's means."""
        share = 1 / self.config.accumulation
        for name, value in losses.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + share * value.detach().float()

    def mean_losses(self) -> dict[str, float]:
        """The step's losses over all processes; the sums start anew."""
        names, values = list(self.sums), torch.stack(list(self.sums.values()))
        self.sums = {}
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist()))

    def open_log(self) -> LossLog | None:
        """The log of the losses, in the main process; what there is to say of the run is said there."""
        if not self.accelerator.is_main_process:
            return None
        with room_for("the run's log", self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.run.write()
            log = LossLog(self.output_dir, self.step)
        summary = self.networks.summary()
        logger.info("%s; total batch %d; precision %s", summary, self.total_batch, self.config.precision)
        self.warn(slow_learning(self.student, self.config, self.total_batch))
        if self.discriminator is not None:
            logger.info("Text beside real images: %s (%s).", self.data.image_text.choice, self.data.image_text.reason)
            self.warn(self.data.image_text.warning)
        return log

    def warn(self, message: str | None) -> None:
        """Log a message, if there is one, once for all processes."""
        if message is not None and self.accelerator.is_main_process:
            logger.warning(message)

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
            prompts = self.config.validation_prompts
            clips = {prompt: self.clip_or_error(prompt, index) for index, prompt in enumerate(prompts)}
            if any(clip is not None for clip in clips.values()):
                folder = self.output_dir / "validation" / f"step-{self.step:06d}"
                picture = write_validation(folder, clips, self.config.fps or self.networks.base_model.fps)
                with room_for("the tracker's pictures", self.output_dir):
                    self.pictures.write("validation", picture, self.step)
        self.accelerator.wait_for_everyone()

    def clip_or_error(self, prompt: str, index: int = 0) -> np.ndarray | None:
        """`clip`, or an error in the log if it is not finite: the losses are, so the run goes on and loses nothing."""
        try:
            return self.clip(prompt, index)
        except NonFiniteSample as error:
            goes_on = f"The losses of the training are finite, so it is not stopped. {saved_in(self.last_checkpoint)}"
            logger.error("The student of step %d makes no clip of %r: %s %s", self.step, prompt, error, goes_on)
            return None

    def clip(self, prompt: str, index: int = 0) -> np.ndarray:
        """A clip of the student as it is, (T, H, W, 3) uint8."""
        with self.accelerator.autocast(), self.student.averaged():
            return sample_clip(self.networks, self.config, prompt, index)

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when this run is resumed."""
        text = self.data.image_text.choice
        return identity(self.config, self.networks, self.total_batch, self.samples_per_coin, text)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint keeps, from which `resume` goes on bit for bit."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds,
            "run": self.run.id,
            "identity": json.dumps(self.identity()),
            "circumstances": json.dumps(circumstances(self.config, self.output_dir)),
            "data_sizes": self.data_sizes,
            **self.networks.state_dict(),
            "parts": {trained.name: trained.state() for trained in self.trained},
            "average": None if self.student.average is None else self.student.average.state_dict(),
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
            "image_text": self.data.image_text.choice,
        }
        with self.student.averaged():
            return write_lora_folder(folder, self.config, self.networks, progress, sample, relative_to)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        state = load_checkpoint(folder)
        check_identity(state["identity"], self.identity(), folder)
        self.run = go_on(self.output_dir, folder, state.get("run"))
        if state["step"] > self.config.max_train_steps:
            raise ValueError(
                f"{folder} is of step {state['step']}, beyond --max_train_steps {self.config.max_train_steps}."
            )
        self.warn(self.run.told_others(folder))
        if then := state.get("circumstances"):
            self.warn(told_changes(json.loads(then), circumstances(self.config, self.output_dir), folder))
        self.data_sizes = state.get("data_sizes", {})
        self.step, self.seconds, self.last_checkpoint = state["step"], state["seconds"], folder
        self.networks.load_state_dict(state)
        for trained in self.trained:
            trained.load(state["parts"][trained.name])
        self.student.load_average(state.get("average"))
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
                f" {self.config.accumulation} micro-batches here and over"
                f" {self.accelerator.gradient_accumulation_steps} for accelerate."
            )
        for trained in self.trained:
            trained.check_learnt()

    def finish(self, unread: list[str]) -> None:
        """Write the LoRA folder, and publish it if that is asked for; `unread` are this process's unusable items."""
        config = self.config
        skipped = set(gather_object(unread))  # each process read other samples
        prompts = config.validation_prompts or ((DEFAULT_PROMPT,) if config.push_to_hub else ())
        clip = None
        if self.accelerator.is_main_process:
            clip = self.clip_or_error(prompts[0]) if prompts else None
            sample = None if clip is None else (prompts[0], clip)
            with (
                room_for("the LoRA", self.output_dir, size_of(lora_state_dict(self.networks.student.denoiser))),
                atomic_files(self.output_dir, last="pytorch_lora_weights.safetensors") as folder,
            ):
                lora = self.write_folder(folder, sample, relative_to=self.output_dir)
            self.warn(told_skipped(skipped))
            logger.info("The LoRA is in %s", self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if prompts and clip is None and self.accelerator.is_main_process:
            raise NonFiniteSample(unusable(config, prompts[0]))
        if config.push_to_hub and self.accelerator.is_main_process:
            logger.info("Published: %s", push_to_hub(config, lora))


def train(config: TrainingConfig) -> Path:
    """Distil as the configuration says; returns the folder with the LoRA."""
    return Trainer(config).train()
