"""What a run keeps: checkpoints on their turn, when it is stopped and when it fails, and the room that they take."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..wording import readable
from .checkpoint import RunRecord, go_on, save_checkpoint
from .config import TrainingConfig
from .disk import room_for, told_room
from .stopping import Stopped
from .tracking import NonFiniteLoss, saved_in
from .trained_module import MissingGradient, SkippedSteps
from .validation import NonFiniteSample

logger = logging.getLogger(__name__)
# A run that goes on from such a step fails at it again: the checkpoints before it are worth more than one of it.
_FAILS_AGAIN = (NonFiniteLoss, MissingGradient, SkippedSteps)
_IS_KEPT = (Stopped, NonFiniteSample)  # which come when all is written


class Keeper:
    """The checkpoints of a run, which its main process writes.

    `state` gives all that a checkpoint keeps, and `write_more` puts the LoRA folder beside it.
    """

    def __init__(
        self, config: TrainingConfig, state: Callable[[], dict[str, Any]], write_more: Callable[[Path], object]
    ):
        self.output_dir, self.limit = Path(config.output_dir), config.checkpoints_total_limit
        self.state, self.write_more = state, write_more
        self.run = RunRecord(self.output_dir)
        self.newest: Path | None = None
        self.kept_step = 0  # the step whose state is in `newest`, or that of a run which has made none

    @property
    def to_resume(self) -> str:
        """What `--resume_from_checkpoint` takes to go on from the newest checkpoint."""
        inside = self.newest is None or self.newest.parent == self.output_dir
        return "latest" if inside else str(self.newest)

    def save(self, step: int) -> None:
        """Write a checkpoint; an OSError if that fails, and then nothing is lost of what there was."""
        folder = self.output_dir / f"checkpoint-{step}"
        # First, or a run that is killed in between would not know its checkpoint. One that is replaced is not its own.
        known = not folder.exists()
        if known:
            self.record(folder)
        save_checkpoint(self.output_dir, step, self.state(), self.write_more)
        self.newest, self.kept_step = folder, step
        if not known:
            self.record(folder)
        if self.limit:
            self.run.drop_beyond(self.limit)

    def record(self, folder: Path) -> None:
        with room_for("the run's record", self.output_dir):
            self.run.add(folder)

    def go_on(self, folder: Path, state: dict[str, Any], num_steps: int) -> None:
        """Take up the run of a checkpoint; ValueError if it is of another one than that in the output folder."""
        if state["step"] > num_steps:
            raise ValueError(f"{folder} is of step {state['step']}, beyond --max_train_steps {num_steps}.")
        self.run = go_on(self.output_dir, folder, state.get("run"))
        self.newest, self.kept_step = folder, state["step"]

    def try_to_save(self, step: int) -> bool:
        """Write a checkpoint if there is none of this step yet; where that fails the log says so, and that is all.

        Returns whether there is one now.
        """
        if step == self.kept_step:
            return True
        try:
            self.save(step)
        except OSError as error:
            logger.error("No checkpoint of step %d was written: %s. %s", step, error, saved_in(self.newest))
        return step == self.kept_step

    def save_anywhere(self, step: int) -> str:
        """A checkpoint of a run that ends, in the folder for temporary files if there is no room in its own.

        Returns a sentence that says where it is.
        """
        if self.try_to_save(step):
            return f"The state of step {step} is in {self.newest}." if step else "There is nothing to keep."
        try:
            folder = Path(tempfile.mkdtemp(prefix="mcm-"))
            self.newest, self.kept_step = save_checkpoint(folder, step, self.state(), self.write_more), step
        except OSError as error:
            return f"The state of step {step} could not be kept ({error}). {saved_in(self.newest)}"
        return (
            f"The state of step {step} is in {self.newest}, as it could not be written to {self.output_dir}: move it "
            "there."
        )

    def unwritten(self, what: str, step: int, error: OSError) -> OSError:
        """The error to raise where `what` could not be written when all steps were made."""
        told = f"{error.strerror or error}. {self.save_anywhere(step)} Go on from there, and {what} is written again"
        return type(error)(error.errno, told, error.filename)

    def rescue(self, step: int, error: Exception) -> None:
        """Keep the state of the last step that was finished, as the run ends by an error."""
        if isinstance(error, (*_FAILS_AGAIN, *_IS_KEPT)) or step == self.kept_step:
            return
        try:
            logger.error("Training failed after step %d (%s). %s", step, error, self.save_anywhere(step))
        except Exception as second:  # the device may be what failed; the first error is the one to be told
            logger.error("Training failed after step %d, and its state could not be kept: %s", step, second)


def check_room(config: TrainingConfig, checkpoint_size: int, lora_size: int, steps: int) -> str:
    """What a run will take of the disk, in a sentence; ValueError if there is not so much room.

    `checkpoint_size` and `lora_size` are bytes; `steps` are those still to be made.
    """
    folder = Path(config.output_dir)
    count = steps // config.checkpointing_steps if config.checkpointing_steps else 0
    limit = config.checkpoints_total_limit
    kept = min(count, limit) if limit else count
    # A checkpoint is written before the oldest one goes, and a run that is stopped writes one out of turn.
    needed = (kept + 1) * checkpoint_size + lora_size
    there = sum(file.stat().st_size for file in folder.glob("checkpoint-*/*") if file.is_file())
    said = (
        f"{kept + 1} checkpoints of {readable(checkpoint_size)} each and the LoRA take "
        f"up to {readable(needed)} in {folder}"
    )
    instead = "name an --output_dir on another disk, or keep fewer checkpoints (--checkpoints_total_limit)"
    return told_room(said, needed, folder, instead, reused=there)
