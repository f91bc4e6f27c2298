"""Wan's networks as the package calls them, against diffusers' own."""

import itertools
import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from safetensors.torch import load_file
from torch import nn

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, get_base_model
from diffusers_mcm.base_models import base_model_of, half_named, infer_base_model
from diffusers_mcm.base_models.wan import FRAME_DECODERS, NEGATIVE_PROMPT, TEXT_LENGTH, place_in_latents
from diffusers_mcm.lora import LoRA, add_lora
from diffusers_mcm.settings import Settings
from tests.tiny import EXACT, save_lora, save_tiny_base
from tests.tiny_wan import (
    CHANNELS,
    NUM_FRAMES,
    SIZE,
    save_wan_base,
    tiny_wan_transformer,
    tiny_wan_vae,
    wan_components,
)

WAN, TI2V, A14B = (get_base_model(name) for name in ("wan", "wan-ti2v", "wan-a14b"))
KINDS = pytest.mark.parametrize("kind", ["wan", "wan-ti2v"])
INDEX = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}


def noise(kind="wan", seed=0, batch=2, frames=3, dtype=torch.float64):
    size = 4 if kind == "wan" else 2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS[kind], frames, size, size, generator=generator, dtype=dtype)


def model(kind):
    return get_base_model(kind), tiny_wan_vae(kind).double().requires_grad_(False)


# --- which repositories ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("index", "name"),
    [
        (INDEX, "wan"),
        (INDEX | {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}, "wan"),
        (INDEX | {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": True}, "wan-ti2v"),
        (INDEX | {"transformer_2": INDEX["transformer"], "boundary_ratio": 0.875}, "wan-a14b"),
    ],
)
def test_repositories_are_told_apart(index, name):
    assert infer_base_model(model_index=index).name == name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"boundary_ratio": 0.875},
            "a `boundary_ratio` of 0.875 and one transformer, where two meet: it is one expert",
        ),
        (
            {"transformer_2": INDEX["transformer"]},
            r"`boundary_ratio` between 0 and 1, where the two experts of this Wan meet \(0.875 for .*; got None",
        ),
        (
            {"transformer_2": INDEX["transformer"], "boundary_ratio": 875},
            "`boundary_ratio` between 0 and 1, .*; got 875",
        ),
        (
            {"image_encoder": ["transformers", "CLIPVisionModel"]},
            "it makes a picture move. Text to video needs one wi",
        ),
    ],
)
def test_repositories_of_other_kinds_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        infer_base_model(model_index=INDEX | more)


def test_a_transformer_that_takes_a_picture_is_refused():
    with pytest.raises(ValueError, match="takes 36 channels, the latents have 16: it is one for making a picture"):
        WAN.check_components(tiny_wan_transformer(in_channels=36), tiny_wan_vae())


def test_rows_do_not_take_each_others_models(tmp_path):
    base = save_wan_base(tmp_path / "wan")
    save_tiny_base(tmp_path / "modelscope")
    for folder, name in ((base, "wan"), (tmp_path / "modelscope", "modelscope")):
        assert infer_base_model(model_index=json.loads((folder / "model_index.json").read_text())).name == name
    transformer = tiny_wan_transformer()
    add_lora(transformer, WAN.lora_target_modules(transformer), rank=2, alpha=2)
    lora = save_lora(tmp_path / "lora", transformer, WAN, repository=base)
    with pytest.raises(ValueError, match="made for base model 'wan'; this is 'modelscope'"):
        MCMPipeline.from_pretrained(tmp_path / "modelscope", lora=lora)
    modules = [key.removeprefix("transformer.") for key in load_file(lora / "pytorch_lora_weights.safetensors")]
    assert infer_base_model(lora_modules=modules) is WAN
    assert infer_base_model(lora_modules=modules, for_an_expert=True) is A14B


def a_lora(width, source, module="blocks.0.attn1.to_q", **settings):
    tensors = {f"{module}.lora_A.weight": torch.zeros(2, width), f"{module}.lora_B.weight": torch.zeros(width, 2)}
    return LoRA(tensors, source=source, settings=Settings(**settings))


