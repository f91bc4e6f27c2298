"""What a run is made of, in the order in which wrong flags are found; and its state, as checkpoints keep it."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..distillation.discriminator.penalty import PenaltyWeight
from ..distillation.draws import Coins
from ..distillation.trajectory import TIMESTEPS
from ..files import check_takes_files
from ..lora import LoRA
from .acceleration import build_accelerator, told_by_one, with_accelerate_settings
from .batches import Batches, build_batches, check_usable, open_data
from .caching import CachedVideos
from .checkpoint import clear_up, open_checkpoint
from .config import TrainingConfig
from .defaults import with_base_defaults
from .disk import room_for, size_of
from .encoding import fill_cache
from .keeping import Keeper, check_room
from .networks import build_networks, teacher_index
from .output import prepare_push, write_lora_folder
from .resuming import check_data, check_identity, check_same_everywhere, circumstances, identity, told_changes
from .sharding import shard_frozen
from .sources import check_sources, planned_clip_size
from .stopping import StopRequests
from .tracking import PictureLog
from .trained_module import TrainedModule

logger = logging.getLogger(__name__)


class Run:
    """All that takes part in a run, and its state."""

    def __init__(self, config: TrainingConfig):
        self.config = config = with_accelerate_settings(config)
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        self.total_batch = config.train_batch_size * config.accumulation * self.accelerator.num_processes
        self.step, self.seconds = 0, 0.0
        self.requests = StopRequests(tell=self.accelerator.is_main_process)
        self.keeper = Keeper(config, self.state, self.write_folder)
        checkpoint = self.open_checkpoint()
        self.open_inputs()
        if checkpoint is not None:
            self.go_on(*checkpoint)
        self.batches = self.open_batches(checkpoint)
        self.open_trackers()
        self.open_networks()
        if checkpoint is not None:
            self.load(*checkpoint)
        self.told_room = self.check_room()
        self.accelerator.wait_for_everyone()  # nothing is written before all have read what is there

    # --- its parts, those first that a wrong flag makes fail ---------------------------------------------------------
    def open_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, and its state."""
        check_takes_files(self.output_dir, "--output_dir")
        if self.accelerator.is_main_process:
            clear_up(self.output_dir)
        self.accelerator.wait_for_everyone()
        with told_by_one(self.accelerator):
            found = open_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if found is None and self.config.resume_from_checkpoint:
            self.warn(f"There is no checkpoint in {self.output_dir} yet: training starts anew.")
        check_same_everywhere(gather_object([{"checkpoint to go on from": None if found is None else found[0].name}]))
        return found

    def open_inputs(self) -> None:
        """What the run reads; no network is loaded yet."""
        config = self.config
        if config.push_to_hub and self.accelerator.is_main_process:
            prepare_push(config)
        self.base, index = teacher_index(config)
        self.config = config = with_base_defaults(config, self.base, index)
        check_sources(config, remote=False)
        self.clip_size = planned_clip_size(config)
        self.coins = Coins(config.lambda_real, self.total_batch, self.samples_per_coin)
        # One process of a machine after the other: what the first one finds in tars, it keeps for the others.
        with told_by_one(self.accelerator), self.accelerator.local_main_process_first():
            self.data = open_data(config, self.clip_size, self.coins)
        check_sources(config, remote=True)
        self.cache = None
        if config.cache_latents is not None:
            samples = self.total_batch * config.max_train_steps
            self.cache = fill_cache(config, self.base, index, self.data, self.accelerator, samples)

    def go_on(self, folder: Path, state: dict[str, Any]) -> None:
        """Begin where a checkpoint ends, which must be of this run."""
        check_identity(state["identity"], self.identity(), folder)
        self.keeper.go_on(folder, state, self.config.max_train_steps)
        self.warn(self.keeper.run.told_others(folder))
        if then := state.get("circumstances"):
            self.warn(told_changes(json.loads(then), circumstances(self.config, self.output_dir), folder))
        self.step, self.seconds = state["step"], state["seconds"]

    def open_batches(self, checkpoint: tuple[Path, dict[str, Any]] | None) -> Batches:
        """The batches that are still to be trained on, of the same data as before and in all processes."""
        encoded = None if self.cache is None else CachedVideos(self.data.videos, self.cache.clips)
        if encoded is None:
            check_usable(self.data, self.step * self.total_batch)
        batches = build_batches(self.config, self.data, self.step, self.accelerator, encoded)
        sizes = batches.sizes
        check_same_everywhere(gather_object([sizes]))
        if checkpoint is not None:
            check_data(checkpoint[1].get("data_sizes", {}), sizes, checkpoint[0], batches.skipped)
        return batches

    def open_trackers(self) -> None:
        """Where the run reports to."""
        values = self.config.to_dict()
        with room_for("the tracker's log", self.output_dir):
            plain = {key: v if isinstance(v, int | float | str) else str(v) for key, v in values.items()}
            self.accelerator.init_trackers("mcm", config=plain)
        self.pictures = PictureLog(self.accelerator.trackers)

    def open_networks(self) -> None:
        """What the run computes with."""
        config = self.config
        self.networks = build_networks(config, self.device, self.cache)
        if config.fsdp:
            shard_frozen(self.networks.student, self.accelerator)
        rates = config.learning_rates(self.total_batch)
        run = (config, self.accelerator)
        self.student = TrainedModule("student", self.networks.student, rates[0], *run, config.ema_decay)
        self.discriminator = None
        if self.networks.discriminator is not None:
            self.discriminator = TrainedModule("discriminator", self.networks.discriminator, rates[1], *run)
        self.trained = [module for module in (self.student, self.discriminator) if module is not None]
        self.timesteps = TIMESTEPS[config.timesteps](self.networks.student.path, config.method.num_solver_steps)
        self.penalty_weight = PenaltyWeight(config.gradient_penalty_weight, config.gradient_penalty_growth)

    def check_room(self) -> str:
        """What the run will take of the disk, told; ValueError if it is not there."""
        state, steps = self.state(), self.config.max_train_steps - self.step
        moments = 2 * sum(size_of(trained.parameters) for trained in self.trained if not trained.optimizer.state)
        lora = size_of(state["lora"])
        return check_room(self.config, size_of(state) + moments + lora, lora, steps)

    # --- its state ---------------------------------------------------------------------------------------------------
    @property
    def samples_per_coin(self) -> int:
        """How many samples share a coin; with --coin batch, all that processes work on together."""
        together = self.config.train_batch_size * self.accelerator.num_processes
        return together if self.config.coin == "batch" else 1

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when this run is resumed."""
        text = self.data.image_text.choice
        return identity(self.config, self.base, self.clip_size, self.total_batch, self.samples_per_coin, text)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint keeps, from which a run goes on bit for bit."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds,
            "run": self.keeper.run.id,
            "identity": json.dumps(self.identity()),
            "circumstances": json.dumps(circumstances(self.config, self.output_dir)),
            "data_sizes": self.batches.sizes,
            **self.networks.state_dict(),
            "parts": {trained.name: trained.state() for trained in self.trained},
            "average": None if self.student.average is None else self.student.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "penalty_weight": self.penalty_weight.state_dict(),
        }

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

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Take all that is trained from a checkpoint."""
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

    def warn(self, message: str | None) -> None:
        """Log a message, if there is one, once for all processes."""
        if message is not None and self.accelerator.is_main_process:
            logger.warning(message)
