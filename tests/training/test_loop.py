import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_mcm.losses import pseudo_huber
from diffusers_mcm.training.loop import Trainer, train
from diffusers_mcm.training.output import push_to_hub
from diffusers_mcm.training.tracking import NonFiniteLoss

from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flatten, tiny_config


def run(config) -> dict[str, torch.Tensor]:
    trainer = Trainer(config)
    trainer.train()
    return flatten(trainer.state())


def read_log(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run_leaves_a_complete_lora_folder(world, tmp_path):
    config = tiny_config(
        world,
        tmp_path / "lora",
        max_train_steps=1,
        validation_prompts=(CAPTIONS[0],),
        report_to="tensorboard",
        save_dtype="fp16",
    )
    out = train(config)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
        assert names and all(name.startswith("unet.") for name in names)
        assert file.get_tensor(names[0]).dtype == torch.float16
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 2
    assert LCMScheduler.from_pretrained(out / "scheduler").config.timestep_scaling == 4.0
    assert sum(key.startswith("target_motion.") for key in load_file(out / "motion_head.safetensors")) == 6
    saved = (out / "mcm_config.json").read_text()
    assert str(tmp_path) not in saved and world["video_data"] not in saved
    values = json.loads(saved)
    assert values["base_model"] == "modelscope" and values["sampling"]["num_inference_steps"] == 4
    assert (out / values["base_model_repository"]).resolve() == (out / world["pretrained_teacher_model"]).resolve()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "| motion representation | learnable |" in card and str(tmp_path) not in card
    assert (out / "validation/step-000001/00.mp4").stat().st_size and "step-000001/overview.png" in card
    assert list((out / "logs").rglob("events.out.tfevents*"))
    row = read_log(out)[0]
    expected = {"loss", "consistency", "adversarial", "discriminator", "gradient_penalty", "student_grad_norm"}
    assert expected <= row.keys() and row["step"] == 1
    assert row["loss"] == pytest.approx(row["consistency"] + row["adversarial"], rel=1e-5)


def test_a_resumed_run_is_bit_identical(world, tmp_path):
    options = dict(max_train_steps=3, gradient_accumulation_steps=2, train_batch_size=2)
    whole = run(tiny_config(world, tmp_path / "whole", **options))

    # Stopped in step 2, after the checkpoint of step 1.
    class Stopped(Trainer):
        def update(self):
            if self.step == 1:
                raise KeyboardInterrupt
            return super().update()

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        Stopped(tiny_config(world, parts, checkpointing_steps=1, **options)).train()
    resumed = run(tiny_config(world, parts, resume_from_checkpoint="latest", **options))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert without_time(read_log(tmp_path / "whole")) == without_time(read_log(parts))
    with pytest.raises(ValueError, match="lora_rank was 2, is 4"):
        Trainer(tiny_config(world, parts, resume_from_checkpoint="latest", **options | dict(lora_rank=4)))


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_accumulation_equals_one_big_batch(world, tmp_path, double):
    with double_precision() if double else nullcontext():
        trainer = Trainer(tiny_config(world, tmp_path / "whole", train_batch_size=4, **SPLIT))
        start = flatten(trainer.state())
        trainer.train()
        split = run(tiny_config(world, tmp_path / "split", train_batch_size=1, gradient_accumulation_steps=4, **SPLIT))
    assert_same_training(start, flatten(trainer.state()), split, double)


def test_plain_lcm_needs_no_discriminator_no_decoder_and_no_images(world, tmp_path, monkeypatch):
    def unwanted(*args, **kwargs):
        raise AssertionError("plain LCM must not use this")

    monkeypatch.setattr("diffusers_mcm.discriminator.Discriminator.from_pretrained", unwanted)
    monkeypatch.setattr("diffusers_mcm.training.batches.ImageDataset", unwanted)
    monkeypatch.setattr("diffusers_mcm.training.batches.FrameDataset", unwanted)
    monkeypatch.setattr("diffusers.AutoencoderKL.decode", unwanted)
    config = tiny_config(
        world | dict(image_data=None), tmp_path, motion="raw", lambda_real=1.0, lambda_adv=0.0, max_train_steps=1
    )
    out = train(config)
    assert {"adversarial", "discriminator"}.isdisjoint(read_log(out)[0])
    assert load_file(out / "motion_head.safetensors") == {}


def test_each_network_is_called_as_often_as_the_method_needs(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, max_train_steps=1, lambda_real=0.0))
    networks, calls = trainer.networks, []

    def count(name, module):
        module.register_forward_pre_hook(lambda module, args: calls.append((name, len(args[0]))))

    count("denoiser", networks.student.denoiser)
    count("features", networks.discriminator.features)
    decode, encode = networks.student.vae.decode, networks.student.vae.encode
    networks.student.vae.decode = lambda z, **k: calls.append(("decode", len(z))) or decode(z, **k)
    networks.student.vae.encode = lambda x, **k: calls.append(("encode", len(x))) or encode(x, **k)
    trainer.train()
    # One-step sample, teacher (both halves of the guidance), target, student; frames decoded once; nothing encoded.
    assert [size for name, size in calls if name == "denoiser"] == [4, 8, 4, 4]
    assert [size for name, size in calls if name in ("decode", "encode")] == [8]
    assert [size for name, size in calls if name == "features"] == [8, 8, 8]  # generated, real, interpolated


