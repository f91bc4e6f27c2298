"""From a name to files: a local folder or file, a packaged model, or a repository on the Hub, in that order."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGED_FOLDER = Path(__file__).parent / "shapes" / "weights"
PACKAGED_MODELS = ("mcm-shapes", "mcm-shapes-teacher", "mcm-shapes-features", "mcm-shapes-clip")


def resolve(name: str | os.PathLike) -> str:
    """A path that exists, or else a Hub id, unchanged. Something on disk wins over a packaged model of that name."""
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"Expected a path, a packaged model or a Hub repository such as 'owner/name', got {name!r}.")
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
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~"))


def check_repository_name(repo_id: str) -> None:
    """`ValueError` unless a repository may have this name: `owner/name`, or a name in one's own namespace."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Expected a repository such as 'owner/name', got {repo_id!r}.") from error


def resolve_recorded(name: str, folder: str | os.PathLike | None) -> str:
    """Like `resolve`, for a name read from a configuration in `folder`: './' and '../' are relative to that folder,
    and a packaged model is never shadowed by a folder that happens to lie in the working directory."""
    if name.startswith(("./", "../")):
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
    name = os.fspath(name)
    packaged = Path(name).resolve()
    if packaged.parent == PACKAGED_FOLDER.resolve() and packaged.name in PACKAGED_MODELS:
        return packaged.name
    if not os.path.exists(name) and not os.path.isabs(name):
        return name
    relative = Path(os.path.relpath(packaged, Path(folder).resolve())).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def find_file(
    name: str | os.PathLike,
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub_options,
) -> Path | None:
    """The local path of a file in a folder or repository, downloaded if need be; `None` if there is no such file.

    `hub_options` are those of `hf_hub_download`: `token`, `cache_dir`, `local_files_only`, `force_download`, ...
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        path = Path(name, subfolder or "", filename)
        return path if path.is_file() else None
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file; expected a folder or a repository with {filename} in it.")
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    where = dict(revision=revision, subfolder=subfolder or None)
    try:
        return Path(hf_hub_download(name, filename, **where, **hub_options))
    except LocalEntryNotFoundError as error:
        # The Hub could not be asked. The cache may know that the file does not exist.
        inside = f"{subfolder}/{filename}" if subfolder else filename
        cached = try_to_load_from_cache(name, inside, hub_options.get("cache_dir"), revision)
        if cached is _CACHED_NO_EXIST or hub_options.get("local_files_only"):
            return None
        raise OSError(f"{inside} of {name} is not in the cache, and the Hub cannot be asked: {error}") from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise OSError(explain(error, name, revision)) from error


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


def variant_of(source: str | os.PathLike, variant: str | None, subfolder: str | None = None, **where) -> dict:
    """`{"variant": variant}` if the component in `subfolder` has weights of that variant, or else nothing."""
    if variant is not None:
        for name in ("diffusion_pytorch_model", "model"):
            files = (f"{name}.{variant}.safetensors", f"{name}.safetensors.index.{variant}.json")
            if any(find_file(source, file, subfolder=subfolder, **where) for file in files):
                return {"variant": variant}
    return {}


@contextmanager
def never_pickled(source: str | os.PathLike, **where) -> Iterator[None]:
    """Says why a model that has no safetensors, or only those of a variant, is not loaded.

    For calls with `use_safetensors=True`; `where` are the options to find the files with.
    """
    try:
        yield
    except OSError as error:
        if "safetensors" not in str(error) or os.path.isfile(source):
            raise
        files = list_files(source, **where)
        variants = _variants(files)
        if variants:
            raise OSError(
                f"{source} has no plain weights ({error}), but those of a variant: give `variant={variants[0]!r}`"
                f" (--variant {variants[0]})" + (f", or one of {', '.join(variants)}." if variants[1:] else ".")
            ) from error
        found = next((name for name in files if is_pickled(name)), "pytorch_model.bin")
        advice = how_to_convert(Path(source, found) if os.path.isdir(source) else found)
        raise OSError(f"{source} has no safetensors weights ({error}), and {advice}") from error


def _variants(files: Iterable[str]) -> list[str]:
    """`fp16` for `unet/diffusion_pytorch_model.fp16.safetensors`, whole or in parts."""
    pattern = re.compile(r"(?:^|/)(?:diffusion_pytorch_)?model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")
    return sorted({match[1] for match in map(pattern.search, files) if match})


def http_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises when the Hub refuses, fails or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its first parent is the base class of the HTTP library in use, whatever that is called; uploads in threads raise
    # `RuntimeError`.
    return OSError, RuntimeError, HfHubHTTPError.__mro__[1]


def explain(error: BaseException, name: str, revision: str | None = None) -> str:
    """What one of `http_errors` about the repository `name` means, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: there is no room for the files of {name} ({error}). HF_HOME names another place."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on its page on the Hub, and log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'!r}."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {name} on the Hub, or it is private and your token may not see it."
    if status == 401:
        return "The Hub refuses the token. Log in with `hf auth login`, or set HF_TOKEN to one that is valid."
    if status == 403:
        return f"The token may not do this to {name}: it needs the right to write there, and the name to be yours."
    if status is not None:
        return f"The Hub failed with status {status}. Try again."
    return f"The Hub cannot be reached ({type(error).__name__}: {error}). Try again."


def list_files(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    token=None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike | None = None,
    **_,
) -> list[str]:
    """The paths of all files in a folder or repository; those in the cache if the Hub must not or cannot be asked."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return [path.relative_to(name).as_posix() for path in sorted(Path(name).rglob("*")) if path.is_file()]
    from huggingface_hub import HfApi, snapshot_download

    try:
        if not local_files_only:
            return HfApi(token=token).list_repo_files(name, revision=revision)
    except http_errors():
        pass  # what the cache holds, then
    try:
        return list_files(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except http_errors():
        return []


def read_json(name: str | os.PathLike, filename: str, **options) -> dict[str, Any] | None:
    """The content of a JSON file in a folder or repository (`find_file`'s options); `None` if there is none."""
    path = find_file(name, filename, **options)
    if path is None:
        return None
    try:
        return json.loads(path.read_bytes())  # of bytes it knows the encoding, byte order marks included
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
