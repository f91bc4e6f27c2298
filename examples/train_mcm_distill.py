#!/usr/bin/env python
"""Distil a text-to-video diffusion model into a motion consistency LoRA.

    accelerate launch examples/train_mcm_distill.py \
        --pretrained_teacher_model ali-vilab/text-to-video-ms-1.7b --video_data path/to/videos \
        --image_data path/to/images --output_dir mcm-lora --gradient_accumulation_steps 128 --mixed_precision fp16

Every flag is described by --help; `examples/recipes` has whole commands for the base models, `examples/accelerate`
configurations for one GPU, eight, two machines and FSDP. Ctrl-C, SIGTERM and SIGHUP stop it after the step, with a
checkpoint and the command that goes on.
"""

import logging
import shlex

from diffusers_mcm.commands.startup import quick_imports, quiet_libraries
from diffusers_mcm.training.arguments import give_up, parse_config, to_go_on
from diffusers_mcm.training.config import TrainingConfig


def main() -> None:
    with quiet_libraries(verbose=True):  # which loads none, and tells a warning in one line
        config = parse_config()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    with quiet_libraries():
        train(config)


def train(config: TrainingConfig) -> None:
    """Train; an error that the user can mend ends the process with a line, and so does a signal."""
    with quick_imports():  # after the flags, so that --help answers at once
        from diffusers_mcm.data.faults import MachineError
        from diffusers_mcm.data.loading import WorkerDied
        from diffusers_mcm.files import DiskFullError
        from diffusers_mcm.publish import PublishError
        from diffusers_mcm.training.loop import Trainer
        from diffusers_mcm.training.stopping import Stopped, command_line
        from diffusers_mcm.training.validation import NonFiniteSample

    try:
        trainer = Trainer(config)
    except (ValueError, OSError, ImportError) as error:  # a flag, a path, a file that is not what it should be
        give_up(f"error: {error}")
    except KeyboardInterrupt:
        give_up("Stopped before the first step.", 130)
    begun_by = command_line()  # now: a launcher may be gone when the run ends
    try:
        trainer.train()
    except Stopped as stopped:
        command = shlex.join(to_go_on(begun_by, stopped.checkpoint)) if stopped.checkpoint else ""
        give_up(f"{stopped} Go on with: {command}" if str(stopped) and command else str(stopped), stopped.exit_code)
    except (PublishError, DiskFullError, NonFiniteSample, MachineError, WorkerDied) as error:
        give_up(f"error: {error}")


if __name__ == "__main__":
    main()
