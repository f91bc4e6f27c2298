"""The settings of the method itself, apart from data, optimisation and output."""

from dataclasses import dataclass
from functools import partial

from ..flags import FIXED, FlagConfig, flag
from .discriminator.augment import AUGMENTATIONS, CROPS, MIN_FRAME_AREA, MIN_IMAGE_AREA
from .discriminator.penalty import GROWTH_INTERVAL, GROWTH_THRESHOLD
from .image_text import ALIKE, IMAGE_TEXTS
from .losses import DISCRIMINATOR_LOSSES, TEMPORAL_LAGS
from .motion import MOTION_REPRESENTATIONS
from .trajectory import FRAME_DECODERS, TIMESTEPS, VISITING_STEPS

COINS = ("sample", "batch")
# A run with another method is another run.
_method = partial(flag, group="method", resume=FIXED)
_ours = partial(_method, beyond_paper=True)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(FlagConfig):
    """Everything that decides the losses of a training step. The defaults are the paper's (ModelScope)."""

    motion: str = _method(
        "learnable",
        help="Motion representation in which the consistency distance is taken (paper, Table 5).",
        choices=tuple(MOTION_REPRESENTATIONS),
    )
    motion_ema_decay: float = _method(0.95, help="Decay of the learnable head's EMA target.", least=0, most=1)
    lambda_real: float = _method(
        0.5,
        help="Share of samples that start from the encoded real video; the others start from the student's own "
        "one-step sample (eq. 7, 9). 1 switches the mixed trajectory off.",
        least=0,
        most=1,
    )
    coin: str = _ours(
        "sample",
        help="'sample': each sample is real or the student's own by itself, in equal numbers, to within one, for "
        "processes of several samples. 'batch': all samples that the processes work on at the same time are the "
        "same; with one sample a process none then waits for another's, but what is drawn depends on "
        "--train_batch_size and the number of processes, and a step needs --gradient_accumulation_steps to have both.",
        choices=COINS,
    )
    lambda_adv: float = _method(
        1.0, help="Weight of the adversarial loss (eq. 4, 9). 0 trains without a discriminator.", least=0
    )
    discriminator_loss: str = _method(
        "hinge",
        help="'hinge' is per patch logit, 'hinge_mean' takes the mean over frames inside the maximum (eq. 5).",
        choices=tuple(DISCRIMINATOR_LOSSES),
    )
    discriminator_augmentation: tuple[str, ...] = _method(
        tuple(AUGMENTATIONS),
        help="What is done at random to the images that the discriminator sees (App. C.1); without a value, nothing: "
        "a small feature network may not see through it.",
        choices=tuple(AUGMENTATIONS),
        many=True,
    )
    discriminator_crop: str = _ours(
        "random",
        help="How images get to the size of --discriminator_features: 'random', for half of them a crop of that size "
        f"out of a larger image, else the whole image scaled; 'resized', a crop of {MIN_IMAGE_AREA:g} to 1 of the "
        f"area ({MIN_FRAME_AREA:g} to 1 without --image_data), scaled; 'none', the whole image scaled. The same for "
        "real and generated images.",
        choices=tuple(CROPS),
    )
    image_text: str = _ours(
        "auto",
        help="Text that the discriminator reads beside a real image. 'own': the image's caption, and where it has "
        "none, no text, and none beside the generated image that it is paired with either; 'prompt': the prompt of "
        "that generated image; 'none': no text, and none beside generated images either; 'auto': 'own' if the "
        f"captions of images and videos overlap by {ALIKE:.0%} or more, else 'none', because texts of another kind "
        "would tell real from generated images by themselves.",
        choices=IMAGE_TEXTS,
        before="own",
    )
    frame_decoder: str = _ours(
        "exact",
        help="How those frames are decoded, where the autoencoder is one of whole videos: 'exact', the frames of the "
        "clip, or 'image', each latent as a picture of its own: cheap, but exact for the clip's first frame only.",
        choices=FRAME_DECODERS,
    )
    num_adversarial_frames: int = _method(
        2, help="Frames per clip that the discriminator sees, one from each of as many equal segments.", above=0
    )
    gradient_penalty_weight: float = _method(
        1e-5, help="Weight of the discriminator's gradient penalty, to begin with.", least=0
    )
    gradient_penalty_growth: float = _ours(
        5.0,
        help=f"Multiply that weight by this, for the rest of the run, when the penalty is {GROWTH_THRESHOLD:g} or more"
        f" (mean over the whole batch), at most once in {GROWTH_INTERVAL} steps. 1 keeps the weight as it is.",
        least=1,
        before=1.0,
    )
    guidance_min: float | None = _method(
        None, help="Lower end of w = CFG scale - 1 in the teacher's step. Default: the base model's.", least=0
    )
    guidance_max: float | None = _method(
        None, help="Upper end of w = CFG scale - 1 in the teacher's step. Default: the base model's.", least=0
    )
    timesteps: str = _ours(
        "uniform",
        help="How often each timestep of the solver's grid is trained: 'uniform', equally often, or 'visited': what "
        f"sampling in {', '.join(map(str, VISITING_STEPS))} steps visits counts once more for each visit.",
        choices=tuple(TIMESTEPS),
    )
    negative_prompt: str | None = _ours(
        None,
        help="What the teacher's guidance leads away from. Default: the base model's, for Wan the text of its "
        "authors, which names a still picture among others; for the paper's models the empty text.",
    )
    lambda_temporal: float = _ours(
        0.0,
        help="Weight of a distance between how the student's latents and the target's change from frame to frame, at "
        f"lags of {' and '.join(map(str, TEMPORAL_LAGS))}, without the motion head: against shapes that change within "
        "a clip. 0 leaves it out.",
        least=0,
    )
    lambda_change: float = _ours(
        0.0,
        help="Weight of a second adversarial loss, whose heads see how the discriminator's features change from each "
        "frame that it judges to the next, in generated clips and in the videos themselves, whatever --image_data is: "
        "against shapes that change within a clip. 0 makes no such heads.",
        least=0,
    )
    num_solver_steps: int = _method(50, help="Steps of the teacher's solver grid.", above=0)
    shift: float | None = _ours(
        None,
        help="Shift of the solver's grid towards noise, for a teacher that was trained by matching flows. It is the "
        "student's, saved with the LoRA and sampled with, whatever the teacher is sampled with. Default: the base "
        "model's.",
        above=0,
    )
    timestep_scaling: float = _method(4.0, help="Timestep scaling s in the boundary scalings (eq. 1).", above=0)
    sigma_data: float = _method(0.5, help="Data deviation in the boundary scalings (eq. 1).", above=0)
    huber_c: float = _method(0.001, help="c of the pseudo-Huber distance (eq. 3).", above=0)

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.lambda_adv > 0
