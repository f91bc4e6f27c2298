import errno
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm.files import DiskFullError
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.validation import NonFiniteSample, write_validation

from .world import CAPTIONS, tiny_config

PLAIN = dict(lambda_adv=0.0, image_data=None)  # losses that do not ask the VAE's decoder


def test_validation_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    clips = [(prompt, np.zeros((2, 16, 16, 3), dtype=np.uint8)) for prompt in ("a cat", "a dog")]
    folder = tmp_path / "validation" / "step-000001"
    assert write_validation(folder, clips, 8).ndim == 3
    assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "overview.png"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusers_mcm.training.validation.write_image", full)
    with pytest.raises(DiskFullError, match="No space left on the disk for the validation clips"):
        write_validation(folder.with_name("step-000002"), clips, 8)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]


def test_a_prompt_that_comes_again_has_a_clip_of_its_own(tmp_path):
    prompts = ("a cat (2)", "a cat", "a cat")
    clips = [(prompt, np.full((2, 16, 16, 3), 99 * n, dtype=np.uint8)) for n, prompt in enumerate(prompts)]
    picture = write_validation(tmp_path / "step", clips, 8)
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [
        "00.mp4",
        "01.mp4",
        "02.mp4",
        "overview.png",
    ]
    assert (tmp_path / "step" / "01.mp4").read_bytes() != (tmp_path / "step" / "02.mp4").read_bytes()
    one, two = (len(write_validation(tmp_path / f"{n}", clips[:n], 8)) for n in (1, 2))
    assert len(picture) - two == two - one > 0


def test_a_prompt_without_a_clip_keeps_its_number_free(tmp_path):
    clip = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    alone = write_validation(tmp_path / "one", [("a dog", clip)], 8)
    both = write_validation(tmp_path / "two", [("a cat", None), ("a dog", clip)], 8)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["01.mp4", "overview.png"]
    assert both.shape == alone.shape


def test_clips_that_are_not_finite_are_errors_and_the_run_loses_nothing(world, tmp_path, caplog):
    """They were black. The losses are finite: training goes on, everything is saved, and the end is an error."""
    prompts = CAPTIONS[:2]
    options = dict(PLAIN, validation_prompts=prompts, validation_steps=1, max_train_steps=2, checkpointing_steps=1)
    trainer = Trainer(tiny_config(world, tmp_path, **options))
    trainer.networks.student.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteSample, match=f"its LoRA is in {tmp_path}, but .* '{prompts[0]}' is not finite"):
        trainer.train()
    assert trainer.step == 2 and (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "README.md").is_file()
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (tmp_path / "sample.mp4").exists() and not (tmp_path / "validation").exists()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for step, prompt, message in zip((1, 1, 2, 2), prompts * 2, told):
        assert (
            f"The student of step {step} makes no clip of '{prompt}': the decoded frames (not the latents)" in message
        )
    assert len(told) == 5 and "The newest checkpoint is" in told[0]  # once more at the end


def test_latents_that_are_not_finite_are_told_from_frames_that_are_not(world, tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(world, tmp_path, **PLAIN))
    base = trainer.networks.base_model
    monkeypatch.setattr(base, "denoise", lambda *inputs: type(base).denoise(base, *inputs) * torch.inf)
    with pytest.raises(NonFiniteSample, match=r"the sampled latents hold \d+ values of \d+ that are NaN or infinite"):
        trainer.clip(CAPTIONS[0])
