#!/usr/bin/env python
"""Distil a text-to-video diffusion model into a motion consistency LoRA.

    accelerate launch examples/train_mcm_distill.py \
        --pretrained_teacher_model ali-vilab/text-to-video-ms-1.7b --video_data path/to/videos \
        --image_data path/to/images --output_dir mcm-lora --gradient_accumulation_steps 128 --mixed_precision fp16

Every flag is described by --help; `examples/recipes` has whole commands for two base models.
"""

import logging
import shlex

from diffusers_mcm.training.arguments import give_up, parse_config, to_go_on


def main() -> None:
    config = parse_config()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    from diffusers_mcm.files import DiskFullError
    from diffusers_mcm.publish import PublishError
    from diffusers_mcm.training.loop import Trainer  # after the flags, so that --help answers at once
    from diffusers_mcm.training.stopping import Stopped, command_line
    from diffusers_mcm.training.validation import NonFiniteSample

    try:
        trainer = Trainer(config)
    except (ValueError, OSError, ImportError) as error:  # a flag, a path, a file that is not what it should be
        give_up(f"error: {error}")
    except KeyboardInterrupt:
        give_up("Stopped before the first step.", 130)
    try:
        trainer.train()
    except Stopped as stopped:
        command = shlex.join(to_go_on(command_line(), stopped.checkpoint)) if stopped.checkpoint else ""
        give_up(f"{stopped} Go on with: {command}" if str(stopped) and command else str(stopped), stopped.exit_code)
    except (PublishError, DiskFullError, NonFiniteSample) as error:
        give_up(f"error: {error}")


if __name__ == "__main__":
    main()
