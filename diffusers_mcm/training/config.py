"""The training configuration: one frozen, validated dataclass from which the script's flags are generated."""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..distillation.method import MethodConfig
from ..flags import FIXED, TOLD, flag
from ..settings import EXPERTS, HIGH_NOISE, LOW_NOISE

REFERENCE_BATCH = 128  # the batch for which the paper states its learning rates
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
MIXED_PRECISION = ("no", "fp16", "bf16")
SAVE_DTYPES = ("fp16", "fp32")
CACHE_DTYPES = ("exact", "fp16", "bf16")
LORA_MODULES = ("all", "spatial", "temporal")
# accelerate's trackers, and none.
TRACKERS = (
    *("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"),
    "none",
)
_RECORD_THE_COMMAND_LINE = ("wandb", "comet_ml", "clearml", "swanlab")  # and a secret in it

_method = partial(flag, group="method", resume=FIXED)
_model, _data = partial(flag, group="models"), partial(flag, group="data")
_source: dict[str, Any] = {"resume": TOLD, "source": True}
_column = partial(_data, None, resume=TOLD)
_optimisation = partial(flag, group="optimisation")
_fixed, _told = partial(_optimisation, resume=FIXED), partial(_optimisation, resume=TOLD)
_output = partial(flag, group="output")
_unrecorded = partial(_output, recorded=False)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MethodConfig):
    """Everything that decides a distillation run; saved beside the weights. Defaults are the paper's (ModelScope)."""

    # -- models
    pretrained_teacher_model: str = _model(
        help="The text-to-video diffusion model to distil: a Hub repository, a local folder or 'mcm-shapes-teacher'. "
        "A Stable Diffusion 1.5 repository, or a fine-tune of it, is distilled as AnimateDiff.",
        filled=True,
        **_source,
    )
    base_model: str | None = _model(
        None,
        help="Architecture of the teacher, such as 'modelscope' or 'animatediff'. Default: what its files say.",
        resume=FIXED,
    )
    expert: str | None = _model(
        None,
        help="Which expert of the teacher to distil, where it has two (Wan 2.2 A14B): only that one is loaded, and "
        "trained in its own part of the path, 'high_noise' above the boundary and 'low_noise' below. A run for each "
        "makes the pair that samples.",
        choices=EXPERTS,
        resume=FIXED,
        beyond_paper=True,
    )
    revision: str | None = _model(None, help="Revision of the teacher on the Hub.", resume=TOLD)
    variant: str | None = _model(
        None, help="Which files of the teacher's weights to read, as fp16, where there are no others.", resume=TOLD
    )
    extra_repositories: tuple[str, ...] = _model(
        (),
        help="Where components of the teacher lie that are not in its own repository, as name=repository: for "
        "AnimateDiff motion_adapter=... Default: the base model's.",
        many=True,
        resume=TOLD,
    )
    discriminator_features: str = _model(
        "facebook/dinov2-small", help="DINOv2 network whose frozen features the discriminator reads.", **_source
    )
    discriminator_text: str = _model(
        "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        help="CLIP text model (with projection) that conditions the discriminator.",
        **_source,
    )
    pretrained_lora: str | None = _model(
        None,
        help="An MCM LoRA to start from, a folder or a Hub repository, instead of a fresh one: to give it the "
        "appearance of other images, or to go on with other settings. Its motion head is taken too, the discriminator "
        "is fresh.",
        source=True,
        beyond_paper=True,
    )
    pretrained_lora_subfolder: str | None = _model(None, help="Where in --pretrained_lora it is.")
    lora_rank: int = _model(64, help="Rank of the LoRA that is trained.", above=0, resume=FIXED)
    lora_alpha: float = _model(64.0, help="Alpha of the LoRA; its scale is alpha / rank.", above=0, resume=FIXED)
    lora_modules: str = _model(
        "all",
        help="Which modules of the LoRA are trained: 'spatial', those that see each frame by itself, or 'temporal', "
        "those that relate frames to each other. The others stay as they are in --pretrained_lora, or do nothing, "
        "and are saved too.",
        choices=LORA_MODULES,
        resume=FIXED,
        beyond_paper=True,
    )

    # -- method: where a base model has a default of its own
    num_solver_steps: int | None = _method(  # type: ignore[assignment]  # `method` has the number
        None, help="Steps of the teacher's solver grid. Default: the base model's, 50 or, for Wan, 48.", above=0
    )

    # -- data
    video_data: str = _data(
        help="Videos with captions: a folder with metadata.csv or .jsonl, such a table of another name, a directory "
        "or glob of WebDataset tars (mp4 + json), the address of one of these (s3://, hf://, https://), or a Hub data "
        "set id.",
        filled=True,
        **_source,
    )
    image_data: str | None = _data(
        None,
        help="Images that set the appearance (captions optional): an ImageFolder, WebDataset tars or a Hub data set "
        "id. Without it the discriminator sees frames of the videos.",
        **_source,
    )
    caption_column: str | None = _column(help="Column of the video captions, if not found by itself.")
    image_caption_column: str | None = _column(help="Column of the image captions, if not found by itself.")
    video_column: str | None = _column(help="Column (in tars: ending) of the video files, if not found by itself.")
    image_column: str | None = _column(help="Column (in tars: ending) of the image files, if not found by itself.")
    num_frames: int | None = _data(None, help="Frames per clip. Default: the base model's.", above=0)
    frame_interval: int | None = _data(
        None,
        help="Take every n-th frame; shrinks to fit a short clip. Default, without --data_fps: 8, but for Wan its own "
        "frame rate.",
        above=0,
        resume=FIXED,
    )
    data_fps: float | None = _data(
        None,
        help="Take so many frames per second, by the times at which they are shown, instead of every n-th frame: for "
        "videos of several or of varying frame rates. A short clip is read faster; a slower one repeats frames. "
        "Default, without --frame_interval: 16 for Wan 2.1, 24 for Wan 2.2 TI2V.",
        above=0,
        resume=FIXED,
        beyond_paper=True,
    )
    height: int | None = _data(None, help="Height of the clips in pixels. Default: the base model's.", above=0)
    width: int | None = _data(None, help="Width of the clips in pixels. Default: the base model's.", above=0)
    dataloader_num_workers: int | None = _data(
        None,
        help="Processes that load data beside each training process, for videos and for images; 0 loads in the main "
        "one. Default: a core each, one left over, at most 8, and for images a quarter of that.",
        least=0,
    )
    windows_per_clip: int | None = _data(
        None,
        help="Of each video see only the clips of the first so many epochs, over and over, so that they can be kept. "
        "Default: a new one in each epoch; with --cache_latents 1.",
        above=0,
        resume=FIXED,
        beyond_paper=True,
    )
    cache_latents: str | None = _data(
        None,
        help="Folder in which clips and texts are kept encoded, so that no step runs the VAE's encoder or a text "
        "encoder. What it lacks is encoded before the first step, or by `diffusers-mcm encode`.",
        recorded=False,
        beyond_paper=True,
    )
    cache_dtype: str = _data(
        "exact",
        help="Type in which --cache_latents keeps latents: 'exact', that of the VAE, or half of float32.",
        choices=CACHE_DTYPES,
        resume=TOLD,
        recorded=False,
        beyond_paper=True,
    )

    # -- optimisation
    seed: int = _fixed(0, help="Seed of everything random, data order included.", least=0)
    train_batch_size: int = _optimisation(1, help="Clips per process and micro-batch.", above=0)
    gradient_accumulation_steps: int | None = _optimisation(
        None,
        help="Micro-batches per optimiser step. Default: what accelerate's environment says, "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, else 1.",
        above=0,
    )
    max_train_steps: int = _optimisation(30_000, help="Optimiser steps.", above=0)
    learning_rate: float = _fixed(
        5e-6, help=f"Rate of LoRA and motion head at a total batch of {REFERENCE_BATCH}.", above=0
    )
    discriminator_learning_rate: float = _fixed(
        5e-5, help=f"Rate of the discriminator at a total batch of {REFERENCE_BATCH}.", above=0
    )
    scale_lr: bool = _fixed(
        True,
        help=f"Multiply the rates by total batch / {REFERENCE_BATCH}, the discriminator's also by "
        "--num_adversarial_frames. With --no_scale_lr they are used as given.",
    )
    lr_scheduler: str = _fixed("cosine", help="Learning-rate schedule, for both optimisers.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = _fixed(500, help="Steps over which the rates rise from zero.", least=0)
    adam_beta1: float = _fixed(0.9, help="AdamW beta 1.", least=0, below=1)
    adam_beta2: float = _fixed(0.999, help="AdamW beta 2.", least=0, below=1)
    adam_weight_decay: float = _fixed(0.0, help="AdamW weight decay.", least=0)
    adam_epsilon: float = _fixed(1e-8, help="AdamW epsilon.", above=0)
    ema_decay: float = _told(
        0.0,
        help="Decay of a moving average of LoRA and motion head, which is then what is saved and validated: an "
        "adversarial loss keeps weights swinging. 0 saves the last weights.",
        least=0,
        below=1,
        beyond_paper=True,
    )
    max_grad_norm: float = _fixed(10.0, help="Gradient norm above which gradients are scaled down.", above=0)
    mixed_precision: str | None = _told(
        None,
        help="Precision of the frozen networks and of autocast; what is trained stays in fp32. Default: what "
        "`accelerate launch --mixed_precision` or `accelerate config` says, else 'no'.",
        choices=MIXED_PRECISION,
    )
    gradient_checkpointing: bool = _optimisation(
        False,
        help="Recompute the layers of the denoiser and of the VAE's decoder in the backward pass: much less memory, "
        "more time.",
    )
    offload_text_encoder: bool = _optimisation(
        False,
        help="Keep the text encoders in host memory; captions that were not encoded yet bring them to the device, and "
        "then they leave it. For Wan it saves 10.6 GiB of it, and costs a transfer of as much where captions are new.",
    )
    fuse_lora: bool = _told(
        False,
        help="Add the LoRA to the weights once a step, instead of running it beside each layer: faster where the "
        "network is small, but takes the memory of the weights once more. In fp32 only.",
        formerly="fold_lora",
    )
    fsdp: bool = _optimisation(
        False,
        help="Split the frozen weights of the denoiser among the processes (FSDP 2): less memory, more communication, "
        "the same numbers. `accelerate launch --use_fsdp --fsdp_version 2` asks for it too.",
    )
    ddp_timeout: int = _unrecorded(
        1800,
        help="Seconds that a process waits for the others, over NCCL or Gloo, before it ends with an error; more than "
        "the first one needs to sample the validation clips, or the last one to finish its share of --cache_latents.",
        above=0,
    )
    allow_tf32: bool = _told(False, help="Allow TF32 matrix products on Ampere GPUs and later.")

    # -- output
    output_dir: str = _unrecorded("mcm-lora", help="Where LoRA, card, checkpoints and logs are written.", filled=True)
    save_dtype: str = _output("fp32", help="Type in which the LoRA is saved.", choices=SAVE_DTYPES)
    checkpointing_steps: int = _output(
        500,
        help="Write a checkpoint every so many steps; 0 for none but that of a run that is stopped, by Ctrl-C or a "
        "signal, or that fails.",
        least=0,
    )
    checkpoints_total_limit: int = _output(
        3, help="Keep only so many checkpoints of the run, the newest ones; 0 for all.", least=0
    )
    resume_from_checkpoint: str | None = _unrecorded(
        None,
        help="A checkpoint folder to go on from, or 'latest' for the newest one of the run that wrote into "
        "--output_dir last.",
    )
    logging_steps: int = _output(1, help="Write losses to the log and the tracker every so many steps.", above=0)
    logging_dir: str = _unrecorded("logs", help="Folder of the tracker's logs, inside --output_dir.")
    report_to: str = _unrecorded("tensorboard", help="Where losses are sent.", choices=TRACKERS)
    validation_prompts: tuple[str, ...] = _output(
        (), help="Prompts for validation clips, one argument each.", many=True
    )
    validation_steps: int = _output(500, help="Sample the validation prompts every so many steps.", above=0)
    num_inference_steps: int = _output(
        4, help="Sampling steps for validation clips, and the default saved with the LoRA.", above=0
    )
    fps: int | None = _output(None, help="Frame rate of the validation clips. Default: the base model's.", above=0)
    license: str | None = _output(None, help="License named in the model card. Default: none is named.")
    push_to_hub: bool = _unrecorded(False, help="Upload the output folder to the Hub when training ends.")
    hub_model_id: str | None = _unrecorded(
        None, help="Repository to push to. Default: the name of --output_dir in your namespace."
    )
    hub_token: str | None = _unrecorded(None, help="Token for the Hub, if not logged in. Never saved.", secret=True)
    hub_private_repo: bool = _unrecorded(False, help="Create the repository as a private one.")
    overwrite_card: bool = _unrecorded(False, help="Replace a card that was edited on the Hub. Default: it stays.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method(self)
        _check_speed(self)
        _check_output(self)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.gradient_accumulation_steps or 1

    @property
    def precision(self) -> str:
        """The precision of the frozen networks and of autocast."""
        return self.mixed_precision or "no"

    @property
    def extra_places(self) -> dict[str, str]:
        """`extra_repositories` by the names of the components."""
        return dict(entry.partition("=")[::2] for entry in self.extra_repositories)

    @property
    def method(self) -> MethodConfig:
        """The method's own settings, all that a training step takes."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(MethodConfig)}
        return MethodConfig(**{name: value for name, value in values.items() if value is not None})

    def learning_rates(self, total_batch: int) -> tuple[float, float]:
        """Rates of student and discriminator, scaled by the batch unless that is switched off."""
        if not self.scale_lr:
            return self.learning_rate, self.discriminator_learning_rate
        scale = total_batch / REFERENCE_BATCH
        return self.learning_rate * scale, self.discriminator_learning_rate * scale * self.num_adversarial_frames

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; the Hub token is left out."""
        values = {name: getattr(self, name) for name in self.names(secret=False)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_method(config: TrainingConfig) -> None:
    """Raise ValueError for settings of the method, the models and the data that contradict each other."""
    low, high = config.guidance_min, config.guidance_max
    if (low is None) != (high is None):
        raise ValueError("--guidance_min and --guidance_max belong together: give both or neither.")
    if low is not None and high is not None and low > high:
        raise ValueError(f"--guidance_min must not exceed --guidance_max, but {low} > {high}.")
    if config.frame_interval is not None and config.data_fps is not None:
        raise ValueError(
            f"--frame_interval ({config.frame_interval}) takes frames by number, --data_fps ({config.data_fps:g}) by "
            "time: give one of them."
        )
    if config.pretrained_lora_subfolder and not config.pretrained_lora:
        raise ValueError("--pretrained_lora_subfolder has no effect without --pretrained_lora.")
    if config.num_solver_steps is not None and config.num_inference_steps > config.num_solver_steps:
        raise ValueError(
            f"--num_inference_steps ({config.num_inference_steps}) must not exceed --num_solver_steps "
            f"({config.num_solver_steps}): sampling takes its timesteps from the solver's grid."
        )
    if config.expert is not None and config.push_to_hub:
        raise ValueError(
            f"--push_to_hub would publish half a model, the {config.expert} expert's. Distil both, load them as a"
            " pair, and publish what `save_mcm_lora` writes."
        )
    if config.expert == LOW_NOISE and config.validation_prompts:
        raise ValueError(
            f"--validation_prompts: the {LOW_NOISE} expert finishes what the {HIGH_NOISE} expert begins, and has no"
            " clips of its own. Sample with the pair, of this run's checkpoints too."
        )
    frames, judged = config.num_frames or math.inf, config.num_adversarial_frames
    if config.adversarial and judged > frames:
        raise ValueError(f"--num_adversarial_frames ({judged}) must not exceed --num_frames ({frames}).")
    if frames < 2 and config.motion in ("diff", "corr"):
        raise ValueError(f"--motion {config.motion} compares consecutive frames: --num_frames must be 2 or more.")
    for name in ("lambda_temporal", "lambda_change"):
        if frames < 2 and getattr(config, name) > 0:
            raise ValueError(
                f"--{name} {getattr(config, name):g} compares a clip's frames: --num_frames must be 2 or more."
            )
    if config.lambda_change and not config.adversarial:
        raise ValueError(
            f"--lambda_change {config.lambda_change:g} needs the discriminator: --lambda_adv must not be 0."
        )
    if frames < 2 and config.lora_modules == "temporal":
        raise ValueError("--lora_modules temporal relates frames to each other: --num_frames must be 2 or more.")
    if not config.adversarial and config.image_data is not None:
        unread = "--image_data is not read with --lambda_adv 0: only the discriminator sees images."
        warnings.warn(unread, stacklevel=4)


def _check_speed(config: TrainingConfig) -> None:
    """Raise ValueError for ways of computing that exclude each other; warn of rates that are never reached."""
    if config.fuse_lora and config.mixed_precision not in (None, "no"):
        raise ValueError(
            f"--fuse_lora needs --mixed_precision no: in {config.mixed_precision} most of what a LoRA adds to a weight"
            " would be rounded away."
        )
    if config.fuse_lora and config.fsdp:
        raise ValueError("--fuse_lora changes weights, which --fsdp splits among the processes: give one of them.")
    if config.fuse_lora and config.gradient_checkpointing:
        raise ValueError("--fuse_lora spends memory, which --gradient_checkpointing saves: give one of them.")
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= config.max_train_steps:
        warnings.warn(
            f"--lr_warmup_steps {config.lr_warmup_steps} is not below --max_train_steps {config.max_train_steps}: "
            "the learning rates never reach their full values.",
            stacklevel=4,
        )


def _check_output(config: TrainingConfig) -> None:
    """Raise ValueError where a secret would be recorded, or a flag would be passed over."""
    if config.report_to in _RECORD_THE_COMMAND_LINE and config.hub_token is not None:
        raise ValueError(
            f"--report_to {config.report_to} would record --hub_token; log in with `hf auth login` instead."
        )
    for name in ("hub_model_id", "hub_private_repo", "overwrite_card"):
        if getattr(config, name) and not config.push_to_hub:
            raise ValueError(f"--{name} has no effect without --push_to_hub.")
