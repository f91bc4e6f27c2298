"""What a name means: a local folder or file, a packaged model, or a repository on the Hub, in that order."""

import os
import reprlib
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

PACKAGED_FOLDER = Path(__file__).parent / "shapes" / "weights"
PACKAGED_MODELS = ("mcm-shapes", "mcm-shapes-teacher", "mcm-shapes-features", "mcm-shapes-clip", "mcm-shapes-video")


def resolve(name: str | os.PathLike) -> str:
    """A path that exists, or else a Hub id, unchanged. Something on disk wins over a packaged model of that name."""
    if not isinstance(name, (str, os.PathLike)):
        got = reprlib.repr(name)  # tensors by their keys would be pages
        raise TypeError(f"Expected a path, a packaged model or a Hub repository such as 'owner/name', got {got}.")
    name = os.fspath(name)
    if os.path.exists(name):
        return name
    if name in PACKAGED_MODELS:
        folder = PACKAGED_FOLDER / name
        if not folder.is_dir():
            raise FileNotFoundError(f"The packaged model {name!r} is not in this installation ({folder} is missing).")
        return str(folder)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"{name!r} is not a file or folder here, not a packaged model ({', '.join(PACKAGED_MODELS)}), and not a"
            " Hub repository (those look like 'owner/name')."
        )
    return name


def is_hub_id(name: str) -> bool:
    """Whether a name is one of a repository with its owner, `owner/name`."""
    try:
        check_repository_name(name)
    except ValueError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~"))


def check_repository_name(repo_id: str) -> None:
    """`ValueError` unless a repository may have this name: `owner/name`, or a name in one's own namespace."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Expected a repository such as 'owner/name', got {repo_id!r}.") from error


def is_relative(name: str) -> bool:
    """Whether a recorded name is a path relative to the folder of the file that it is recorded in."""
    return name.startswith(("./", "../"))


def resolve_recorded(name: str, folder: str | os.PathLike | None) -> str:
    """Like `resolve`, for a name read from a configuration in `folder`: './' and '../' are relative to that folder,
    and a packaged model is never shadowed by a folder that happens to lie in the working directory."""
    if is_relative(name):
        if folder is None:
            raise FileNotFoundError(f"The base model is recorded as {name!r}, beside the LoRA, which is remote.")
        path = Path(os.path.normpath(Path(folder, name)))
        if not path.exists():
            raise FileNotFoundError(f"The base model is recorded as {name!r}, but {path} does not exist.")
        return str(path)
    if name in PACKAGED_MODELS and (PACKAGED_FOLDER / name).is_dir():
        return str(PACKAGED_FOLDER / name)
    return resolve(name)


def recordable(name: str | os.PathLike, folder: str | os.PathLike) -> str:
    """How a configuration in `folder` names a model: the id, or for a local folder its path relative to `folder`."""
    name, packaged = os.fspath(name), Path(name).resolve()
    if packaged.parent == PACKAGED_FOLDER.resolve() and packaged.name in PACKAGED_MODELS:
        return packaged.name
    if not os.path.exists(name) and not os.path.isabs(name):
        return name
    if not os.path.exists(name) and any(sign in name for sign in "*?["):  # a glob of data, written as it was given
        return Path(os.path.relpath(name, Path(folder).resolve())).as_posix()
    relative = Path(os.path.relpath(packaged, Path(folder).resolve())).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def is_local(name: str) -> bool:
    """Whether a recorded name is a path and not an id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isabs(name) or "\\" in name


def public_name(name: Any, *, given: bool = False) -> Any:
    """A name as others may see it: of a path only its last part. A `given` name is a path if there is such a one here;
    a recorded one is told by how it is written. Of several, those of each."""
    if isinstance(name, (list, tuple)):
        return [public_name(each, given=given) for each in name]
    if given and name and os.path.exists(name):
        return os.path.basename(os.path.abspath(name))
    path = not given and isinstance(name, str) and is_local(name)
    return PurePosixPath(name.replace("\\", "/")).name if path else name


def is_pickled(name: str | os.PathLike) -> bool:
    """Whether a file of weights is one that reading could make run code."""
    return os.fspath(name).lower().endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))


def is_safetensors(name: str | os.PathLike) -> bool:
    """Whether a file is called as one of safetensors is."""
    return os.fspath(name).lower().endswith((".safetensors", ".sft"))


# Reads nothing but tensors, from a file of them, or of a dictionary that holds them with other things. A tensor that
# shares its memory with another one is copied; keys of dictionaries in dictionaries are joined by dots.
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file;"
    " inner = lambda d: next((inner(d[k]) for k in ('state_dict', 'model', 'module', 'params', 'weights')"
    " if isinstance(d.get(k), dict)), d);"
    " flat = lambda d, p='': {k: v for a, b in d.items() for k, v in"
    " (flat(b, f'{p}{a}.') if isinstance(b, dict) else {f'{p}{a}': b}).items() if torch.is_tensor(v)};"
    " weights = flat(inner(torch.load(sys.argv[1], map_location='cpu', weights_only=True)));"
    " save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, sys.argv[2], {'format': 'pt'})"
)


def how_to_convert(name: str | os.PathLike) -> str:
    """What to do about a file of pickled weights: a command that writes a file of safetensors beside it, under the
    name by which the libraries look for it. torch reads tensors, and refuses everything else."""
    path = Path(name)
    stem = "model" if path.stem == "pytorch_model" else path.stem  # transformers has two names
    names = (os.fspath(path), os.fspath(path.with_name(f"{stem}.safetensors")))
    return (
        "pickled weights are not read, for they can run code. Convert them:"
        f' python -c "{_CONVERT}" {" ".join(map(shlex.quote, names))}'
    )


def http_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises when the Hub refuses, fails or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its first parent is the base class of the HTTP library in use, whatever that is called; uploads in threads raise
    # `RuntimeError`.
    return OSError, RuntimeError, HfHubHTTPError.__mro__[1]
