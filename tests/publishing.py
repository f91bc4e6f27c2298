"""A Hub to publish to, a LoRA folder to publish, and somebody who edits there."""

import numpy as np
import pytest
import torch

from diffusers_mcm.cards import render_folder_card
from diffusers_mcm.cli import main
from diffusers_mcm.lora import CONFIG_NAME, WEIGHTS_NAME
from diffusers_mcm.publish import record_sample
from tests.hub_server import hub_server
from tests.tiny import NUM_FRAMES, realign, save_tiny_base, save_tiny_lora

PROMPT = "a red circle moving left on a black background"
SECRET = "hf_" + "s3cret" * 5
FILES = {"README.md", CONFIG_NAME, WEIGHTS_NAME, "sample.mp4", "scheduler/scheduler_config.json"}


def make_lora(folder, base="owner/base", **options):
    save_tiny_lora(folder, base=base, **options)
    record_sample(folder, np.zeros((NUM_FRAMES, 16, 16, 3), np.uint8), PROMPT, fps=8)
    (folder / "README.md").write_text(render_folder_card(folder, folder.name))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What the Hub has: a base model. Beside it, on this machine: a LoRA folder."""
    root = tmp_path_factory.mktemp("hub")
    save_tiny_base(root / "owner" / "base")
    return root


@pytest.fixture
def server(root, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    with hub_server(root) as server:
        server.token = SECRET
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield server


@pytest.fixture
def lora(tmp_path):
    return make_lora(tmp_path / "my-lora")


def sample(pipe):
    realign(pipe)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, generator=generator, num_frames=NUM_FRAMES, output_type="pt").frames


def push(folder, *arguments):
    return main(["push", str(folder), "me/mcm", *arguments])


STAGES = {
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "preupload",
    "batch": "objects/batch",
    "upload": "PUT /lfs",
    "verify": "POST /verify",
    "commit": "POST .*/commit/",
}


def edited_on_the_hub(server, name="me/mcm", branch="main", text="By hand, on the Hub."):
    """Somebody writes something at the end of the card there."""
    repository = server.repositories[name]
    files = dict(repository.at(branch)[1])
    files["README.md"] += f"\n{text}\n".encode()
    repository.commit(branch, files, "Update README.md")
    return files["README.md"]
