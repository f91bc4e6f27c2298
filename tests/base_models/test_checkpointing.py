"""Layers that are computed again in the backward pass: the same gradients, and less that is kept until then."""

import pytest
import torch
from torch import nn

from diffusers_mcm.base_models import checkpointing, get_base_model
from diffusers_mcm.lora import add_lora, lora_disabled, lora_state_dict
from tests.tiny import LATENT_CHANNELS, TEXT_DIM, randomise_lora, tiny_motion_unet, tiny_unet, tiny_vae
from tests.tiny_wan import CHANNELS, tiny_wan_transformer, tiny_wan_vae
from tests.tiny_wan import TEXT_DIM as WAN_TEXT_DIM

# base model -> denoiser, autoencoder, shape of the latents, width of the text, frames that are judged
WORLDS = {
    "modelscope": (tiny_unet, tiny_vae, (LATENT_CHANNELS, 3, 8, 8), TEXT_DIM, [0, 2]),
    "animatediff": (tiny_motion_unet, tiny_vae, (LATENT_CHANNELS, 3, 8, 8), TEXT_DIM, [0, 2]),
    **{
        kind: (
            lambda kind=kind: tiny_wan_transformer(kind),
            lambda kind=kind: tiny_wan_vae(kind),
            (CHANNELS[kind], 3, 4, 4),
            WAN_TEXT_DIM,
            [0, 6],
        )
        for kind in CHANNELS
    },
}


class World:
    """A tiny base model in float64 with a random LoRA, as a training step uses it."""

    def __init__(self, name: str, checkpointing: bool, dropout: float = 0.0):
        make_denoiser, make_vae, self.shape, self.width, self.judged = WORLDS[name]
        self.base = get_base_model(name)
        self.denoiser, self.vae = make_denoiser(), make_vae().requires_grad_(False).double()
        add_lora(self.denoiser, self.base.lora_target_modules(self.denoiser), 2, 2, torch.Generator().manual_seed(0))
        randomise_lora(self.denoiser)
        self.denoiser.double()
        if dropout:
            for module in self.denoiser.train().modules():
                if isinstance(module, nn.Dropout):
                    module.p = dropout
        if checkpointing:
            self.base.enable_gradient_checkpointing(self.denoiser)
            self.base.enable_decoder_checkpointing(self.vae)

    def step(self) -> tuple[dict[str, torch.Tensor], int]:
        """Gradients of a loss on the output and its frames, beside the bytes that the passes forward kept for them."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64)
        text = {"prompt_embeds": torch.randn(2, 6, self.width, generator=generator, dtype=torch.float64)}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        torch.manual_seed(2)  # of dropout
        t = torch.tensor([500, 900])
        with torch.no_grad(), lora_disabled(self.denoiser):
            target = self.base.denoise(self.denoiser, x, t, text)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self.base.denoise(self.denoiser, x, t, text)
            images = self.base.decode_frames(self.vae, output, torch.tensor([self.judged, self.judged]))
            loss = (output - target).square().mean() + images.square().mean()
        weights = {id(p) for network in (self.denoiser, self.vae) for p in network.parameters()}
        size = sum(tensor.nbytes for tensor in kept.values() if id(tensor) not in weights)
        loss.backward()
        layers = {name: p.grad for name, p in self.denoiser.named_parameters() if p.requires_grad}
        assert layers and len(layers) == len(lora_state_dict(self.denoiser))
        return layers, size


@pytest.mark.parametrize("name", WORLDS)
def test_gradients_are_the_same_and_less_is_kept_for_them(name):
    expected, plain = World(name, checkpointing=False).step()
    found, kept = World(name, checkpointing=True).step()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for layer, gradient in expected.items():
        torch.testing.assert_close(found[layer], gradient, rtol=1e-9, atol=1e-12)
    assert kept < plain / 3


@pytest.mark.parametrize("name", ["modelscope", "animatediff"])
def test_dropout_drops_the_same_both_times(name):
    """A second pass with draws of its own would give other gradients."""
    expected, _ = World(name, checkpointing=False, dropout=0.5).step()
    without, _ = World(name, checkpointing=False).step()
    found, _ = World(name, checkpointing=True, dropout=0.5).step()
    assert any((expected[layer] - without[layer]).abs().max() > 1e-3 for layer in expected)
    for layer, gradient in expected.items():
        torch.testing.assert_close(found[layer], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WORLDS)
def test_frames_are_those_that_the_whole_clip_has(name):
    world = World(name, checkpointing=True)
    latents = torch.randn(1, *world.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    video = world.base.decode_video(world.vae, latents)
    frames = world.base.decode_frames(world.vae, latents.requires_grad_(), torch.tensor([world.judged]))
    assert frames.requires_grad
    torch.testing.assert_close(frames.clamp(-1, 1), video.detach()[0].transpose(0, 1)[world.judged].clamp(-1, 1))


def test_passes_without_gradients_are_as_they_were(monkeypatch):
    world = World("modelscope", checkpointing=True)
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    x, text = torch.randn(1, *world.shape).double(), {"prompt_embeds": torch.randn(1, 6, world.width).double()}
    with torch.no_grad():
        world.base.denoise(world.denoiser, x, torch.tensor([500]), text)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        world.base.denoise(world.denoiser, x, torch.tensor([500]), text)


@pytest.mark.parametrize("name", ["modelscope", "animatediff"])
def test_no_more_than_one_layer_is_computed_again_at_once(name):
    """Whole blocks would be far too much for a network of full size."""
    world = World(name, checkpointing=True)
    unet = world.denoiser
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        assert "forward" not in vars(block)
        layers = list(checkpointing.layers_of([block]))
        assert len(layers) > 1 and all("forward" in vars(layer) for layer in layers)
