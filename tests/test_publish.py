"""Publishing with the real client against the tests' own Hub: one commit or nothing, and the same command again."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_mcm import MCMPipeline
from diffusers_mcm.card_text import without_seal
from diffusers_mcm.cards import render_folder_card
from diffusers_mcm.cli import main
from diffusers_mcm.location import Location
from diffusers_mcm.lora import CONFIG_NAME, WEIGHTS_NAME, read_lora, write_lora_pair, write_lora_weights
from diffusers_mcm.publish import Destination, publish_lora, record_sample
from diffusers_mcm.settings import Settings
from tests import publishing
from tests.publishing import FILES, PROMPT, SECRET, STAGES, edited_on_the_hub, make_lora, push, sample
from tests.tiny import NUM_FRAMES, save_tiny_lora

root, server, lora = publishing.root, publishing.server, publishing.lora


# --- there and back --------------------------------------------------------------------------------------------------
LOAD = f"""
import hashlib, sys, torch
from diffusers_mcm import MCMPipeline
pipe = MCMPipeline.from_pretrained("me/mcm", revision=sys.argv[1])
for module in (pipe.unet, pipe.vae, pipe.text_encoder):  # see tests.tiny.realign
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
frames = pipe({PROMPT!r}, generator=torch.Generator().manual_seed(0), num_frames={NUM_FRAMES}, output_type="pt").frames
print(hashlib.sha256(frames.numpy().tobytes()).hexdigest())
"""


def load_elsewhere(revision, home, **environment):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the last bit depends on it
    command = [sys.executable, "-c", LOAD, revision]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip()


def test_a_lora_of_real_size_is_pushed_and_loaded_by_another_process_and_offline(server, tmp_path):
    convolutions = ["mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"]
    folder = make_lora(tmp_path / "big", modules=convolutions, rank=17_000)
    assert (folder / WEIGHTS_NAME).stat().st_size > 20e6
    assert push(folder) == 0
    repository = server.repositories["me/mcm"]
    assert repository.messages == ["initial commit", "Upload a motion consistency LoRA"]
    assert repository.files.keys() == FILES
    commit = repository.branches["main"]
    here = MCMPipeline.from_pretrained(folder, base_model=server.root / "owner" / "base")
    frames = sample(here).numpy()
    make_lora(folder, seed=5)  # what comes later is no part of the commit that is asked for
    assert push(folder) == 0
    assert repository.branches["main"] != commit
    there = load_elsewhere(commit, tmp_path / "home", HF_ENDPOINT=server.url)
    assert there == hashlib.sha256(frames.tobytes()).hexdigest()
    requests = len(server.requests)
    offline = load_elsewhere(commit, tmp_path / "home", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert offline == there and len(server.requests) == requests


def test_what_is_pushed_is_what_was_there(server, lora, tmp_path):
    (lora / "motion_head.safetensors").write_bytes((lora / WEIGHTS_NAME).read_bytes())
    (lora / "notes.txt").write_text("for nobody")
    (lora / "checkpoint-1").mkdir()
    (lora / "checkpoint-1" / "training_state.pt").write_bytes(b"optimiser")
    assert push(lora, "--message", "First") == 0
    repository = server.repositories["me/mcm"]
    assert repository.files.keys() == FILES | {"motion_head.safetensors"} and repository.messages[-1] == "First"
    back = read_lora("me/mcm", cache_dir=tmp_path / "cache")
    before = read_lora(lora)
    assert back.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(back.tensors[key], before.tensors[key]) for key in before.tensors)
    assert back.settings == before.settings and back.scheduler_config == before.scheduler_config
    again = len(server.requests)
    assert push(lora) == 0  # nothing has changed: nothing is uploaded, and there is no empty commit
    assert len(repository.messages) == 2 and not [r for r in server.requests[again:] if r.startswith("PUT")]


# --- what goes wrong on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [500, "cut"])
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_failure_the_same_command_finishes_the_job(server, lora, capsys, stage, how):
    server.fail(STAGES[stage], how, times=99)
    assert push(lora) == 2
    error = capsys.readouterr().err
    assert "Publishing me/mcm failed. The Hub " in error and "Traceback" not in error
    assert ("failed with status 500" if how == 500 else "cannot be reached") in error
    assert stage == "create" or "the same command finishes the job" in error
    assert [repository.files for repository in server.repositories.values()] in ([], [{}])  # never half a model
    assert (lora / WEIGHTS_NAME).is_file()
    server.faults.clear()
    assert push(lora) == 0
    assert server.repositories["me/mcm"].files.keys() == FILES


def test_a_failure_leaves_the_older_version_whole(server, lora):
    assert push(lora) == 0
    before = server.repositories["me/mcm"].files
    make_lora(lora, seed=7)
    server.fail(STAGES["commit"], 500, times=99)
    assert push(lora) == 2 and server.repositories["me/mcm"].files == before
    server.faults.clear()
    assert push(lora) == 0
    after = server.repositories["me/mcm"].files
    assert {name for name in after if after[name] != before[name]} == {WEIGHTS_NAME}


def test_a_connection_cut_once_is_taken_up_again(server, lora):
    server.fail("PUT /lfs", "cut")
    assert push(lora) == 0
    assert server.repositories["me/mcm"].files.keys() == FILES


def test_the_token_is_told_to_nobody(server, lora, capsys, caplog, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    assert push(lora, "--token", SECRET) == 0
    server.fail("POST", 500, times=99)
    assert push(lora, "--token", SECRET) == 2
    server.faults.clear()
    assert push(lora, "--token", f"{SECRET}\n") == 0
    assert push(lora, "--token", f"{SECRET}\n{SECRET}") == 2
    shown = capsys.readouterr()
    assert "The token holds a space, a line break or another character that no token has" in shown.err
    assert f"Bearer {SECRET}" in server.tokens
    everything = [shown.out, shown.err, caplog.text]
    everything += [path.read_bytes().decode("latin1") for path in lora.rglob("*") if path.is_file()]
    everything += [content.decode("latin1") for content in server.repositories["me/mcm"].files.values()]
    assert not [text for text in everything if SECRET in text]


@pytest.mark.parametrize("by_default", [False, True])
def test_visibility_is_the_accounts_or_what_is_asked_for_and_never_changes(server, lora, capsys, by_default):
    server.private_by_default = by_default
    assert push(lora) == 0
    assert server.repositories["me/mcm"].private is by_default
    assert push(lora, "--public" if by_default else "--private") == 2
    assert "me/mcm exists and is " + ("private" if by_default else "public") in capsys.readouterr().err
    assert server.repositories["me/mcm"].private is by_default
    assert push(lora, "--private" if by_default else "--public") == 0
    assert main(["push", str(lora), "other", "--public" if by_default else "--private"]) == 0
    assert server.repositories["me/other"].private is not by_default


# --- what is not published -------------------------------------------------------------------------------------------
def truncate(folder):
    (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-10])


def break_yaml(folder):
    (folder / "README.md").write_text("---\ntags: [a\n---\n")


def forge_base(folder):
    (folder / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")


def make_half(folder):
    settings = Settings.read(Location.of(folder))
    replace(settings, expert="low_noise").write(folder)


def make_pair(folder):
    lora = read_lora(folder)
    write_lora_pair(folder, {"high_noise": lora, "low_noise": lora}, "unet")


def break_config(folder):
    (folder / CONFIG_NAME).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is damaged or not a safetensors file"),
        (break_config, "mcm_config.json is not valid JSON"),
        (break_yaml, "README.md begins with metadata that is not YAML"),
        (forge_base, "base_model must be a repository such as 'owner/name', not '/home/me/base'"),
        (lambda folder: (folder / "sample.mp4").unlink(), "has no sample clip"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "No LoRA in"),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "holds a whole pipeline"),
        (make_half, "holds half a pair, the LoRA of the low_noise expert. Put it into one folder with the other"),
        (make_pair, "was made for base model 'modelscope', which has one denoiser; a pair is for two experts"),
    ],
)
def test_a_folder_that_is_not_in_order_stays_at_home(server, lora, spoil, message):
    spoil(lora)
    with pytest.raises((ValueError, OSError), match=message):
        publish_lora(lora, Destination("me/mcm"))
    assert server.requests == []


def test_names_that_cannot_be(server, lora, tmp_path):
    with pytest.raises(ValueError, match="Expected a repository such as 'owner/name', got 'a/b/c'"):
        publish_lora(lora, Destination("a/b/c"))
    with pytest.raises(ValueError, match="Expected a LoRA folder, got .*nowhere"):
        publish_lora(tmp_path / "nowhere", Destination("me/mcm"))
    assert server.requests == []


def test_paths_of_this_machine_are_not_published(server, root, tmp_path):
    training = {"video_data": "../../home/alice/videos", "image_data": "owner/pictures", "steps": 3}
    lora = make_lora(tmp_path / "lora", base=root / "owner" / "base", training=training)
    with pytest.raises(ValueError, match=r"recorded as the local folder '\.\./.*base', .*`--base_model`"):
        publish_lora(lora, Destination("me/mcm"))
    publish_lora(lora, Destination("me/mcm"), base_model="owner/base")
    files = server.repositories["me/mcm"].files
    assert not [name for name, content in files.items() if b"../" in content or b"alice" in content]
    published = json.loads(files[CONFIG_NAME])
    assert published["base_model_repository"] == "owner/base"
    assert (published["training"]["video_data"], published["training"]["image_data"]) == ("videos", "owner/pictures")
    assert "base_model: owner/base" in files["README.md"].decode()
    assert "../../home/alice" in (lora / CONFIG_NAME).read_text()  # at home it stays useful


def test_a_component_that_only_this_machine_has_is_not_published(server, root, tmp_path):
    lora = make_lora(tmp_path / "lora", extra_repositories={"motion_adapter": root / "owner" / "base"})
    with pytest.raises(ValueError, match=r"motion_adapter is recorded .* `extra_repositories` in .*mcm_config.json"):
        publish_lora(lora, Destination("me/mcm"))
    assert server.requests == []


def test_a_new_sample_is_in_the_card(tmp_path):
    folder = save_tiny_lora(tmp_path / "lora", base="owner/base")
    card = folder / "README.md"
    card.write_text(render_folder_card(folder, "lora"))
    record_sample(folder, np.zeros((NUM_FRAMES, 16, 16, 3), np.uint8), PROMPT, fps=8)
    assert card.read_text() == render_folder_card(folder, "lora") and f"*{PROMPT}*" in card.read_text()
    edited = card.read_text() + "mine\n"
    card.write_text(edited)
    record_sample(folder, np.zeros((NUM_FRAMES, 16, 16, 3), np.uint8), "a blue ring", fps=8)
    assert card.read_text() == edited


def test_a_card_that_was_edited_is_published_as_it_is(server, lora):
    push(lora)
    assert '"me/mcm"' in server.repositories["me/mcm"].files["README.md"].decode()  # made anew for its repository
    (lora / "grid.png").write_bytes(b"picture")
    text = (lora / "README.md").read_text() + "\n![some samples](grid.png)\n"
    (lora / "README.md").write_text(text)
    push(lora)
    files = server.repositories["me/mcm"].files
    assert files["README.md"].decode() == text and files["grid.png"] == b"picture"


@pytest.mark.parametrize("make", [str, without_seal], ids=["sealed", "of an older version"])
def test_a_card_that_nobody_has_edited_is_made_anew_with_what_lies_there_now(server, lora, make):
    (lora / "README.md").write_text(make(render_folder_card(lora, "lora")))
    if make is str:  # one without a seal is known by its text alone
        scores = {"about": "On 500 videos.", "columns": ["FVD"], "rows": [["4 steps", 123.4]]}
        (lora / "evaluation.json").write_text(json.dumps({"table": scores}))
    push(lora)
    files = server.repositories["me/mcm"].files
    card = files["README.md"].decode()
    assert 'from_pretrained("me/mcm"' in card and ("| 4 steps | 123.4 |" in card) == (make is str)


def test_what_the_card_does_not_show_stays_at_home(server, lora):
    for name in ("data", "videos", "steps", "lora", "er.png"):  # words of the card, or parts of them
        (lora / name).write_bytes(b"mine")
    (lora / "teaser.png").write_bytes(b"picture")
    (lora / "README.md").write_text((lora / "README.md").read_text() + '\n<img src="./teaser.png">\n')
    push(lora)
    assert server.repositories["me/mcm"].files.keys() == FILES | {"teaser.png"}


def test_a_card_of_another_tool_is_not_published(server, lora):
    """Beside weights that say their settings themselves, and no configuration of ours."""
    write_lora_weights(lora / WEIGHTS_NAME, {"unet": read_lora(lora)})
    (lora / CONFIG_NAME).unlink()
    (lora / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n")
    assert push(lora) == 0
    assert "Model Card for Model ID" not in server.repositories["me/mcm"].files["README.md"].decode()


def test_a_card_that_was_edited_on_the_hub_stays(server, lora, caplog):
    assert push(lora) == 0
    repository = server.repositories["me/mcm"]
    edited = edited_on_the_hub(server)
    (lora / "README.md").write_text((lora / "README.md").read_text() + "\nBy hand, at home.\n")  # even so
    make_other = save_tiny_lora(lora.parent / "other", base="owner/base", seed=5)
    (lora / WEIGHTS_NAME).write_bytes((make_other / WEIGHTS_NAME).read_bytes())
    before = repository.files[WEIGHTS_NAME]
    for _ in range(2):
        caplog.clear()
        assert push(lora) == 0
        assert repository.files["README.md"] == edited and repository.files[WEIGHTS_NAME] != before
        assert (
            "The card of me/mcm was edited on the Hub and stays" in caplog.text and "--overwrite_card" in caplog.text
        )
    assert push(lora, "--overwrite_card") == 0
    assert repository.files["README.md"].decode() == (lora / "README.md").read_text()
    caplog.clear()
    (lora / "README.md").write_text((lora / "README.md").read_text() + "\nMore.\n")
    assert push(lora) == 0 and not caplog.text  # what the last push has put there is nobody's edit
    assert repository.files["README.md"].decode() == (lora / "README.md").read_text()


def test_cards_that_nobody_has_edited_on_the_hub_are_replaced(server, lora, caplog):
    assert push(lora) == 0
    repository = server.repositories["me/mcm"]
    for line in ("First.", "Second."):  # edited at home, again and again
        (lora / "README.md").write_text((lora / "README.md").read_text() + f"\n{line}\n")
        assert push(lora) == 0 and repository.files["README.md"].decode().endswith(f"\n{line}\n")
    files = repository.files
    repository.commit("main", {**files, "README.md": files["README.md"].replace(b"\n", b"\r\n")}, "no word changed")
    (lora / "README.md").write_text((lora / "README.md").read_text() + "\nThird.\n")
    assert push(lora) == 0 and b"Third." in repository.files["README.md"]
    assert not caplog.text


def test_a_branch_and_a_pull_request_keep_an_edited_card(server, lora):
    assert push(lora, "--revision", "v1") == 0
    edited = edited_on_the_hub(server, branch="v1")
    make_lora(lora, seed=3)
    assert push(lora, "--revision", "v1") == 0
    assert server.repositories["me/mcm"].at("v1")[1]["README.md"] == edited
    assert push(lora) == 0  # nothing of it on main
    edited = edited_on_the_hub(server)
    make_lora(lora, seed=4)
    assert push(lora, "--create_pr") == 0
    assert server.repositories["me/mcm"].at("refs/pr/1")[1]["README.md"] == edited


def test_an_edit_that_comes_in_between_is_not_overwritten(server, lora, monkeypatch, capsys):
    from huggingface_hub import HfApi

    assert push(lora) == 0
    list_commits, edited = HfApi.list_repo_commits, []

    def late(self, *arguments, **options):
        found = list_commits(self, *arguments, **options)
        edited.append(edited_on_the_hub(server, text="Late."))
        return found

    make_lora(lora, seed=3)
    (lora / "README.md").write_text((lora / "README.md").read_text() + "\nMine.\n")
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "list_repo_commits", late)
        assert push(lora) == 2
    assert "Publishing me/mcm failed" in capsys.readouterr().err
    assert server.repositories["me/mcm"].files["README.md"] == edited[0]
    assert push(lora) == 0
    assert server.repositories["me/mcm"].files["README.md"] == edited[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_card_from_another_editor_is_published_in_utf8(server, lora, encoding):
    text = "---\nlicense: mit\n---\n\nUn café\n"
    (lora / "README.md").write_bytes(text.encode(encoding))
    assert push(lora) == 0
    assert server.repositories["me/mcm"].files["README.md"].decode("utf-8") == text


# --- reading ---------------------------------------------------------------------------------------------------------
def test_a_repository_that_cannot_be_read(server, lora, tmp_path):
    push(lora)
    options = dict(cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="There is no repository me/missing on the Hub, or it is private"):
        MCMPipeline.from_pretrained("me/missing", **options)
    with pytest.raises(OSError, match="me/mcm has no revision 'v9'"):
        MCMPipeline.from_pretrained("me/mcm", revision="v9", **options)
    server.repositories["me/mcm"].gated = True
    with pytest.raises(OSError, match="me/mcm is gated: accept its terms"):
        MCMPipeline.from_pretrained("me/mcm", **options)
    server.fail("HEAD", 401, times=99)
    with pytest.raises(OSError, match="The Hub refuses the token|may not see it"):
        MCMPipeline.from_pretrained("me/mcm", **options)
    server.faults.clear()
    server.fail("HEAD", 500, times=99)
    with pytest.raises(OSError, match="is not in the cache, and the Hub cannot be asked"):
        MCMPipeline.from_pretrained("me/mcm", **options)
