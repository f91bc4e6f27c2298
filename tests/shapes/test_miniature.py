"""The scripts of the miniature Wan: what is particular to them, and two steps of each, to a pipeline that samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from diffusers_mcm import MCMFlowScheduler, MCMPipeline
from diffusers_mcm.base_models.wan import NEGATIVE_PROMPT, TEXT_LENGTH, Wan, latent_statistics
from diffusers_mcm.lora import add_lora
from diffusers_mcm.shapes.build import build
from diffusers_mcm.shapes.captions import all_captions
from tests.tiny import save_lora

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture
def vae_script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_wan_vae

    return train_wan_vae


@pytest.fixture
def teacher_script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_wan_teacher

    return train_wan_teacher


def untrained(vae_script, seed=0):
    torch.manual_seed(seed)
    vae = vae_script.build().eval()
    for name, parameter in vae.named_parameters():  # the branches that begin at zero would hide what they do
        if name.endswith(("conv2.weight", "time_conv.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    return vae


def test_a_still_drifts_by_whole_pixels_and_its_border_is_repeated(vae_script):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    speeds = set()
    for seed in range(40):
        clip = vae_script.drift(image, 5, np.random.default_rng(seed))
        assert clip.shape == (5, 8, 8, 3)
        np.testing.assert_array_equal(clip[2], image)  # the middle one
        moved = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if np.array_equal(clip[3], image[(np.arange(8) + y).clip(0, 7)][:, (np.arange(8) + x).clip(0, 7)])
        ]
        assert len(moved) == 1 and 0 in moved[0]
        speeds |= set(moved)
    assert len(speeds) == 9  # each of two axes, by -2 to 2


def test_decoding_for_training_is_the_decoding_of_the_vae_before_its_clamp(vae_script):
    vae = untrained(vae_script)
    latents = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = vae_script.decode(vae, latents), vae.decode(latents).sample
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=0, atol=1e-5)


def test_what_is_folded_decodes_the_same_and_says_its_own_scale(vae_script):
    vae = untrained(vae_script)
    generator = torch.Generator().manual_seed(2)
    mean, deviation = torch.randn(16, generator=generator), torch.rand(16, generator=generator) + 0.5
    z = torch.randn(1, 16, 2, 2, 2, generator=generator)
    with torch.no_grad():
        before = vae_script.decode(vae, z)
        vae_script.fold_normalisation(vae, mean, deviation)
        after = vae_script.decode(vae, z * deviation.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1))
        posterior = vae.encode(torch.zeros(1, 3, 1, 16, 16)).latent_dist
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.std[0, :, 0, 0, 0], vae_script.NOISE * deviation)


def test_the_tokenizer_knows_words_whole_and_others_by_letters(teacher_script, tmp_path):
    tokenizer = teacher_script.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    lengths = {len(tokenizer(str(caption)).input_ids) for caption in all_captions()}
    assert max(lengths) == teacher_script.TEXT_TOKENS
    assert tokenizer.tokenize("a red circle") == ["▁a", "▁red", "▁circle"]
    assert tokenizer.unk_token_id not in tokenizer("an odd Zebra 5").input_ids
    negative = tokenizer(NEGATIVE_PROMPT).input_ids
    assert negative == tokenizer(NEGATIVE_PROMPT.replace("，", ",")).input_ids  # as ftfy leaves it
    assert len(negative) <= teacher_script.TEXT_TOKENS
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_padding_once_is_padding_to_all_tokens(teacher_script):
    torch.manual_seed(0)
    model = teacher_script.MiniatureWan(16, 20).double().eval()
    n = teacher_script.TEXT_TOKENS
    tokens = torch.tensor([[3, 4, 5, 1] + [0] * (n - 4), list(range(3, 3 + n - 1)) + [1]])
    x, t = torch.randn(2, 16, 2, 4, 4, dtype=torch.float64), torch.tensor([900.0, 300.0], dtype=torch.float64)
    with torch.no_grad():
        text = model.encode(tokens)
        whole = model.transformer(x, t, Wan().embeds_condition(text)["prompt_embeds"], return_dict=False)[0]
        teacher_script.pad_once(model.transformer, n)
        short = model.transformer(x, t, teacher_script.with_padding(text), return_dict=False)[0]
        for block in model.transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        unweighted = model.transformer(x, t, teacher_script.with_padding(text), return_dict=False)[0]
    assert Wan().embeds_condition(text)["prompt_embeds"].shape[1] == TEXT_LENGTH
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-5)  # rope and norms are float32
    assert (unweighted - whole).abs().max() > 1e-3


def test_latents_of_unit_scale_are_what_the_config_says(vae_script):
    vae = untrained(vae_script)
    clips = [torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    mean, deviation = vae_script.moments(vae, clips)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    with torch.no_grad():
        latents = torch.cat([Wan().encode_video(vae, clip) for clip in clips])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.transpose(0, 1).flatten(1).std(1), torch.ones(16), rtol=0, atol=1e-4)
    assert latent_statistics(vae, latents)[1].flatten().tolist() == pytest.approx(deviation.tolist())


def test_from_files_to_a_miniature_that_samples_as_stock_wan_does(run, tmp_path):
    built, data, models, logs = (tmp_path / name for name in ("built", "data", "models", "logs"))
    build(built, num_videos=16, num_images=4, num_frames=17)
    run("prepare", built=built, data=data)
    common = {"data": data, "work": logs, "watched": 1}
    run("train_wan_vae", **common, output=models / "wan_vae", batch=17, picture_steps=1, steps=2, decoder_steps=1)
    run("encode", data=data, vae=models / "wan_vae", blocks=2)
    run("train_wan_teacher", **common, output=models / "wan", vae=models / "wan_vae", steps=2, batch=2, frame_steps=1)
    run("package", models=models, work=logs, world=built, output=tmp_path / "packaged")

    stems = {"wan_vae_pictures", "wan_vae", "wan_vae_decoder", "wan_teacher_frames", "wan_teacher"}
    last = {file.stem: json.loads(file.read_text().splitlines()[-1]) for file in logs.glob("*.jsonl")}
    assert set(last) == stems and all(np.isfinite(record["loss"]) for record in last.values())
    folder = tmp_path / "packaged" / "mcm-shapes-wan-teacher"
    assert {file.stem for file in (folder / "logs").iterdir()} == stems
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 20e6
    ours, stock = MCMPipeline.from_pretrained(folder), WanPipeline.from_pretrained(folder)
    prompt, latents = "a red circle growing on a white background", torch.randn(1, 16, 5, 8, 8)
    video = ours(prompt, num_inference_steps=1, latents=latents, output_type="np").frames
    assert video.shape == (1, 17, 64, 64, 3)
    ours.scheduler = type(stock.scheduler).from_config(stock.scheduler.config)
    same = dict(num_inference_steps=2, guidance_scale=2.0, latents=latents, output_type="np")
    expected = stock(prompt, negative_prompt=NEGATIVE_PROMPT, height=64, width=64, num_frames=17, **same).frames
    np.testing.assert_allclose(ours(prompt, **same).frames, expected, rtol=0, atol=1e-4)

    transformer, wan = ours.transformer, ours.base_model
    add_lora(transformer, wan.lora_target_modules(transformer), 2, 2, torch.Generator().manual_seed(0))
    lora = models / "mcm-shapes-wan"
    sampling = dict(num_inference_steps=2, num_frames=17, height=64, width=64, fps=8)
    options = dict(scheduler=MCMFlowScheduler(), sampling=sampling, training={"pretrained_teacher_model": str(folder)})
    save_lora(lora, transformer, wan, repository=str(folder), **options)
    scores = tmp_path / "scores.json"
    about = dict(teacher=folder, mcm=lora, lcm=tmp_path / "none", seeds=1, training_captions=1)
    run("measure_wan", **about, output=tmp_path / "readings", scores=scores)
    few = {"teacher-4", "teacher-48", "undistilled-1", "undistilled-4", "mcm-1", "mcm-2", "mcm-4", "mcm-8"}
    assert json.loads(scores.read_text())["methods"].keys() == few
    run("package", models=models, work=logs, world=built, output=tmp_path / "packaged", scores=scores)
    packaged = tmp_path / "packaged" / "mcm-shapes-wan"
    settings = json.loads((packaged / "mcm_config.json").read_text())
    assert settings["base_model_repository"] == settings["training"]["pretrained_teacher_model"] == folder.name
    assert settings["sample"]["file"] == "sample.mp4" and (packaged / "sample.mp4").is_file()
    card = (packaged / "README.md").read_text()
    assert "mcm-shapes-wan" in card and str(tmp_path) not in card
    assert (
        "1 training captions × 1 seeds, 16 frames of each video." in card
        and "| teacher, Euler, 48 steps | 2 |" in card
    )
