"""The training loop, from a configuration to a LoRA folder."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.contrib.logging import logging_redirect_tqdm

from ..cards import DEFAULT_PROMPT
from ..data import to_unit_range
from ..data.loading import worker_deaths_told
from ..distillation.adversarial import AdversarialStep, RealPairs
from ..distillation.clips import EncodedClips
from ..distillation.draws import StepDraws, draw_adversarial, draw_step
from ..distillation.motion import update_ema
from ..distillation.trajectory import neighbours, pick_frames
from ..files import atomic_files
from ..lora import LoRA, lora_state_dict
from .batches import Batch, told_skipped
from .config import TrainingConfig
from .disk import room_for, size_of
from .output import push_command, push_to_hub, unusable
from .progress import Clock, Lap, ProgressBar
from .run import Run
from .stopping import Stopped
from .text import EncodeTexts
from .tracking import LossLog, check_finite, saved_in
from .trained_module import slow_learning
from .validation import NonFiniteSample, sample_clip, write_validation
from .waiting import Waiting

logger = logging.getLogger(__name__)


class Trainer(Run):
    """A run: `Trainer(config).train()`."""

    def __init__(self, config: TrainingConfig):
        super().__init__(config)
        self.sums: dict[str, torch.Tensor] = {}  # the losses of a step that is not finished
        self.waiting = Waiting(self.batches.videos.num_workers, tells=self.accelerator.is_local_main_process)
        self.settled, self.stopping = True, False  # whether all that is trained is of `step`; whether all are to stop
        self.untold: set[str] = set()  # what there was no room for

    # --- the algorithm -----------------------------------------------------------------------------------------------
    def train(self) -> Path:
        """Run to `max_train_steps`, write the LoRA folder and return its path.

        SIGTERM, SIGINT and SIGHUP end it after the step with a checkpoint and `Stopped`, on all processes. A process
        that loads data and dies ends it with `WorkerDied`.
        """
        try:
            with worker_deaths_told(), self.requests:
                lora = self.finish(self.make_steps())
        except Exception as error:
            if self.settled and self.accelerator.is_main_process:
                self.keeper.rescue(self.step, error)
            raise
        if self.config.push_to_hub and lora is not None:
            if self.requests.received:
                told = f"The LoRA is in {self.output_dir}, not published; that would be: {push_command(self.config)}"
                raise Stopped(told, self.requests.received)
            logger.info("Published: %s", push_to_hub(self.config, lora))
        return self.output_dir

    def make_steps(self) -> list[str]:
        """Train; returns the names of the items of the data that were of no use to this process."""
        log, clock = self.open_log(), Clock()
        self.agree_to_stop()
        self.stop_if_told()
        steps = (self.step, self.config.max_train_steps, self.total_batch)
        with logging_redirect_tqdm(), ProgressBar(*steps, self.device, log is not None) as bar:
            for batch in clock.waiting(self.waiting.watch(self.batches)):
                with self.accelerator.accumulate(*(trained.module for trained in self.trained)):
                    self.backward(batch)
                    if not self.accelerator.sync_gradients:
                        self.save_in_a_hurry()
                        continue
                    losses = self.update()
                lap = clock.lap()
                self.seconds += lap.seconds
                self.report(losses, log, bar, lap)
                self.save_and_validate()
                self.stop_if_told()
        self.check_all_steps_made()
        return self.batches.skipped

    def backward(self, batch: Batch) -> None:
        """Gradients of one micro-batch: the student's and motion head's, then the discriminator's."""
        networks, clips = self.networks, self.clips(batch)
        negative = [self.config.negative_prompt or ""] * len(batch.captions)
        text, negative_text = networks.text(batch.captions), networks.text(negative)
        draws = self.draw(batch)
        adversary = self.adversary(batch, draws)
        losses = self.student.module(clips, text, negative_text, draws, adversary)
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
        check_finite(losses if scaler is not None else losses | told, step, samples, self.keeper.newest)
        for trained in self.trained:
            trained.count_step(told[f"{trained.name}_grad_norm"], step)
        told |= {f"{trained.name}_learning_rate": trained.rate for trained in self.trained}
        self.settled = False
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
        self.step, self.settled = step, True
        return losses | told

    # --- its inputs --------------------------------------------------------------------------------------------------
    def clips(self, batch: Batch) -> torch.Tensor | EncodedClips:
        """The clips on the device, pixels in [-1, 1]."""
        if isinstance(batch.pixels, EncodedClips):
            return batch.pixels.to(self.device)
        return to_unit_range(batch.pixels.to(self.device, non_blocking=True))

    def draw(self, batch: Batch) -> StepDraws:
        config, networks = self.config, self.networks
        ranges = (networks.latent_shape, self.timesteps, networks.guidance_range, config.num_adversarial_frames)
        return draw_step(config.seed, batch.indices, *ranges, self.coins).to(self.device)

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
            to_unit_range(batch.images.to(self.device, non_blocking=True)),
            encode_text(batch.real_texts)["embedding"],
            self.real_pairs(batch, draws, encode_text) if self.config.lambda_change else None,
        )

    def real_pairs(self, batch: Batch, draws: StepDraws, encode_text: EncodeTexts) -> RealPairs:
        """Those frames of the videos that the student's are decoded at, and the ones beside them."""
        clips = to_unit_range(batch.pixels.to(self.device)).transpose(1, 2)  # (B, T, 3, H, W)
        count = clips.shape[1]
        frames = pick_frames(count, draws.frames)
        samples = torch.arange(len(clips), device=self.device)[:, None]
        images, beside = (clips[samples, each].flatten(0, 1) for each in (frames, neighbours(frames, count)))
        captions = [caption for caption in batch.captions for _ in range(frames.shape[1])]
        return RealPairs(images, beside, encode_text(captions)["embedding"])

    # --- what it tells -----------------------------------------------------------------------------------------------
    def record(self, **losses: torch.Tensor | None) -> None:
        """Add one micro-batch's losses to the step's means."""
        share = 1 / self.config.accumulation
        for name, value in losses.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + share * value.detach().float()

    def mean_losses(self) -> dict[str, float]:
        """The step's losses over all processes; the sums start anew. With them goes whether one is told to stop."""
        told = torch.tensor(float(self.requests.received > 0), device=self.device)
        names, values = list(self.sums), torch.stack([told, *self.sums.values()])
        self.sums = {}
        stopping, *losses = self.accelerator.reduce(values, "mean").tolist()
        self.stopping = stopping > 0
        return dict(zip(names, losses))

    def agree_to_stop(self) -> None:
        """Wait for all processes; whether one of them is told to stop is then known to all."""
        told = torch.tensor(float(self.requests.received > 0), device=self.device)
        self.stopping = self.accelerator.reduce(told, "mean").item() > 0

    def open_log(self) -> LossLog | None:
        """The log of the losses, in the main process; what there is to say of the run is said there."""
        if not self.accelerator.is_main_process:
            return None
        with room_for("the run's log", self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.keeper.run.write()
            log = LossLog(self.output_dir, self.step)
        summary = self.networks.summary()
        logger.info("%s; total batch %d; precision %s", summary, self.total_batch, self.config.precision)
        logger.info(self.told_room)
        self.warn(slow_learning(self.student, self.config, self.total_batch))
        if self.discriminator is not None:
            logger.info("Text beside real images: %s (%s).", self.data.image_text.choice, self.data.image_text.reason)
            self.warn(self.data.image_text.warning)
        return log

    def report(self, losses: dict[str, float], log: LossLog | None, bar: ProgressBar, lap: Lap) -> None:
        """Tell of a step that was made; what cannot be told for want of room or of a reader ends no run."""
        if log is None:
            return
        bar.show(losses, lap)
        if self.step % self.config.logging_steps == 0 or self.step == self.config.max_train_steps or self.stopping:
            row = {"step": self.step, **losses, "seconds": round(self.seconds, 3), "waiting": round(lap.share, 3)}
            with self.going_on_without("the run's log"):
                log.write(row)
                self.accelerator.log(losses, step=self.step)

    # --- what it writes ----------------------------------------------------------------------------------------------
    @contextmanager
    def going_on_without(self, what: str) -> Iterator[None]:
        """What cannot be written is told once in the log, and ends no run."""
        try:
            with room_for(what, self.output_dir):
                yield
        except OSError as error:
            if what not in self.untold:
                logger.error("The training goes on, but %s could not be written: %s", what, error)
            self.untold.add(what)

    def save(self) -> None:
        """Write a checkpoint; if that fails the log says so, and the training goes on."""
        if self.accelerator.is_main_process:
            self.keeper.try_to_save(self.step)
        self.accelerator.wait_for_everyone()

    def save_in_a_hurry(self) -> None:
        """Keep the step before, in the midst of one that may not be finished before the process is killed."""
        if self.requests.received and self.accelerator.is_main_process:
            self.keeper.try_to_save(self.step)

    def save_and_validate(self) -> None:
        config, last = self.config, self.step == self.config.max_train_steps
        if config.checkpointing_steps and (last or self.step % config.checkpointing_steps == 0):
            self.save()
        if config.validation_prompts and not self.stopping and (last or self.step % config.validation_steps == 0):
            self.validate()

    def stop_if_told(self) -> None:
        """End the run where one process was told to, unless all steps are made: the LoRA is written then."""
        if not self.stopping or self.step == self.config.max_train_steps:
            return
        kept = self.keeper.save_anywhere(self.step) if self.accelerator.is_main_process else ""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        number = self.requests.received or signal.SIGTERM
        told = f"Stopped by {signal.Signals(number).name} after step {self.step}. {kept}" if kept else ""
        raise Stopped(told, number, self.keeper.to_resume)

    @property
    def samples(self) -> bool:
        """Whether this process samples clips: the main one does, and all do where they share the denoiser."""
        return self.accelerator.is_main_process or self.config.fsdp

    def validate(self) -> None:
        prompts = self.config.validation_prompts if self.samples else ()
        clips = [(prompt, self.clip_or_error(prompt, index)) for index, prompt in enumerate(prompts)]
        if self.accelerator.is_main_process:
            if any(clip is not None for _, clip in clips):
                folder = self.output_dir / "validation" / f"step-{self.step:06d}"
                with self.going_on_without("the validation clips"):
                    picture = write_validation(
                        folder, clips, self.config.fps or self.networks.pipeline.sampling_default("fps")
                    )
                    self.pictures.write("validation", picture, self.step)
        self.agree_to_stop()

    def clip_or_error(self, prompt: str, index: int = 0) -> np.ndarray | None:
        """`clip`, or an error in the log if it is not finite: the losses are, so the run goes on and loses nothing."""
        try:
            return self.clip(prompt, index)
        except NonFiniteSample as error:
            goes_on = f"The losses of the training are finite, so it is not stopped. {saved_in(self.keeper.newest)}"
            logger.error("The student of step %d makes no clip of %r: %s %s", self.step, prompt, error, goes_on)
            return None

    def clip(self, prompt: str, index: int = 0) -> np.ndarray:
        """A clip of the student as it is, (T, H, W, 3) uint8."""
        with self.accelerator.autocast(), self.student.averaged():
            return sample_clip(self.networks, self.config, prompt, index)

    def check_all_steps_made(self) -> None:
        if self.step != self.config.max_train_steps:
            raise RuntimeError(
                f"{self.step} of {self.config.max_train_steps} steps were made when the data came to an end, so no"
                f" LoRA is written. Accumulation is over {self.config.accumulation} micro-batches here and over"
                f" {self.accelerator.gradient_accumulation_steps} for accelerate."
            )
        for trained in self.trained:
            trained.check_learnt()

    def finish(self, unread: list[str]) -> LoRA | None:
        """Write the LoRA folder; `unread` are this process's unusable items. The LoRA, in the main process."""
        skipped = set(gather_object(unread))  # each process read other samples
        prompts, lora = self.config.validation_prompts, None
        prompts = prompts or ((DEFAULT_PROMPT,) if self.config.push_to_hub else ())
        clip = None
        if self.samples:
            clip = self.clip_or_error(prompts[0]) if prompts else None
        if self.accelerator.is_main_process:
            lora = self.write_lora(None if clip is None else (prompts[0], clip))
            self.warn(told_skipped(skipped))
            logger.info("The LoRA is in %s", self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if prompts and clip is None and self.accelerator.is_main_process:
            raise NonFiniteSample(unusable(self.config, prompts[0]))
        return lora

    def write_lora(self, sample: tuple[str, np.ndarray] | None) -> LoRA:
        """Write the LoRA with a prompt and its clip; where that fails all that was trained is kept in a checkpoint."""
        size = size_of(lora_state_dict(self.networks.student.denoiser))
        last = "pytorch_lora_weights.safetensors"
        try:
            with (
                room_for("the LoRA", self.output_dir, size),
                atomic_files(self.output_dir, last, synced=True) as folder,
            ):
                return self.write_folder(folder, sample, relative_to=self.output_dir)
        except OSError as error:
            raise self.keeper.unwritten("the LoRA", self.step, error) from error


def train(config: TrainingConfig) -> Path:
    """Distil as the configuration says; returns the folder with the LoRA."""
    return Trainer(config).train()
