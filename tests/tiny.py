"""Tiny random components with the base models' architectures: a whole base model that runs in milliseconds."""

import json
import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.lora import add_lora, extract_lora, lora_state_dict, write_lora_folder
from diffusers_mcm.scheduler import MCMScheduler
from diffusers_mcm.settings import SamplingDefaults, Settings

LATENT_CHANNELS = 4
TEXT_LENGTH = 24  # tokens
TEXT_DIM = 16
VAE_FACTOR = 2
SIZE = 16  # pixels; latents are 8 x 8
NUM_FRAMES = 4
# What the scheduler configuration of a ModelScope repository says.
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon")
# What AnimateDiff's motion modules were trained on.
ANIMATEDIFF_SCHEDULER = SCHEDULER | dict(beta_schedule="linear")

# Networks are compared in float64: another processor's kernels add up in another order, and in float32 what comes out
# of a network, or of fifty steps with guidance, may differ by a thousand roundings. In float64 those are 1e-12.
EXACT = dict(rtol=1e-8, atol=1e-8)


def assert_close_in_parts_of_the_largest(got: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    """Of latents in float32, each of which may be the difference of larger ones, that round by 1e-7 of themselves."""
    torch.testing.assert_close(got, expected, rtol=0, atol=share * float(expected.abs().max()))


# Enough LoRA for tests that are not about which modules get one: injecting takes its time.
FEW_MODULES = [
    "transformer_in.proj_in",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.resnets.0.conv2",
]

_WORDS = """a red green blue yellow purple orange circle square triangle ring moving left right up down growing
shrinking on black white gray cyan background""".split()

_UNET = dict(
    sample_size=SIZE // VAE_FACTOR,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=2,
    norm_num_groups=4,
)


def tiny_unet(seed: int = 0, **overrides) -> UNet3DConditionModel:
    """Two levels, one layer each, every kind of module a LoRA is put on (0.1 M parameters)."""
    blocks = dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet3DConditionModel(**(_UNET | blocks | overrides))
        # The temporal layers start at zero, as identities; random ones make a mistake in them visible.
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)
    return unet.eval()


def tiny_image_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    """Stable Diffusion's kind."""
    blocks = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**(_UNET | blocks | overrides)).eval()


def tiny_motion_adapter(seed: int = 0, **overrides) -> MotionAdapter:
    config = dict(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = MotionAdapter(**(config | overrides))
        # The last projections start at zero; random ones make a mistake in the motion modules visible.
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)
    return adapter.eval()


def tiny_motion_unet(seed: int = 0) -> UNetMotionModel:
    """AnimateDiff's kind: the image UNet with the adapter's motion modules in it."""
    return UNetMotionModel.from_unet2d(tiny_image_unet(seed), tiny_motion_adapter(seed)).eval()


def tiny_vae(seed: int = 0, **overrides) -> AutoencoderKL:
    config = dict(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**(config | overrides)).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters, digits and the words of the shapes world's captions."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    merges = {}
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges.setdefault(("".join(pieces[:i]), pieces[i]))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TEXT_LENGTH)


def tiny_text_encoder(seed: int = 0, **overrides) -> CLIPTextModel:
    tokenizer = tiny_tokenizer()
    config = dict(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(CLIPTextConfig(**(config | overrides))).eval()


def realign(pipe) -> None:
    """Weights as read from a file lie at any address, and with it a processor may choose another kernel; here each
    gets memory of torch's own, so that equal weights give equal videos, bit for bit."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()


def tiny_components(seed: int = 0) -> dict:
    """The five components under the names a ModelScope repository gives them."""
    return dict(
        unet=tiny_unet(seed),
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed),
        tokenizer=tiny_tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


def tiny_animatediff_components(seed: int = 0) -> dict:
    """The components of an AnimateDiff pipeline, on its linear betas."""
    scheduler = DDIMScheduler(**ANIMATEDIFF_SCHEDULER, clip_sample=False, steps_offset=1)
    return tiny_components(seed) | dict(unet=tiny_motion_unet(seed), scheduler=scheduler)


def save_tiny_stable_diffusion(
    folder: str | Path, seed: int = 0, class_name: str = "StableDiffusionPipeline", **components
) -> Path:
    """A repository folder of an image model; its scheduler is the image model's."""
    components = (
        dict(unet=tiny_image_unet(seed), scheduler=PNDMScheduler(**SCHEDULER, skip_prk_steps=True)) | components
    )
    return save_tiny_base(folder, seed, class_name, **components)


def save_tiny_base(folder: str | Path, seed: int = 0, class_name: str = "TextToVideoSDPipeline", **components) -> Path:
    """A repository folder of a base model, laid out as on the Hub; ModelScope unless told otherwise."""
    folder = Path(folder)
    components = tiny_components(seed) | components
    for name, component in components.items():
        component.save_pretrained(folder / name)
    index = {"_class_name": class_name, "_diffusers_version": "0.42.1"}
    for name, component in components.items():
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(component).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def randomise_lora(denoiser: UNet3DConditionModel, seed: int = 0, adapter_name: str = "default") -> None:
    """Give a fresh LoRA, which does nothing, random weights that depend on the seed alone."""
    for_a, for_b = (torch.Generator().manual_seed(number) for number in (1000 + seed, seed))
    for key, tensor in lora_state_dict(denoiser, adapter_name).items():
        if ".lora_B." in key:
            tensor.copy_(torch.randn(tensor.shape, generator=for_b) * 0.3)
        elif ".lora_A." in key:  # as `add_lora` draws it, which need not have been told a generator
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=for_a)


def save_lora(
    folder,
    denoiser,
    base_model,
    *,
    repository=None,
    revision=None,
    sampling=None,
    scheduler=None,
    dtype=None,
    **settings,
) -> Path:
    """The LoRA in a denoiser as the folder that a training leaves; `settings` are more fields of `Settings`."""
    lora = extract_lora(denoiser).cast(dtype)
    lora.settings = Settings(
        base_model=base_model.name,
        base_model_repository=str(repository or base_model.default_repository),
        base_model_revision=revision,
        sampling=SamplingDefaults(**(sampling or {})),
        **settings,
    ).recorded_in(Path(folder))
    lora.scheduler_config = None if scheduler is None else json.loads(scheduler.to_json_string())
    write_lora_folder(Path(folder), lora, base_model.denoiser_name)
    return Path(folder)


def save_tiny_lora(
    folder: str | Path, base: str | Path, seed: int = 0, rank: int = 4, modules: list[str] = FEW_MODULES, **options
) -> Path:
    """An MCM LoRA folder for the base model in `base`."""
    model = get_base_model("modelscope")
    unet = tiny_unet()
    add_lora(unet, modules, rank=rank, alpha=rank, generator=torch.Generator().manual_seed(seed))
    randomise_lora(unet, seed)
    sampling = dict(num_inference_steps=2, num_frames=NUM_FRAMES, height=SIZE, width=SIZE, fps=8)
    options = dict(repository=base, sampling=sampling, scheduler=MCMScheduler(**SCHEDULER)) | options
    return save_lora(folder, unet, model, **options)