def test_nan_stops_the_run_with_its_cause_and_spoils_nothing(world, tmp_path, monkeypatch):
    before, calls = [], []

    def poisoned(*args):
        calls.append(args)
        return pseudo_huber(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr("diffusers_mcm.training.step.pseudo_huber", poisoned)
    trainer = Trainer(tiny_config(world, tmp_path, max_train_steps=3, checkpointing_steps=1))
    original = trainer.save
    trainer.save = lambda: (original(), before.append(flatten(trainer.state())))
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 2, samples 4 to 7: loss = nan, consistency = nan"):
        trainer.train()
    after = flatten(trainer.state())
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_gradient_checkpointing_changes_nothing_but_memory(world, tmp_path):
    options = dict(max_train_steps=1, lambda_adv=0.0, image_data=None)
    plain = run(tiny_config(world | options, tmp_path / "plain"))
    again = run(tiny_config(world | options, tmp_path / "again", gradient_checkpointing=True))
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_precision_that_the_machine_lacks_is_refused(world, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        Trainer(tiny_config(world, tmp_path, mixed_precision="fp16"))


def test_a_folder_that_is_no_pipeline_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        Trainer(tiny_config(world | dict(pretrained_teacher_model=str(tmp_path)), tmp_path / "out"))


def test_half_precision_keeps_what_is_trained_in_fp32_and_video_frames_stand_in_for_images(world, tmp_path):
    options = dict(image_data=None, mixed_precision="bf16", max_train_steps=1, validation_prompts=(CAPTIONS[0],))
    trainer = Trainer(tiny_config(world | options, tmp_path, push_to_hub=False))
    trainer.train()
    student = trainer.networks.student
    assert student.vae.dtype == student.denoiser.conv_in.weight.dtype == torch.bfloat16
    trained = [parameter for part in trainer.parts for parameter in part.parameters]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert read_log(tmp_path)[0]["discriminator"] > 0


def test_only_what_belongs_to_the_model_is_pushed(world, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, name, **options):
            calls.update(name=name, **options)
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **options):
            calls.update(options)
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config = tiny_config(world, tmp_path / "lora", push_to_hub=True, hub_token="hf_x", hub_private_repo=True)
    assert push_to_hub(tmp_path / "lora", config) == "https://hub/commit"
    assert calls["name"] == "lora" and calls["repo_id"] == "me/lora" and calls["private"] and calls["token"] == "hf_x"
    assert {"checkpoint-*/**", "logs/**"} <= set(calls["ignore_patterns"])
