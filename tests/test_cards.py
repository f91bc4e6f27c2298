"""Model cards: what they say comes from files, and the ones in `model_cards/` are never stale."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from diffusers_mcm.cards import TEMPLATE, check_card, render_card, render_folder_card
from diffusers_mcm.cli import main
from diffusers_mcm.commands.convert import build_parser
from diffusers_mcm.hub import PACKAGED_FOLDER, PACKAGED_MODELS
from diffusers_mcm.location import Location
from diffusers_mcm.publish import record_sample
from diffusers_mcm.settings import CONFIG_NAME, Settings
from tests.formats.world import edit_json
from tests.tiny import save_tiny_lora

CARDS = Path(__file__).parents[1] / "model_cards"
RELEASED = [
    *(f"modelscopet2v-{name}" for name in ("webvid", "laion", "anime", "real", "3d-cartoon")),
    *(f"animatediff-{name}" for name in ("webvid", "laion")),
]
LORAS = ["mcm-shapes", *RELEASED]
CONFIG = {
    "base_model": "animatediff",
    "base_model_repository": "owner/sd15",
    "extra_repositories": {"motion_adapter": "owner/adapter"},
    "sampling": {"num_inference_steps": 2},
    "training": {"steps": 70, "video_data": "../../alice/videos", "image_data": None, "license": "mit"},
}


def render(**changes):
    return render_card(Settings.from_dict({**CONFIG, **changes}), title="t", place=Location("me/mcm", remote=True))


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


# --- the cards in the repository -------------------------------------------------------------------------------------
def test_no_card_is_stale():
    cards = runpy.run_path(str(CARDS / "render.py"))["all_cards"]()
    assert cards.keys() == {f"{name}.md" for name in LORAS} | {"template.md"}
    for name, text in cards.items():
        assert (CARDS / name).read_text() == text, f"{name} is stale: run model_cards/render.py"
    for name in PACKAGED_MODELS:
        assert (PACKAGED_FOLDER / name / "README.md").read_text() == (CARDS / f"{name}.md").read_text(), name


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_has_all_that_the_hub_and_a_reader_want(name):
    text = (CARDS / f"{name}.md").read_text()
    check_card(text, name)
    data = metadata(text)
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-video"
    assert data["base_model"] and data["base_model_relation"] == "adapter" and data["license"]
    assert "lora" in data["tags"] and data["widget"][0]["text"] in text.split("## Use")[1]
    for heading in (
        "diffusers-mcm:",
        "diffusers alone:",
        "ComfyUI:",
        "## Training",
        "## Scores",
        "## Limits and risks",
    ):
        assert heading in text
    assert "deepfakes" in text and "prejudices in the data" in text and "$" not in text
    assert not re.search(r"\.\./|/home|/root|/tmp", text)


@pytest.mark.parametrize("name", LORAS)
def test_the_code_of_a_card_is_python_and_its_commands_are_known(name):
    text = (CARDS / f"{name}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    commands = re.findall(r"^diffusers-mcm convert (.*)$", text, re.MULTILINE)
    for command in commands:
        build_parser().parse_args(command.split())
    assert bool(commands) == (name == "mcm-shapes" or name.startswith("animatediff"))


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_card_claims_nothing_of_its_own(name):
    text = (CARDS / f"{name}.md").read_text()
    assert "This card is not theirs" in text and metadata(text)["license"] == "other"
    scores = text.split("## Scores")[1].split("## Limits")[0]
    assert ("Reported by the paper" in scores and "not measured here" in scores) or "None were measured" in scores


# --- any card --------------------------------------------------------------------------------------------------------
def test_a_card_says_what_the_configuration_says():
    text = render()
    data = metadata(text)
    assert data["base_model"] == ["owner/sd15", "owner/adapter"] and data["license"] == "mit"
    assert "| optimiser steps | 70 |" in text and "| videos | videos |" in text and "alice" not in text
    assert "num_inference_steps=2" in text and "appearance from those videos too" in text
    assert 'load_lora_weights("me/mcm")' in text and 'from_pretrained("me/mcm", subfolder="scheduler")' in text
    assert "appearance from images" in render(training={"image_data": "owner/images"})
    assert "No configuration of the training was saved" in render(training={})


def test_a_local_base_model_is_not_named():
    text = render(base_model_repository="../../home/alice/sd15", extra_repositories=None)
    assert "base_model" not in metadata(text) and "alice" not in text and "../" not in text


def test_prompts_cannot_break_the_card():
    prompt = 'a "quoted" cat: # $title \\ --- {x}'
    text = render(sample={"prompt": prompt, "file": "sample.mp4"})
    check_card(text)
    assert metadata(text)["widget"] == [{"text": prompt, "output": {"url": "sample.mp4"}}]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert prompt in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("base", ["modelscope", "animatediff", "wan"])
def test_a_folder_in_pefts_layout_has_the_code_for_it(tmp_path, base):
    """The LoRA loaders of diffusers' pipelines pass over its keys without a word."""
    save_tiny_lora(tmp_path / "ours", base="owner/base")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "peft"), "--to", "peft"]) == 0
    edit_json(tmp_path / "peft" / CONFIG_NAME, base_model=base, extra_repositories={"motion_adapter": "owner/adapter"})
    text = render_folder_card(tmp_path / "peft", "me/mcm")
    assert ("--to diffusers mcm" in text) == ('load_lora_weights("mcm")' in text) == (base != "modelscope")
    assert ('PeftModel.from_pretrained(pipe.unet, "me/mcm")' in text) == (base == "modelscope")


def test_a_folder_speaks_for_itself(tmp_path):
    save_tiny_lora(tmp_path, base="owner/base", training={"steps": 5})
    assert "sample.mp4" not in render_folder_card(tmp_path, "me/mcm")
    record_sample(tmp_path, [[[[0.0] * 3] * 16] * 16] * 4, "a blue ring", fps=8)
    scores = {"about": "On two prompts.", "columns": ["right, %"], "rows": [["MCM, 4 steps", "75.0"]]}
    scores["rows"].append(["rendered", None])  # not measured
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    text = render_folder_card(tmp_path, "me/mcm")
    assert metadata(text)["widget"][0] == {"text": "a blue ring", "output": {"url": "sample.mp4"}}
    assert "On two prompts.\n\n|  | right, % |\n| --- | --- |\n| MCM, 4 steps | 75.0 |\n| rendered | – |" in text
    evaluation = {"about": "Of 500 videos.", "columns": ["FVD (i3d)"], "rows": [["mcm4", "501.3"]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"protocol": {}, "table": evaluation}))
    both = render_folder_card(tmp_path, "me/mcm")
    assert "Of 500 videos.\n\n|  | FVD (i3d) |\n| --- | --- |\n| mcm4 | 501.3 |\n\nOn two prompts." in both
    (tmp_path / "sample.mp4").unlink()
    assert "output" not in metadata(render_folder_card(tmp_path, "me/mcm"))["widget"][0]
    assert ModelCard(text).data.base_model == "owner/base"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\ntags: [a\n---\n", "README.md begins with metadata that is not YAML"),
        ("---\nbase_model: ./base\n---\n", "base_model must be a repository such as 'owner/name', not './base'"),
        ("---\nlicense: [mit, other]\n---\n", "license must be text, not"),
        ("---\ntags: [1, 2]\n---\n", "tags must be a list of text"),
    ],
)
def test_metadata_that_the_hub_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        check_card(text)


def test_the_template_is_in_the_package():
    assert "$front_matter" in TEMPLATE.read_text()