def test_half_of_a_pair_is_told_by_a_name_only_where_its_size_allows_it():
    for width in (5120, 32):  # of 14B, which both generations have, and of none
        half = half_named(a_lora(width, "x_low_noise.safetensors"))
        assert half.settings.expert == "low_noise" and base_model_of(half) is A14B
    for width, model in ((1536, WAN), (3072, TI2V)):
        style = a_lora(width, "pixels_low.safetensors")
        assert half_named(style) is style and base_model_of(style) is model
    said = a_lora(5120, "x_low_noise.safetensors", base_model="wan")
    other = a_lora(320, "high.safetensors", module="mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert half_named(said) is said and half_named(other) is other


# Of the configurations that diffusers' script for converting Wan's own checkpoints holds.
FULL_SIZES = {
    "1.3B": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14B": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    "5B": dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
}


@pytest.mark.parametrize(
    ("model", "size", "billions", "targets", "millions"),
    [
        (WAN, "1.3B", 1.419, 300, 87.5),
        (WAN, "14B", 14.288, 400, 306.7),
        (TI2V, "5B", 5.000, 300, 161.2),
        (A14B, "14B", 14.288, 400, 306.7),  # each of its two experts
    ],
)
def test_the_lora_of_the_models_as_large_as_they_are(model, size, billions, targets, millions):
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**FULL_SIZES[size])
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    modules = model.lora_target_modules(transformer)
    shapes = [transformer.get_submodule(name).weight.shape for name in modules]
    assert len(modules) == targets
    assert 64 * sum(map(sum, shapes)) / 1e6 == pytest.approx(millions, abs=0.05)


# --- what the models are by default ----------------------------------------------------------------------------------
def test_defaults():
    names = ("num_frames", "height", "width", "fps", "data_fps", "num_solver_steps", "guidance_range")
    assert [getattr(WAN, name) for name in names] == [81, 480, 832, 16, 16.0, 48, (2.0, 6.0)]
    assert [getattr(TI2V, name) for name in names] == [121, 704, 1280, 24, 24.0, 48, (2.0, 6.0)]
    assert [getattr(A14B, name) for name in names[:-1]] == [81, 480, 832, 16, 16.0, 48]
    assert [A14B.guidance_range_of(expert) for expert in A14B.experts] == [(2.0, 5.0), (1.0, 4.0)]
    assert WAN.guidance_range_of(None) == WAN.guidance_range
    assert all(model.negative_prompt == NEGATIVE_PROMPT for model in (WAN, TI2V, A14B))
    assert A14B.experts == {"high_noise": "transformer", "low_noise": "transformer_2"} and not WAN.experts
    assert {"静态", "静止", "静止不动的画面"} < set(NEGATIVE_PROMPT.split("，")) and NEGATIVE_PROMPT.count("，") == 27
    assert WAN.noise_path().shift == 5.0 and WAN.noise_path(shift=8.0).shift == 8.0
    assert tuple(FRAME_DECODERS) == WAN.frame_decoders == TI2V.frame_decoders


def test_the_students_scheduler_has_nothing_of_the_teachers():
    own = dict(num_train_timesteps=1000, shift=8.0, original_inference_steps=48, stochastic=True, boundary=None)
    few_step = MCMFlowScheduler(shift=3.0, trained_timesteps=[1000, 757, 522], boundary=0.875, stochastic=False)
    for teachers in (wan_components()["scheduler"], few_step):
        scheduler = WAN.student_scheduler(teachers.config, num_solver_steps=48, shift=8.0)
        config = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
        assert config == own | dict(trained_timesteps=None)
    assert WAN.few_step_scheduler(wan_components()["scheduler"]).config.shift == 5.0  # the teacher's is 3


# --- sizes -----------------------------------------------------------------------------------------------------------
def test_frames_are_counted_in_pixels_not_in_latents():
    size = dict(height=SIZE, width=SIZE)
    for kind, shape in (("wan", (16, 3, 4, 4)), ("wan-ti2v", (48, 3, 2, 2))):
        networks = tiny_wan_transformer(kind), tiny_wan_vae(kind)
        assert get_base_model(kind).latent_shape(*networks, num_frames=9, **size) == shape
        assert get_base_model(kind).latent_shape(*networks, num_frames=1, **size)[1] == 1


@pytest.mark.parametrize(
    ("frames", "height", "message"),
    [
        (16, 32, "`num_frames` must be one more than a multiple of 4, such as 13 or 17; got 16"),
        (18, 32, "`num_frames` must be one more than a multiple of 4, such as 17 or 21; got 18"),
        (0, 32, "`num_frames` must be one more than a multiple of 4, such as 1 or 5; got 0"),
        (2.5, 32, "`num_frames` must be one more than a multiple of 4; got 2.5"),
        (9, 40, "`height` must be a positive multiple of 16, 8 pixels of the VAE times 2 of the .*; got 40"),
        (9, 0, "`height` must be a positive multiple of 16, .*; got 0"),
    ],
)
def test_impossible_sizes(frames, height, message):
    with pytest.raises(ValueError, match=message):
        WAN.latent_shape(tiny_wan_transformer(), tiny_wan_vae(), frames, height, SIZE)


def test_a_video_that_the_vae_would_cut_short_is_refused():
    with pytest.raises(ValueError, match="such as 5 or 9; got 8"):
        WAN.encode_video(tiny_wan_vae(), torch.zeros(1, 3, 8, SIZE, SIZE))


