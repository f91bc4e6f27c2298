"""What a model can draw, where its folder says so: `grammar.json`, which the packaged models have.

{"template": "a {colour} {shape}", "words": {"colour": ["red", "blue"], "shape": ["circle"]}}
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GRAMMAR_NAME = "grammar.json"
_INSTEAD = "--model yhzhai/mcm --subfolder modelscopet2v-laion"


def read_grammar(model: str | os.PathLike | None) -> dict[str, Any] | None:
    """The grammar of a base model in a folder; `None` if it says nothing, and so may draw anything."""
    path = Path(model or "", GRAMMAR_NAME)
    return json.loads(path.read_text(encoding="utf-8")) if model and path.is_file() else None


def is_drawn(prompt: str, grammar: dict[str, Any]) -> bool:
    """Whether a prompt is a sentence of the grammar, however it is written in capitals and spaced."""
    sentence = re.escape(grammar["template"])
    for name, words in grammar["words"].items():
        sentence = sentence.replace(re.escape(f"{{{name}}}"), f"(?:{'|'.join(map(re.escape, words))})")
    return re.fullmatch(sentence, " ".join(prompt.split()), re.IGNORECASE) is not None


def notice(prompts: Iterable[str], model: str | os.PathLike | None, name: str) -> str | None:
    """What to say of prompts that the base model in the folder `model` cannot draw; `None` if there are none."""
    grammar = read_grammar(model)
    foreign = [prompt for prompt in prompts if grammar and not is_drawn(prompt, grammar)]
    if not grammar or not foreign:
        return None
    choices = {key: f"{{{'|'.join(words)}}}" for key, words in grammar["words"].items()}
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    return (
        f"{name} cannot draw {foreign[0]!r}{more}: all it knows is «{grammar['template'].format(**choices)}», and it"
        f" shows something of that whatever it is asked for. For other prompts: {_INSTEAD}, or another --model."
    )
