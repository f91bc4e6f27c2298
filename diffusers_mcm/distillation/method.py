"""The settings of the method itself, apart from data, optimisation and output."""

from dataclasses import dataclass

from ..flags import flag
from .discriminator import AUGMENTATIONS, CROPS, MIN_FRAME_AREA, MIN_IMAGE_AREA
from .discriminator.penalty import GROWTH_INTERVAL, GROWTH_THRESHOLD
from .image_text import ALIKE, IMAGE_TEXTS
from .losses import DISCRIMINATOR_LOSSES
from .motion import MOTION_REPRESENTATIONS
from .trajectory import TIMESTEPS, VISITING_STEPS

COINS = ("sample", "batch")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What decides the losses of a training step. Defaults are the paper's (ModelScope)."""

    motion: str = flag(
        "learnable",
        help="Motion representation in which the consistency distance is taken (paper, Table 5).",
        group="method",
        choices=tuple(MOTION_REPRESENTATIONS),
    )
    motion_ema_decay: float = flag(0.95, help="Decay of the learnable head's EMA target.", group="method")
    lambda_real: float = flag(
        0.5,
        help="Share of samples that start from the encoded real video; the others start from the student's own "
        "one-step sample (eq. 7, 9). 1 switches the mixed trajectory off.",
        group="method",
    )
    coin: str = flag(
        "sample",
        help="'sample': each sample is real or the student's own by itself, in equal numbers, to within one, for "
        "processes of several samples. 'batch': all samples that the processes work on at the same time are the "
        "same; with one sample a process none then waits for another's, but what is drawn depends on "
        "--train_batch_size and the number of processes, and a step needs --gradient_accumulation_steps to have both.",
        group="method",
        choices=COINS,
    )
    lambda_adv: float = flag(
        1.0, help="Weight of the adversarial loss (eq. 4, 9). 0 trains without a discriminator.", group="method"
    )
    discriminator_loss: str = flag(
        "hinge",
        help="'hinge' is per patch logit, 'hinge_mean' takes the mean over frames inside the maximum (eq. 5).",
        group="method",
        choices=tuple(DISCRIMINATOR_LOSSES),
    )
    discriminator_augmentation: tuple[str, ...] = flag(
        tuple(AUGMENTATIONS),
        help="What is done at random to the images that the discriminator sees (App. C.1); without a value, nothing: "
        "a small feature network may not see through it.",
        group="method",
        choices=tuple(AUGMENTATIONS),
        many=True,
    )
    discriminator_crop: str = flag(
        "random",
        help="How images get to the size of --discriminator_features: 'random', for half of them a crop of that size "
        f"out of a larger image, else the whole image scaled; 'resized', a crop of {MIN_IMAGE_AREA:g} to 1 of the "
        f"area ({MIN_FRAME_AREA:g} to 1 without --image_data), scaled; 'none', the whole image scaled. The same for "
        "real and generated images.",
        group="method",
        choices=tuple(CROPS),
    )
    image_text: str = flag(
        "auto",
        help="Text that the discriminator reads beside a real image. 'own': its caption, and if it has none, no "
        "text, nor beside the generated image that it is paired with; 'prompt': that one's; 'none': no text, beside "
        f"generated images neither; 'auto': 'own' where the captions of images and videos overlap by {ALIKE:.0%} or "
        "more, else 'none', for texts of another kind tell real from generated images without a look at them.",
        group="method",
        choices=IMAGE_TEXTS,
    )
    num_adversarial_frames: int = flag(
        2, help="Frames per clip that are decoded and judged, one from each of as many equal segments.", group="method"
    )
    gradient_penalty_weight: float = flag(
        1e-5, help="Weight of the discriminator's gradient penalty, to begin with.", group="method"
    )
    gradient_penalty_growth: float = flag(
        5.0,
        help=f"Multiply that weight by this, for the rest of the run, when the penalty is {GROWTH_THRESHOLD:g} or more"
        f" (mean over the whole batch), at most once in {GROWTH_INTERVAL} steps. 1 keeps the weight as it is.",
        group="method",
    )
    guidance_min: float | None = flag(
        None, help="Lower end of w = CFG scale - 1 in the teacher's step. Default: the base model's.", group="method"
    )
    guidance_max: float | None = flag(
        None, help="Upper end of w = CFG scale - 1 in the teacher's step. Default: the base model's.", group="method"
    )
    timesteps: str = flag(
        "uniform",
        help="How often each timestep of the solver's grid is trained: 'uniform', equally often, or 'visited': what "
        f"sampling in {', '.join(map(str, VISITING_STEPS))} steps visits counts once more for each visit.",
        group="method",
        choices=tuple(TIMESTEPS),
    )
    num_solver_steps: int = flag(50, help="DDIM steps of the teacher's solver grid.", group="method")
    timestep_scaling: float = flag(4.0, help="Timestep scaling s in the boundary scalings (eq. 1).", group="method")
    sigma_data: float = flag(0.5, help="Data deviation in the boundary scalings (eq. 1).", group="method")
    huber_c: float = flag(0.001, help="c of the pseudo-Huber distance (eq. 3).", group="method")

    @property
    def adversarial(self) -> bool:
        return self.lambda_adv > 0
