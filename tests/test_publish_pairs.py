"""Publishing the pair of LoRAs for two experts, and its card: both files in one commit, or nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, get_base_model
from diffusers_mcm.cards import check_card
from diffusers_mcm.lora import CONFIG_NAME, PAIR_NAMES, WEIGHTS_NAME, add_lora, read_loras, write_lora_pair
from diffusers_mcm.publish import Destination, publish_lora, record_sample
from tests.hub_server import hub_server
from tests.publishing import PROMPT, SECRET, STAGES, push
from tests.tiny import randomise_lora, save_lora
from tests.tiny_wan import BOUNDARY, SIZE, save_wan_base, tiny_wan_transformer

EXPERTS = tuple(PAIR_NAMES)
FILES = {"README.md", *PAIR_NAMES.values()}
CLIP = np.zeros((5, SIZE, SIZE, 3), np.uint8)


def save_half(folder, expert, seed, base="owner/a14b", **options):
    """The folder that a training leaves."""
    a14b, transformer = get_base_model("wan-a14b"), tiny_wan_transformer()
    add_lora(transformer, a14b.lora_target_modules(transformer), rank=2, alpha=2.0)
    randomise_lora(transformer, seed)
    sampling = dict(num_inference_steps=4, fps=5, num_frames=5, height=SIZE, width=SIZE)
    training = {"expert": expert, "steps": 10 * (seed + 1), "video_data": "../../home/alice/videos"}
    options = dict(scheduler=MCMFlowScheduler(shift=3.0, boundary=BOUNDARY), boundary=BOUNDARY) | options
    options = dict(repository=base, sampling=sampling, expert=expert, training=training) | options
    save_lora(folder, transformer, a14b, **options)
    config = json.loads((folder / CONFIG_NAME).read_text())  # the base model is a name, not a folder of that name
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"base_model_repository": str(options["repository"])}))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    save_wan_base(root / "owner" / "a14b", "wan-a14b")
    return root


@pytest.fixture
def server(root, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with hub_server(root) as server:
        server.token = SECRET
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield server


@pytest.fixture
def halves(tmp_path):
    return tuple(save_half(tmp_path / expert, expert, seed) for seed, expert in enumerate(EXPERTS))


@pytest.fixture
def pair(halves, tmp_path):
    write_lora_pair(tmp_path / "pair", dict(zip(EXPERTS, read_loras(halves))), "transformer")
    return tmp_path / "pair"


def same(first, second):
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def settings_in(content, tmp_path):
    (tmp_path / "header.safetensors").write_bytes(content)
    with safe_open(tmp_path / "header.safetensors", "pt") as file:
        return json.loads(file.metadata()["mcm_config"])


# --- there and back --------------------------------------------------------------------------------------------------
def test_both_files_card_and_sample_are_one_commit(server, pair, halves, root, tmp_path, caplog):
    (pair / "notes.txt").write_text("for nobody")
    assert push(pair) == 0
    assert "has no sample clip, without which nobody sees" in caplog.text
    repository = server.repositories["me/mcm"]
    assert repository.files.keys() == FILES and len(repository.messages) == 2
    record_sample(pair, CLIP, PROMPT, fps=5)
    caplog.clear()
    assert push(pair) == 0 and not caplog.text
    files = repository.files
    assert files.keys() == FILES | {"sample.mp4"} and len(repository.messages) == 3
    card = files["README.md"].decode()
    check_card(card)
    assert f"*{PROMPT}*" in card and "base_model: owner/a14b" in card and "two to eight network calls" in card
    assert "| optimiser steps | 10 | 20 |" in card and "| | high_noise | low_noise |" in card
    assert not [name for name, content in files.items() if b"alice" in content or b"../" in content]
    for expert, half in zip(EXPERTS, halves):
        assert same(pair / PAIR_NAMES[expert], half / WEIGHTS_NAME)
        said = settings_in(files[PAIR_NAMES[expert]], tmp_path)
        assert (said["expert"], said["boundary"], said["sample"]["prompt"]) == (expert, BOUNDARY, PROMPT)
    back = MCMPipeline.from_pretrained("me/mcm", cache_dir=tmp_path / "cache")
    here = MCMPipeline.from_pretrained(halves, base_model=root / "owner" / "a14b")
    assert back.scheduler.config.shift == 3.0
    videos = []
    for pipe in (back, here):
        pipe.set_progress_bar_config(disable=True)
        videos.append(pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent").frames)
    assert torch.equal(*videos)
    again = len(server.requests)
    assert push(pair) == 0
    assert len(repository.messages) == 3 and not [r for r in server.requests[again:] if r.startswith("PUT")]


@pytest.mark.parametrize("stage", ["upload", "commit"])
def test_a_failure_leaves_nothing_and_the_same_command_finishes_the_job(server, pair, stage):
    server.fail(STAGES[stage], 500, times=99)
    assert push(pair) == 2
    assert [repository.files for repository in server.repositories.values()] == [{}]
    server.faults.clear()
    assert push(pair) == 0
    assert server.repositories["me/mcm"].files.keys() == FILES


def test_a_pipeline_publishes_its_pair(server, halves, root, tmp_path):
    pipe = MCMPipeline.from_pretrained(halves, base_model=root / "owner" / "a14b")
    pipe.set_progress_bar_config(disable=True)
    address = pipe.push_to_hub("me/mcm", "From a pipeline", prompt=PROMPT)
    repository = server.repositories["me/mcm"]
    assert repository.files.keys() == FILES | {"sample.mp4"} and repository.messages[-1] == "From a pipeline"
    assert address.endswith(repository.branches["main"]) and f"*{PROMPT}*" in repository.files["README.md"].decode()
    pipe.save_mcm_lora(tmp_path / "saved")
    for expert, half in zip(EXPERTS, halves):
        (tmp_path / "published.safetensors").write_bytes(repository.files[PAIR_NAMES[expert]])
        assert same(tmp_path / "published.safetensors", half / WEIGHTS_NAME)
        assert same(tmp_path / "published.safetensors", tmp_path / "saved" / PAIR_NAMES[expert])
    pipe.unload_lora_weights()
    pipe.load_lora_weights(halves[1], "second", load_into_transformer_2=True)
    with pytest.raises(ValueError, match="'second' lies on transformer_2 alone, and is half a pair: a LoRA for each"):
        pipe.push_to_hub("me/mcm")
    assert len(repository.messages) == 2


def test_the_command_makes_the_clip_with_both(server, pair, root):
    before = {name: (pair / name).read_bytes() for name in PAIR_NAMES.values()}
    assert push(pair, "--prompt", PROMPT, "--device", "cpu", "--base_model", str(root / "owner" / "a14b")) == 2
    assert (pair / "sample.mp4").stat().st_size > 0
    assert {name: (pair / name).read_bytes() for name in before} != before  # the prompt is in their headers
    assert push(pair, "--dry_run") == 0 and push(pair) == 0
    assert server.repositories["me/mcm"].files["sample.mp4"] == (pair / "sample.mp4").read_bytes()


def test_a_card_is_made_anew_unless_somebody_has_edited_it(server, pair):
    assert push(pair) == 0
    repository = server.repositories["me/mcm"]
    (pair / "README.md").write_bytes(repository.files["README.md"])
    record_sample(pair, CLIP, PROMPT, fps=5)
    assert f"*{PROMPT}*" in (pair / "README.md").read_text()
    edited = (pair / "README.md").read_text() + "\nMine.\n"
    (pair / "README.md").write_text(edited)
    record_sample(pair, CLIP, "a blue ring", fps=5)
    assert (pair / "README.md").read_text() == edited and push(pair) == 0
    assert repository.files["README.md"].decode() == edited


def test_a_pair_of_another_maker_is_published_under_the_usual_names(server, pair, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for expert, name in zip(EXPERTS, ("T2V_HIGH_fp16", "T2V_LOW_fp16")):
        save_file(load_file(pair / PAIR_NAMES[expert]), bare / f"{name}.safetensors")
    (bare / "README.md").write_text("---\nlicense: mit\n---\nTheirs, of T2V_HIGH_fp16.safetensors\n")
    assert push(bare, "--base_model", "owner/a14b") == 0
    files = server.repositories["me/mcm"].files
    assert files.keys() == FILES and b"Theirs" not in files["README.md"]
    assert settings_in(files[PAIR_NAMES["low_noise"]], tmp_path)["base_model"] == "wan-a14b"


# --- what is not published -------------------------------------------------------------------------------------------
def test_a_pair_that_is_not_in_order_stays_at_home(server, pair, halves, tmp_path):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            publish_lora(folder, Destination("me/mcm"))
        assert server.requests == []

    refused(halves[0], "holds half a pair, the LoRA of the high_noise expert. Put it into one folder with the other")
    alone = shutil.copytree(pair, tmp_path / "alone")
    (alone / PAIR_NAMES["low_noise"]).unlink()
    refused(alone, "holds half a pair, the LoRA of the high_noise expert")
    save_file(load_file(alone / PAIR_NAMES["high_noise"]), alone / PAIR_NAMES["high_noise"])  # which says nothing
    refused(alone, "holds half a pair, the LoRA of the high_noise expert")
    cut = shutil.copytree(pair, tmp_path / "cut") / PAIR_NAMES["low_noise"]
    cut.write_bytes(cut.read_bytes()[:-10])
    refused(cut.parent, "low_noise_model.safetensors is damaged or not a safetensors file")
    lacking = shutil.copytree(pair, tmp_path / "lacking") / PAIR_NAMES["low_noise"]
    tensors = load_file(lacking)
    del tensors[next(key for key in tensors if ".lora_B." in key)]
    save_file(tensors, lacking)
    refused(lacking.parent, "low_noise_model.safetensors is incomplete: 1 of its .* modules have only one of lora_A")
    other = save_half(tmp_path / "other", "low_noise", 1, boundary=0.9)
    high = read_loras(halves)[0]
    write_lora_pair(tmp_path / "phases", {"high_noise": high, "low_noise": read_loras(other)}, "transformer")
    refused(tmp_path / "phases", "of one model, with the same boundary; got 0.875 of .* and 0.9 of ")
    local = save_half(tmp_path / "local", "low_noise", 1, base="../here/a14b")
    write_lora_pair(tmp_path / "mine", {"high_noise": high, "low_noise": read_loras(local)}, "transformer")
    refused(tmp_path / "mine", r"base model is recorded as the local folder '\.\./here/a14b'")
