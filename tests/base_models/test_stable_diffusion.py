"""What both base models have of Stable Diffusion: its VAE, its text encoder and its noise schedule."""

import json
import logging

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import get_base_model, stable_diffusion
from tests.tiny import (
    EXACT,
    LATENT_CHANNELS,
    NUM_FRAMES,
    SIZE,
    TEXT_DIM,
    TEXT_LENGTH,
    VAE_FACTOR,
    save_tiny_base,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

MODELSCOPE = get_base_model("modelscope")


@pytest.fixture(scope="module")
def vae():
    return tiny_vae().requires_grad_(False).double()


def test_encode_video_is_the_scaled_posterior_frame_by_frame(vae):
    pixels = torch.rand(2, 3, NUM_FRAMES, SIZE, SIZE).double() * 2 - 1
    noise = torch.randn(2, LATENT_CHANNELS, NUM_FRAMES, SIZE // VAE_FACTOR, SIZE // VAE_FACTOR)
    latents = MODELSCOPE.encode_video(vae, pixels, noise)
    assert latents.shape == noise.shape
    posterior = vae.encode(pixels[1, :, 2][None]).latent_dist
    expected = (posterior.mean + posterior.std * noise[1, :, 2]) * vae.config.scaling_factor
    torch.testing.assert_close(latents[1, :, 2], expected[0])
    torch.testing.assert_close(
        MODELSCOPE.encode_video(vae, pixels)[1, :, 2], posterior.mean[0] * vae.config.scaling_factor
    )


def test_frames_are_encoded_a_few_at_a_time(vae, monkeypatch):
    pixels = torch.rand(2, 3, NUM_FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    noise = torch.randn(2, LATENT_CHANNELS, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(1))
    at_once = MODELSCOPE.encode_video(vae, pixels, noise)
    sizes: list[int] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(stable_diffusion, "PIXELS_AT_ONCE", 3 * SIZE * SIZE + 1)
    torch.testing.assert_close(MODELSCOPE.encode_video(vae, pixels, noise), at_once, **EXACT)
    monkeypatch.setattr(stable_diffusion, "PIXELS_AT_ONCE", 1)  # one frame is more than that
    torch.testing.assert_close(MODELSCOPE.encode_video(vae, pixels[:1]), MODELSCOPE.encode_video(vae, pixels)[:1])
    hook.remove()
    assert sizes == [3, 3, 2] + [1] * NUM_FRAMES + [1] * 2 * NUM_FRAMES


def test_decode_frames_picks_the_frames_of_the_whole_decode(vae):
    latents = torch.randn(2, LATENT_CHANNELS, NUM_FRAMES, 8, 8)
    video = MODELSCOPE.decode_video(vae, latents)
    assert video.shape == (2, 3, NUM_FRAMES, SIZE, SIZE)
    images = MODELSCOPE.decode_frames(vae, latents, torch.tensor([[0, 3], [1, 2]]))
    expected = torch.stack([video[0, :, 0], video[0, :, 3], video[1, :, 1], video[1, :, 2]])
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(MODELSCOPE.decode_video(vae, latents, chunk_size=3), video)


def test_decode_frames_sends_gradients_to_its_frames_only(vae):
    latents = torch.randn(1, LATENT_CHANNELS, NUM_FRAMES, 8, 8, requires_grad=True)
    MODELSCOPE.decode_frames(vae, latents, torch.tensor([[1]])).square().sum().backward()
    reached = latents.grad.abs().sum(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [False, True, False, False]


def test_encode_text_pads_and_says_what_it_cuts_off(caplog):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder().double()
    text = MODELSCOPE.encode_text(tokenizer, encoder, ["a red circle", ""])
    assert text["prompt_embeds"].shape == (2, TEXT_LENGTH, TEXT_DIM) and not text["prompt_embeds"].requires_grad
    alone = MODELSCOPE.encode_text(tokenizer, encoder, ["a red circle"])
    torch.testing.assert_close(text["prompt_embeds"][:1], alone["prompt_embeds"])
    with caplog.at_level(logging.WARNING):
        MODELSCOPE.encode_text(tokenizer, encoder, ["a " * 30 + "zebra"])
    assert f"reads {TEXT_LENGTH} tokens" in caplog.text and "zebra" in caplog.text.replace(" ", "")


def test_the_repositorys_configuration_wins_over_the_defaults(tmp_path):
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction")
    save_tiny_base(tmp_path, scheduler=scheduler)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"num_frames": 7}))
    pipe = MCMPipeline.from_pretrained(tmp_path)
    path = MODELSCOPE.noise_path(pipe.scheduler.config)
    assert path.prediction_type == "v_prediction"
    torch.testing.assert_close(path.alphas**2, scheduler.alphas_cumprod)
    assert [pipe.sampling_default(name) for name in ("height", "width", "num_frames", "fps")] == [SIZE, SIZE, 7, 8]
    assert not any(p.requires_grad for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters())


def test_defaults_where_the_repository_is_silent(tmp_path):
    path = MODELSCOPE.noise_path(None)
    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(path.alphas**2, stock.alphas_cumprod)
    assert path.prediction_type == "epsilon"
    unet = tiny_unet(sample_size=None)
    assert [MODELSCOPE.sampling_default(name, unet, None) for name in ("height", "width", "num_frames")] == [
        256,
        256,
        16,
    ]


@pytest.mark.parametrize(
    "num_frames, height, width, message",
    [
        (0, 16, 16, "`num_frames` must be a whole number of at least 1, got 0"),
        (2.5, 16, 16, "`num_frames` must be a whole number of at least 1, got 2.5"),
        (4, 15, 16, "`height` must be a positive multiple of 2, got 15"),
        (4, 16, 0, "`width` must be a positive multiple of 2, got 0"),
    ],
)
def test_impossible_sizes(vae, num_frames, height, width, message):
    with pytest.raises(ValueError, match=message):
        MODELSCOPE.latent_shape(tiny_unet(), vae, num_frames, height, width)
