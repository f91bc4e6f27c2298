"""The training configuration: one frozen, validated dataclass from which the script's flags are generated."""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

from ..distillation.method import MethodConfig
from ..flags import flag

REFERENCE_BATCH = 128  # the batch for which the paper states its learning rates
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
MIXED_PRECISION = ("no", "fp16", "bf16")
SAVE_DTYPES = ("fp16", "fp32")
# accelerate's trackers, and none.
TRACKERS = (
    *("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"),
    "none",
)
_RECORD_THE_COMMAND_LINE = ("wandb", "comet_ml", "clearml", "swanlab")  # and a secret in it
FRAME_INTERVAL = 8  # the authors' code, for WebVid


# What the discriminator did before there was a flag for it, where that is not what the flag's default says now.
VALUES_BEFORE_FLAGS = {"image_text": "own", "gradient_penalty_growth": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MethodConfig):
    """Everything that decides a distillation run. Defaults are the paper's (ModelScope); saved beside the weights."""

    # -- models
    pretrained_teacher_model: str = flag(
        help="The text-to-video diffusion model to distil: a Hub repository, a local folder or 'mcm-shapes-teacher'. "
        "A Stable Diffusion 1.5 repository, or a fine-tune of it, is distilled as AnimateDiff.",
        group="models",
    )
    base_model: str | None = flag(
        None,
        help="Architecture of the teacher, such as 'modelscope' or 'animatediff'. Default: what its files say.",
        group="models",
    )
    revision: str | None = flag(None, help="Revision of the teacher on the Hub.", group="models")
    variant: str | None = flag(
        None, help="Which files of the teacher's weights to read, as fp16, where there are no others.", group="models"
    )
    extra_repositories: tuple[str, ...] = flag(
        (),
        help="Where parts of the teacher lie that are not in its own repository, as name=repository: for AnimateDiff "
        "motion_adapter=... Default: the base model's.",
        group="models",
        many=True,
    )
    discriminator_features: str = flag(
        "facebook/dinov2-small", help="DINOv2 network whose frozen features the discriminator reads.", group="models"
    )
    discriminator_text: str = flag(
        "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        help="CLIP text model (with projection) that conditions the discriminator.",
        group="models",
    )
    pretrained_lora: str | None = flag(
        None,
        help="An MCM LoRA to start from, a folder or a Hub repository, instead of a fresh one: to give it the looks "
        "of other images, or to go on with other settings. Its motion head is taken too, the discriminator is fresh.",
        group="models",
    )
    pretrained_lora_subfolder: str | None = flag(None, help="Where in --pretrained_lora it is.", group="models")
    lora_rank: int = flag(64, help="Rank of the LoRA that is trained.", group="models")
    lora_alpha: float = flag(64.0, help="Alpha of the LoRA; its scale is alpha / rank.", group="models")

    # -- data
    video_data: str = flag(
        help="Videos with captions: a folder with metadata.csv or .jsonl, such a table of another name, a directory "
        "or glob of WebDataset tars (mp4 + json), or a Hub data set id.",
        group="data",
    )
    image_data: str | None = flag(
        None,
        help="Images that set the looks (captions optional): an ImageFolder, WebDataset tars or a Hub data set id. "
        "Without it the discriminator sees frames of the videos.",
        group="data",
    )
    caption_column: str | None = flag(None, help="Column of the video captions, if not found by itself.", group="data")
    image_caption_column: str | None = flag(
        None, help="Column of the image captions, if not found by itself.", group="data"
    )
    video_column: str | None = flag(
        None, help="Column (in tars: ending) of the video files, if not found by itself.", group="data"
    )
    image_column: str | None = flag(
        None, help="Column (in tars: ending) of the image files, if not found by itself.", group="data"
    )
    num_frames: int | None = flag(None, help="Frames per clip. Default: the base model's.", group="data")
    frame_interval: int | None = flag(
        None,
        help=f"Take every n-th frame; shrinks to fit a short clip. Default: {FRAME_INTERVAL}, without --data_fps.",
        group="data",
    )
    data_fps: float | None = flag(
        None,
        help="Take so many frames per second, by the times at which they are shown, instead of every n-th frame: for "
        "videos of several or of varying frame rates. A short clip is read faster; a slower one repeats frames.",
        group="data",
    )
    height: int | None = flag(None, help="Height of the clips in pixels. Default: the base model's.", group="data")
    width: int | None = flag(None, help="Width of the clips in pixels. Default: the base model's.", group="data")
    dataloader_num_workers: int = flag(
        0, help="Processes that load data, for videos and images each; 0 loads in the main one.", group="data"
    )

    # -- optimisation
    seed: int = flag(0, help="Seed of everything random, data order included.", group="optimisation")
    train_batch_size: int = flag(1, help="Clips per process and micro-batch.", group="optimisation")
    gradient_accumulation_steps: int | None = flag(
        None,
        help="Micro-batches per optimiser step. Default: what accelerate's environment says, "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, else 1.",
        group="optimisation",
    )
    max_train_steps: int = flag(30_000, help="Optimiser steps.", group="optimisation")
    learning_rate: float = flag(
        5e-6, help=f"Rate of LoRA and motion head at a total batch of {REFERENCE_BATCH}.", group="optimisation"
    )
    discriminator_learning_rate: float = flag(
        5e-5, help=f"Rate of the discriminator at a total batch of {REFERENCE_BATCH}.", group="optimisation"
    )
    scale_lr: bool = flag(
        True,
        help=f"Multiply the rates by total batch / {REFERENCE_BATCH}, the discriminator's also by "
        "--num_adversarial_frames. With --no_scale_lr they are used as given.",
        group="optimisation",
    )
    lr_scheduler: str = flag(
        "cosine", help="Learning-rate schedule, for both optimisers.", group="optimisation", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = flag(500, help="Steps over which the rates rise from zero.", group="optimisation")
    adam_beta1: float = flag(0.9, help="AdamW beta 1.", group="optimisation")
    adam_beta2: float = flag(0.999, help="AdamW beta 2.", group="optimisation")
    adam_weight_decay: float = flag(0.0, help="AdamW weight decay.", group="optimisation")
    adam_epsilon: float = flag(1e-8, help="AdamW epsilon.", group="optimisation")
    ema_decay: float = flag(
        0.0,
        help="Decay of a moving average of LoRA and motion head, which is then what is saved and validated: an "
        "adversarial loss keeps weights swinging. 0 saves the last weights.",
        group="optimisation",
    )
    max_grad_norm: float = flag(
        10.0, help="Gradient norm above which gradients are scaled down.", group="optimisation"
    )
    mixed_precision: str | None = flag(
        None,
        help="Precision of the frozen networks and of autocast; what is trained stays in fp32. Default: what "
        "`accelerate launch --mixed_precision` or `accelerate config` says, else 'no'.",
        group="optimisation",
        choices=MIXED_PRECISION,
    )
    gradient_checkpointing: bool = flag(
        False,
        help="Recompute the denoiser's blocks in the backward pass: less memory, more time.",
        group="optimisation",
    )
    fold_lora: bool = flag(
        False,
        help="Add the LoRA to the weights once a step, instead of running it beside each layer: faster where the "
        "network is small, but takes the memory of the weights once more. In fp32 only.",
        group="optimisation",
    )
    allow_tf32: bool = flag(False, help="Allow TF32 matrix products on Ampere GPUs and later.", group="optimisation")

    # -- output
    output_dir: str = flag("mcm-lora", help="Where LoRA, card, checkpoints and logs are written.", group="output")
    save_dtype: str = flag("fp32", help="Type in which the LoRA is saved.", group="output", choices=SAVE_DTYPES)
    checkpointing_steps: int = flag(500, help="Write a checkpoint every so many steps; 0 for none.", group="output")
    checkpoints_total_limit: int | None = flag(
        None, help="Keep only so many checkpoints of the run, the newest ones. Default: all.", group="output"
    )
    resume_from_checkpoint: str | None = flag(
        None,
        help="A checkpoint folder to go on from, or 'latest' for the newest one of the run that wrote into "
        "--output_dir last.",
        group="output",
    )
    logging_steps: int = flag(1, help="Write losses to the log and the tracker every so many steps.", group="output")
    logging_dir: str = flag("logs", help="Folder of the tracker's logs, inside --output_dir.", group="output")
    report_to: str = flag("tensorboard", help="Where losses are sent.", group="output", choices=TRACKERS)
    validation_prompts: tuple[str, ...] = flag(
        (), help="Prompts for validation clips, one argument each.", group="output", many=True
    )
    validation_steps: int = flag(500, help="Sample the validation prompts every so many steps.", group="output")
    num_inference_steps: int = flag(
        4, help="Sampling steps for validation clips, and the default saved with the LoRA.", group="output"
    )
    fps: int = flag(8, help="Frame rate of the validation clips.", group="output")
    license: str | None = flag(None, help="License named in the model card. Default: none is named.", group="output")
    push_to_hub: bool = flag(False, help="Upload the output folder to the Hub when training ends.", group="output")
    hub_model_id: str | None = flag(
        None, help="Repository to push to. Default: the name of --output_dir in your namespace.", group="output"
    )
    hub_token: str | None = flag(
        None, help="Token for the Hub, if not logged in. Never saved.", group="output", secret=True
    )
    hub_private_repo: bool = flag(False, help="Create the repository as a private one.", group="output")
    overwrite_card: bool = flag(
        False, help="Replace a card that was edited on the Hub. Default: it stays.", group="output"
    )

    def __post_init__(self) -> None:
        for name in ("validation_prompts", "extra_repositories", "discriminator_augmentation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.frame_interval is None and self.data_fps is None:
            object.__setattr__(self, "frame_interval", FRAME_INTERVAL)
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)

    def learning_rates(self, total_batch: int) -> tuple[float, float]:
        """Rates of student and discriminator, scaled by the batch unless that is switched off."""
        if not self.scale_lr:
            return self.learning_rate, self.discriminator_learning_rate
        scale = total_batch / REFERENCE_BATCH
        return self.learning_rate * scale, self.discriminator_learning_rate * scale * self.num_adversarial_frames

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; the Hub token is left out."""
        values = dataclasses.asdict(self)
        values.pop("hub_token")
        return _plain(values)


def default_values() -> dict[str, Any]:
    """The defaults of all fields that have one, as `to_dict` gives values."""
    values = {e.name: e.default for e in dataclasses.fields(TrainingConfig) if e.default is not dataclasses.MISSING}
    return _plain(values | {"frame_interval": FRAME_INTERVAL})  # what None stands for


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _check_choices(config: TrainingConfig) -> None:
    for entry in dataclasses.fields(config):
        choices, value = entry.metadata["choices"], getattr(config, entry.name)
        for one in value if entry.metadata["many"] else (value,):
            if choices and one not in choices and not (one is None and entry.default is None):
                raise ValueError(f"--{entry.name} must be one of {', '.join(map(str, choices))}, not {one!r}.")


_POSITIVE = (
    "lora_rank lora_alpha num_frames frame_interval data_fps height width num_adversarial_frames num_solver_steps "
    "timestep_scaling sigma_data huber_c train_batch_size gradient_accumulation_steps max_train_steps learning_rate "
    "discriminator_learning_rate adam_epsilon max_grad_norm checkpoints_total_limit logging_steps validation_steps "
    "num_inference_steps fps"
).split()
_NOT_NEGATIVE = (
    "dataloader_num_workers lambda_adv gradient_penalty_weight guidance_min guidance_max seed lr_warmup_steps "
    "adam_weight_decay checkpointing_steps"
).split()
_AT_LEAST_ONE = ("gradient_penalty_growth",)
_UNIT = "lambda_real motion_ema_decay ema_decay adam_beta1 adam_beta2".split()


def _check_ranges(config: TrainingConfig) -> None:
    for names, holds, wanted in (
        (_POSITIVE, lambda value: value > 0, "greater than 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (_UNIT, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"--{name} must be {wanted}, not {value}.")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        if getattr(config, name) == 1:
            raise ValueError(f"--{name} must be below 1.")
    for name in ("pretrained_teacher_model", "video_data", "output_dir"):
        if not getattr(config, name):
            raise ValueError(f"--{name} must not be empty.")


def _check_combinations(config: TrainingConfig) -> None:
    if (config.guidance_min is None) != (config.guidance_max is None):
        raise ValueError("--guidance_min and --guidance_max belong together: give both or neither.")
    if config.guidance_min is not None and config.guidance_min > config.guidance_max:
        raise ValueError(
            f"--guidance_min must not exceed --guidance_max, but {config.guidance_min} > {config.guidance_max}."
        )
    if config.frame_interval is not None and config.data_fps is not None:
        raise ValueError(
            f"--frame_interval ({config.frame_interval}) takes frames by number, --data_fps ({config.data_fps:g}) by "
            "time: give one of them."
        )
    if config.pretrained_lora_subfolder and not config.pretrained_lora:
        raise ValueError("--pretrained_lora_subfolder has no effect without --pretrained_lora.")
    if config.num_inference_steps > config.num_solver_steps:
        raise ValueError(
            f"--num_inference_steps ({config.num_inference_steps}) must not exceed --num_solver_steps "
            f"({config.num_solver_steps}): sampling takes its timesteps from the solver's grid."
        )
    if config.num_frames is not None:
        if config.adversarial and config.num_adversarial_frames > config.num_frames:
            raise ValueError(
                f"--num_adversarial_frames ({config.num_adversarial_frames}) must not exceed "
                f"--num_frames ({config.num_frames})."
            )
        if config.num_frames < 2 and config.motion in ("diff", "corr"):
            raise ValueError(f"--motion {config.motion} compares consecutive frames: --num_frames must be 2 or more.")
    if config.fold_lora and config.mixed_precision not in (None, "no"):
        raise ValueError(
            f"--fold_lora needs --mixed_precision no: in {config.mixed_precision} most of what a LoRA adds to a weight"
            " would be rounded away."
        )
    if config.fold_lora and config.gradient_checkpointing:
        raise ValueError("--fold_lora spends memory, which --gradient_checkpointing saves: give one of them.")
    if not config.adversarial and config.image_data is not None:
        warnings.warn(
            "--image_data is not read with --lambda_adv 0: only the discriminator sees images.", stacklevel=4
        )
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_train_steps:
        warnings.warn(
            f"--lr_warmup_steps {config.lr_warmup_steps} is not below --max_train_steps {config.max_train_steps}: "
            "the learning rates never reach their full values.",
            stacklevel=4,
        )
    if config.report_to in _RECORD_THE_COMMAND_LINE and config.hub_token is not None:
        raise ValueError(
            f"--report_to {config.report_to} would record --hub_token; log in with `hf auth login` instead."
        )
    if not config.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo", "overwrite_card"):
            if getattr(config, name):
                raise ValueError(f"--{name} has no effect without --push_to_hub.")
