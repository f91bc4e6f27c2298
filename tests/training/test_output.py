"""What a run leaves on the Hub."""

import dataclasses
import logging
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_mcm.cards import check_card
from diffusers_mcm.cli import main
from diffusers_mcm.publish import PublishError
from diffusers_mcm.training.loop import Trainer, train
from diffusers_mcm.training.output import push_command
from diffusers_mcm.training.validation import NonFiniteSample
from tests.hub_server import hub_server
from tests.reads import reads

from .world import tiny_config


@pytest.fixture
def published(world, tmp_path, monkeypatch):
    """A Hub, and the flags of a run whose teacher others have too."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("diffusers_mcm.hub.PACKAGED_FOLDER", tmp_path / "packaged")
    shutil.copytree(world["pretrained_teacher_model"], tmp_path / "packaged" / "mcm-shapes-teacher")
    options = dict(pretrained_teacher_model="mcm-shapes-teacher", max_train_steps=1, lambda_adv=0.0, image_data=None)
    with hub_server(tmp_path / "hub") as server:
        server.token = "hf_secret"
        options |= dict(push_to_hub=True, hub_model_id="me/mcm", hub_token=server.token)
        yield server, tiny_config(world, tmp_path / "out dir", **options, report_to="tensorboard")


def test_a_run_is_published_in_one_commit_without_its_secrets_and_paths(published, tmp_path, caplog, capsys):
    server, config = published
    caplog.set_level(logging.INFO)
    with reads() as found:
        train(config)
    ours = [str(Path(config.output_dir, name)) for name in ("pytorch_lora_weights.safetensors", "mcm_config.json")]
    assert [found[path] for path in ours] == [0, 0]  # it publishes what it has in memory
    repository = server.repositories["me/mcm"]
    assert len(repository.messages) == 2 and f"commit/{repository.branches['main']}" in caplog.text
    expected = {"README.md", "mcm_config.json", "motion_head.safetensors", "pytorch_lora_weights.safetensors"}
    assert repository.files.keys() == expected | {"sample.mp4", "scheduler/scheduler_config.json"}
    card = repository.files["README.md"].decode()
    check_card(card)
    assert "base_model: mcm-shapes-teacher" in card and "| optimiser steps | 1 |" in card and "sample.mp4" in card
    assert 'from_pretrained("me/mcm")' in card and "| videos | videos |" in card
    shown = capsys.readouterr()
    told = [repr(config), caplog.text, shown.out, shown.err]
    told += [content.decode("latin1") for content in repository.files.values()]
    assert not [text for text in told if "hf_secret" in text] and not [text for text in told[4:] if "../" in text]
    written = [path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert any(b"tensorboard" in content or b"scalar" in content for content in written)
    assert not [content for content in written if b"hf_secret" in content]


def test_a_run_that_could_not_be_published_is_whole_and_says_how_to_go_on(published, monkeypatch):
    server, config = published
    server.fail("POST .*/commit/", 500, times=99)
    with pytest.raises(
        PublishError, match="status 500.*publish it with: diffusers-mcm push '.*out dir' me/mcm"
    ) as error:
        train(config)
    assert server.repositories["me/mcm"].files == {}
    server.faults.clear()
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert main(shlex.split(str(error.value).split("publish it with: ")[1])[1:]) == 0
    assert "pytorch_lora_weights.safetensors" in server.repositories["me/mcm"].files


def test_what_could_not_be_published_is_told_before_the_training(published, world, monkeypatch):
    server, config = published
    monkeypatch.setattr("diffusers_mcm.training.run.build_networks", lambda *_: pytest.fail("too late"))
    with pytest.raises(PublishError, match="The Hub refuses the token"):
        Trainer(dataclasses.replace(config, hub_token="hf_wrong"))
    with pytest.raises(ValueError, match="is a folder of this machine.*then run: diffusers-mcm push .* --base_model"):
        Trainer(dataclasses.replace(config, pretrained_teacher_model=world["pretrained_teacher_model"]))
    local = (f"motion_adapter={world['pretrained_teacher_model']}",)
    with pytest.raises(ValueError, match="others will load the motion_adapter, but .* is a folder of this machine"):
        Trainer(dataclasses.replace(config, extra_repositories=local))
    assert server.repositories == {}


def test_a_card_edited_on_the_hub_stays_unless_the_run_may_replace_it(published, caplog):
    server, config = published
    train(config)
    repository, edit = server.repositories["me/mcm"], b"By hand, on the Hub."
    repository.commit(
        "main", repository.files | {"README.md": repository.files["README.md"] + edit}, "Update README.md"
    )
    again = dataclasses.replace(config, max_train_steps=2, resume_from_checkpoint="latest")  # starts anew
    train(again)
    assert edit in repository.files["README.md"] and "--overwrite_card" in caplog.text
    out = train(dataclasses.replace(again, overwrite_card=True))
    card = repository.files["README.md"]
    assert edit not in card and b"| optimiser steps | 2 |" in card
    assert "overwrite_card" not in (out / "mcm_config.json").read_text()
    assert push_command(again).split()[-1] == "me/mcm"
    assert push_command(dataclasses.replace(again, overwrite_card=True)).endswith(" me/mcm --overwrite_card")


def test_a_lora_that_makes_nan_is_not_published(published):
    server, config = published
    trainer = Trainer(config)
    trainer.networks.student.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteSample, match="It was not published; that would be: diffusers-mcm push '.*' me/mcm"):
        trainer.train()
    assert server.repositories["me/mcm"].files == {}
    assert Path(config.output_dir, "pytorch_lora_weights.safetensors").is_file()
