"""What the text of a model card tells by itself: whether anybody has edited it, and which files it shows."""

import hashlib
import re
from urllib.parse import unquote

# The last line of a card that was made here, which no reader sees: the hash of all that is above it.
_SEAL = re.compile(r"\n<!-- made by diffusers-mcm: ([0-9a-f]{64}) -->\n*\Z")
_SHOWN = re.compile(
    r"""\]\(\s*<?([^)>\s]+)  # [text](file), ![text](file)
    |\b(?:src|href|poster)\s*=\s*["']([^"']+)
    |^\s*(?:-\s+)?url:\s*["']?([^"'\n]+)""",  # of a widget's output, in the metadata
    re.VERBOSE | re.MULTILINE,
)


def sealed(text: str) -> str:
    """A card with the line by which `is_untouched` knows it."""
    return f"{text.rstrip()}\n\n<!-- made by diffusers-mcm: {_hash(text)} -->\n"


def is_untouched(text: str) -> bool | None:
    """Whether a card is as it was `sealed`, whatever ends its lines; `None` for one that never was."""
    text = text.replace("\r\n", "\n")
    seal = _SEAL.search(text)
    return None if seal is None else seal[1] == _hash(text[: seal.start()])


def without_seal(text: str) -> str:
    """A card as it was before it was `sealed`; any other as it is."""
    seal = _SEAL.search(text)
    return text if seal is None else f"{text[: seal.start()].rstrip()}\n"


def files_shown(text: str) -> set[str]:
    """The files beside a card that it links to or shows, as paths from its folder."""
    found = (unquote(next(filter(None, groups))).strip() for groups in _SHOWN.findall(text))
    return {name.split("#")[0].removeprefix("./") for name in found}


def _hash(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()
