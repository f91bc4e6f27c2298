"""`diffusers-mcm push`."""

import json

from diffusers_mcm.cli import main
from diffusers_mcm.lora import CONFIG_NAME
from tests import publishing
from tests.publishing import FILES, PROMPT, push
from tests.tiny import save_tiny_lora

root, server, lora = publishing.root, publishing.server, publishing.lora


def test_a_branch_and_a_pull_request(server, lora, capsys):
    assert push(lora, "--revision", "v1") == 0
    repository = server.repositories["me/mcm"]
    assert repository.files == {} and repository.at("v1")[1].keys() == FILES
    assert push(lora, "--create_pr") == 0
    assert repository.files == {} and repository.at("refs/pr/1")[1].keys() == FILES
    assert "me/mcm/discussions/1" in capsys.readouterr().out


def test_a_dry_run_asks_nobody(server, lora, capsys):
    assert push(lora, "--dry_run") == 0
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert listed == FILES and server.requests == []


def test_a_wrong_token_and_a_name_of_somebody_else(server, lora, capsys):
    assert push(lora, "--token", "hf_wrong") == 2
    assert "The Hub refuses the token. Log in with `hf auth login`" in capsys.readouterr().err
    assert server.repositories == {}
    assert main(["push", str(lora), "others/mcm"]) == 2
    assert "The token may not do this to others/mcm" in capsys.readouterr().err


def test_the_command_makes_the_clip(server, root, tmp_path, capsys):
    lora = save_tiny_lora(tmp_path / "lora", base=root / "owner" / "base")
    base = str(root / "owner" / "base")
    assert push(lora, "--base_model", "owner/base") == 2
    assert "has no sample clip" in capsys.readouterr().err
    assert push(lora, "--prompt", PROMPT, "--device", "cpu", "--dry_run", "--base_model", base) == 2
    assert "recorded as the local folder" in capsys.readouterr().err
    assert (lora / "sample.mp4").stat().st_size > 0 and json.loads((lora / CONFIG_NAME).read_text())["sample"]
    assert push(lora, "--base_model", "owner/base") == 0
    assert server.repositories["me/mcm"].files["sample.mp4"] == (lora / "sample.mp4").read_bytes()