# --- latents and frames ----------------------------------------------------------------------------------------------
@KINDS
def test_latents_have_the_vaes_mean_and_deviation(kind):
    base, vae = model(kind)
    pixels = torch.rand(1, 3, 5, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    e = noise(kind, batch=1, frames=2)
    torch.testing.assert_close(base.encode_video(vae, pixels), (posterior.mean - mean) / std, **EXACT)
    drawn = (posterior.mean + posterior.std * e - mean) / std
    torch.testing.assert_close(base.encode_video(vae, pixels, e), drawn, **EXACT)


def test_where_frames_lie():
    places = [place_in_latents(tiny_wan_vae(), frame) for frame in range(10)]
    assert places == [(0, 0), *((1, i) for i in range(4)), *((2, i) for i in range(4)), (3, 0)]


@KINDS
def test_judged_frames_are_those_of_the_video(kind):
    """In any order, two of one latent among them, and others for each clip."""
    base, vae = get_base_model(kind), tiny_wan_vae(kind).requires_grad_(False)
    latents = 0.1 * noise(kind, dtype=torch.float32)
    video = base.decode_video(vae, latents)
    assert video.shape == (2, 3, NUM_FRAMES, SIZE, SIZE)
    for picks in ([[0, 4], [8, 1]], [[7, 7], [3, 2]]):
        frames = base.decode_frames(vae, latents, torch.tensor(picks))
        expected = torch.stack([video[b, :, i] for b, row in enumerate(picks) for i in row])
        torch.testing.assert_close(frames.clamp(-1, 1), expected, rtol=0, atol=1e-5)


@KINDS
def test_gradients_reach_the_picked_latent_and_no_other(kind, monkeypatch):
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)  # theirs rounds to float32
    base, vae = model(kind)
    latents = (0.1 * noise(kind)).requires_grad_()
    for pick, other, latent in ((0, 0, 0), (7, 0, 2), (8, 3, 2)):  # the last two are of neighbouring latents
        picks = torch.tensor([[pick, other], [0, 0]])
        frame = base.decode_frames(vae, latents, picks)[0]
        (gradient,) = torch.autograd.grad(frame.square().sum(), latents)
        reached = gradient[0].abs().sum(dim=(0, 2, 3)) > 0
        assert reached.tolist() == [number == latent for number in range(3)] and not gradient[1].any()

        def value(change, pick=pick, latent=latent):
            moved = latents.detach()[:1].clone()
            moved[0, :, latent] += change
            return base.decode_video(vae, moved)[0, :, pick].square().sum()

        direction, h = noise(kind, seed=9)[0, :, 0], 1e-6
        expected = (value(h * direction) - value(-h * direction)) / (2 * h)
        torch.testing.assert_close((gradient[0, :, latent] * direction).sum(), expected, rtol=1e-5, atol=1e-8)


def test_pixels_out_of_range_are_not_clamped():
    base, vae = model("wan")
    vae.decoder.conv_out.bias += 3
    latents = noise().requires_grad_()
    frames = base.decode_frames(vae, latents, torch.tensor([[1], [1]]))
    assert frames.min() > 1 and base.decode_video(vae, latents).max() == 1
    (gradient,) = torch.autograd.grad(frames.sum(), latents)
    assert gradient[:, :, 1].abs().sum(dim=1).all()


def test_latents_before_and_after_the_picked_one_leave_no_activations():
    """What is kept for the backward pass does not grow with the place of the latent."""
    base, vae = WAN, tiny_wan_vae().requires_grad_(False)
    latents = noise(frames=5, batch=1, dtype=torch.float32).requires_grad_()

    def kept(picks):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            base.decode_frames(vae, latents, torch.tensor(picks))
        return sum(sizes)

    # The second chunk keeps less than later ones, whose convolutions in time have one before.
    assert kept([[12]]) == kept([[16]]) == kept([[13, 14]]) < 1.1 * kept([[8]])


@KINDS
def test_clips_are_decoded_in_groups_as_one_by_one(kind, monkeypatch):
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)  # theirs rounds to float32
    base, vae = model(kind)
    latents, picks = torch.cat([noise(kind), noise(kind, seed=1)]), torch.tensor([[3, 8], [0, 5], [7, 7], [1, 2]])
    found, asked = [], latents.requires_grad_()
    for cells in (1, 2 * latents[0, 0, 0].numel(), 1 << 20):
        monkeypatch.setattr("diffusers_mcm.base_models.wan.GROUP_CELLS", cells)
        frames = base.decode_frames(vae, asked, picks)
        found.append((frames, *torch.autograd.grad(frames.square().sum(), asked)))
    for frames, gradient in found[1:]:
        torch.testing.assert_close(frames, found[0][0], **EXACT)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-9, atol=1e-9)


