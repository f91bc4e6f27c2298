"""Writes the LoRAs' cards in this folder: the packaged one from its own files, the released ones from released.json.

python model_cards/render.py
"""

import json
from pathlib import Path
from typing import Any

from diffusers_mcm.cards import CARD_NAME, TEMPLATE, check_card, render_card, render_folder_card
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.location import Location
from diffusers_mcm.settings import Settings

HERE = Path(__file__).parent
RELEASED = "yhzhai/mcm"
LICENCE = {"license": "other", "license_name": "see-repository", "license_link": f"https://huggingface.co/{RELEASED}"}
_ABOUT = """The paper's authors published this LoRA as the folder `{name}` of [{repository}](https://huggingface.co/{repository}).
This card is not theirs. It repeats what their paper and their public code say, and its writers could not download the
weights to check. Their licence is the one that repository names."""
_NOTE = (
    "What the paper and its authors' public code say; no configuration was saved with the weights. Where the two\n"
    "differ, the paper's value stands here."
)
_SHAPES = """It lives in a world of moving shapes, 64×64 pixels, and knows 576 sentences. It was distilled from
{videos:,} poor videos of {captions} captions and {images:,} clean images; no held-out caption was read (`data.json`).
How it was made, command by command, is in `examples/shapes/README.md`; the losses of its two stages are in
`train_log-appearance.jsonl` and `train_log.jsonl`."""


def shapes_card(folder: Path) -> str:
    """That of a packaged LoRA."""
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    videos, images = data["videos"], data["images/clean"]
    about = _SHAPES.format(videos=videos["items"], captions=videos["captions"], images=images["items"])
    return render_folder_card(folder, folder.name, about=about, license="apache-2.0")


def released_card(name: str, data: dict[str, Any]) -> str:
    """One of the authors' seven."""
    lora, base = data["loras"][name], data["bases"][data["loras"][name]["base_model"]]
    training = {
        "pretrained_teacher_model": base["base_model_repository"],
        **data["training"],
        **dict(zip(("guidance_min", "guidance_max"), base["guidance"])),
        "height": base["size"],
        "width": base["size"],
        "image_data": lora["image_data"],
    }
    settings = Settings(
        base_model=lora["base_model"],
        base_model_repository=base["base_model_repository"],
        extra_repositories=base.get("extra_repositories") or {},
        training=training,
    )
    scores = lora["scores"]
    if scores is not None:
        about = f"Reported by the paper ({scores['where']}), not measured here."
        scores = {"about": about, "columns": ["1 step", "2 steps", "4 steps", "8 steps"], "rows": scores["rows"]}
    return render_card(
        settings,
        title=f"{RELEASED}, {name}",
        place=Location(RELEASED, subfolder=name, remote=True),
        layout="peft",
        scores=[scores] if scores else (),
        about=_ABOUT.format(name=name, repository=RELEASED),
        training_note=_NOTE,
        **LICENCE,
    )


def all_cards() -> dict[str, str]:
    """File name -> text."""
    data = json.loads((HERE / "released.json").read_text(encoding="utf-8"))
    cards = {f"{name}.md": released_card(name, data) for name in data["loras"]}
    for file in PACKAGED_FOLDER.glob("*/data.json"):
        cards[f"{file.parent.name}.md"] = shapes_card(file.parent)
    for name, text in cards.items():
        check_card(text, name)
    return {**cards, "template.md": TEMPLATE.read_text(encoding="utf-8")}


if __name__ == "__main__":
    for name, text in all_cards().items():
        (HERE / name).write_text(text, encoding="utf-8")
    (PACKAGED_FOLDER / "mcm-shapes" / CARD_NAME).write_text(all_cards()["mcm-shapes.md"], encoding="utf-8")
