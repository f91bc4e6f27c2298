#!/usr/bin/env python
"""Distil a text-to-video diffusion model into a motion consistency LoRA.

    accelerate launch examples/train_mcm_distill.py \
        --pretrained_teacher_model ali-vilab/text-to-video-ms-1.7b --video_data path/to/videos \
        --image_data path/to/images --output_dir mcm-lora --gradient_accumulation_steps 128 --mixed_precision fp16

Every flag is described by --help; `examples/recipes` has whole commands for two base models.
"""

import logging

from diffusers_mcm.training.arguments import parse_config


def main() -> None:
    config = parse_config()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    from diffusers_mcm.files import DiskFullError
    from diffusers_mcm.publish import PublishError
    from diffusers_mcm.training.loop import train  # after the flags, so that --help answers at once
    from diffusers_mcm.training.validation import NonFiniteSample

    try:
        train(config)
    except (PublishError, DiskFullError, NonFiniteSample) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