def test_the_order_of_the_samples_makes_no_difference():
    base, vae = model("wan")
    latents, picks = noise(), torch.tensor([[1, 8], [3, 5]])
    frames = base.decode_frames(vae, latents, picks)
    swapped = base.decode_frames(vae, latents.flip(0), picks.flip(0))
    torch.testing.assert_close(frames, swapped.unflatten(0, (2, 2)).flip(0).flatten(0, 1), **EXACT)


@KINDS
def test_a_latent_decoded_as_an_image_is_exact_where_the_clip_begins(kind):
    base, vae = model(kind)
    latents = (0.1 * noise(kind)).requires_grad_()
    frames = base.decode_frames(vae, latents, torch.tensor([[0, 5], [8, 0]]), "image")
    exact = base.decode_frames(vae, latents, torch.tensor([[0, 5], [8, 0]]))
    assert frames.shape == exact.shape == (4, 3, SIZE, SIZE)
    torch.testing.assert_close(frames[[0, 3]], exact[[0, 3]], **EXACT)
    assert (frames[1:3] - exact[1:3]).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    (gradient,) = torch.autograd.grad(frames[1].sum(), latents)
    assert (gradient[0].abs().sum(dim=(0, 2, 3)) > 0).tolist() == [False, False, True] and not gradient[1].any()


# --- the text --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stock():
    return WanPipeline(**wan_components()).to(torch.float64)


def test_text_is_what_diffusers_pipeline_makes_of_it(stock):
    prompts = ["a red ring", "  a &amp;amp;  ring\n moving   left ", ""]
    text = WAN.encode_text(stock.tokenizer, stock.text_encoder, prompts)["prompt_embeds"]
    expected, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-6)
    assert text.shape[:2] == (3, 512) and not text[0, 9:].any() and text[0, :9].any(dim=-1).all()
    assert torch.equal(text[1], WAN.encode_text(stock.tokenizer, stock.text_encoder, [prompts[1]])["prompt_embeds"][0])
    cleaned = WAN.encode_text(stock.tokenizer, stock.text_encoder, ["a & ring moving left"])["prompt_embeds"]
    torch.testing.assert_close(text[1:2], cleaned, rtol=0, atol=1e-6)


def test_embeddings_that_a_caller_gives_are_padded_with_zeros(stock):
    whole = WAN.encode_text(stock.tokenizer, stock.text_encoder, ["a ring"])["prompt_embeds"]
    assert torch.equal(WAN.embeds_condition(whole[:, :20])["prompt_embeds"], whole)
    assert torch.equal(WAN.embeds_condition(whole)["prompt_embeds"], whole)


# --- the network -----------------------------------------------------------------------------------------------------
@KINDS
def test_a_timestep_for_each_token_is_the_same_as_one_for_all(kind):
    """diffusers gives TI2V one for each, to keep a first picture that is given; of text alone they are all alike."""
    transformer, latents = tiny_wan_transformer(kind).double(), noise(kind)
    embeds, t = torch.randn(2, TEXT_LENGTH, 32, dtype=torch.float64), torch.tensor([937.5, 625.0])
    output = get_base_model(kind).denoise(transformer, latents, t, {"prompt_embeds": embeds})
    tokens = latents[0, 0].numel() // 4
    expected = transformer(latents, t[:, None].expand(2, tokens), embeds, return_dict=False)[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_the_network_is_asked_in_its_own_type_at_exact_times():
    transformer, given = tiny_wan_transformer().to(torch.bfloat16), []

    def denoiser(latents, timestep, **options):
        given.append((latents.dtype, timestep, options["encoder_hidden_states"].dtype))
        return transformer(latents, timestep, **options)

    denoiser.dtype = torch.bfloat16
    text = {"prompt_embeds": torch.zeros(2, TEXT_LENGTH, 32)}
    output = WAN.denoise(denoiser, noise(dtype=torch.float32), torch.tensor([937.5, 625.0]), text)
    assert output.dtype == torch.float32
    ((latents, times, embeds),) = given
    assert latents == embeds == torch.bfloat16 and times.tolist() == [937.5, 625.0]


def test_every_projection_of_every_block_gets_a_lora():
    modules = WAN.lora_target_modules(tiny_wan_transformer())
    halves = [f"attn{n}.to_{x}" for n, x in itertools.product((1, 2), ("q", "k", "v", "out.0"))]
    projections = [*halves, "ffn.net.0.proj", "ffn.net.2"]
    assert modules == sorted(f"blocks.{block}.{name}" for block in range(2) for name in projections)
    assert WAN.recognises(modules) and not WAN.recognises(["down_blocks.0.attn1.to_q"])
    with pytest.raises(ValueError, match="The modules of a wan see space and time at once"):
        WAN.is_temporal(modules[0])
