"""Where files are: a folder or file here, or a repository on the Hub. Whether it is a path is decided once."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from . import hub
from .files import fingerprint
from .wording import first_names

HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
_WITHOUT_EFFECT = ("use_safetensors", "low_cpu_mem_usage")  # no pickled weights are read, and no weight twice
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
MOTION_HEAD_NAME = "motion_head.safetensors"
SCHEDULER_NAME = "scheduler/scheduler_config.json"
INDEX_NAME = "model_index.json"


@dataclass(frozen=True)
class Location:
    """A folder, a file or a repository, and the place in it. `Location.of` makes one of what a user gives."""

    name: str  # a path that exists, or the id of a repository
    subfolder: str | None = None
    revision: str | None = None
    weight_name: str | None = None  # of the file with the weights, where it has no usual name
    options: Mapping[str, Any] = field(default_factory=dict)  # of `hf_hub_download`: `token`, `cache_dir`, ...
    remote: bool = False

    @classmethod
    def of(
        cls,
        name: "str | os.PathLike | Location",
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        weight_name: str | None = None,
        **options,
    ) -> "Location":
        """Where a name leads to: what is on disk wins over a packaged model, and that over the Hub.

        `options` are `HUB_OPTIONS`, and what diffusers' `load_lora_weights` takes besides and changes nothing here.
        `TypeError` for any other, so that a slip of the pen is not taken for the default; `ValueError` if pickled
        weights are asked for.
        """
        if isinstance(name, Location):
            return name
        options = _checked(options)
        name = hub.resolve(name)
        remote = not os.path.exists(name)
        return cls(name, subfolder or None, revision, weight_name or None, options, remote)

    def __str__(self) -> str:
        return f"{self.name} (subfolder {self.subfolder!r})" if self.subfolder else self.name

    @property
    def is_file(self) -> bool:
        """Whether this is one file, and not a folder or repository."""
        return not self.remote and os.path.isfile(self.name)

    @property
    def is_folder(self) -> bool:
        return not self.remote and os.path.isdir(self.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the libraries' `from_pretrained` takes beside the name."""
        place = {"subfolder": self.subfolder, "revision": self.revision}
        return {key: value for key, value in place.items() if value is not None} | dict(self.options)

    def inside(self, folder: str) -> Self:
        """A folder below this one."""
        return replace(self, subfolder=f"{self.subfolder}/{folder}" if self.subfolder else folder, weight_name=None)

    def around(self) -> Self:
        """The folder that a file lies in, with the file as that of the weights; anything else is its own."""
        if not self.is_file:
            return self
        folder, name = os.path.split(self.name)
        return replace(self, name=folder or ".", subfolder=None, weight_name=name)

    # --- what is there -----------------------------------------------------------------------------------------------
    def file(self, filename: str) -> Path | None:
        """The local path of a file, downloaded if need be; `None` if there is no such file."""
        if self.is_folder:
            path = Path(self.name, self.subfolder or "", filename)
            return path if path.is_file() else None
        if self.is_file:
            raise ValueError(f"{self.name} is a file; expected a folder or a repository with {filename} in it.")
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, filename, **self.arguments))
        except LocalEntryNotFoundError as error:
            # The Hub could not be asked. The cache may know that the file does not exist.
            inside = f"{self.subfolder}/{filename}" if self.subfolder else filename
            cached = try_to_load_from_cache(self.name, inside, self.options.get("cache_dir"), self.revision)
            if cached is _CACHED_NO_EXIST or self.options.get("local_files_only"):
                return None
            told = f"{inside} of {self.name} is not in the cache, and the Hub cannot be asked: {error}"
            raise OSError(told) from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise OSError(self.explain(error)) from error

    def json(self, filename: str) -> dict[str, Any] | None:
        """The content of a JSON file; `None` if there is none."""
        path = self.file(filename)
        if path is None:
            return None
        return json_object(path.read_bytes(), str(path))  # of bytes it knows the encoding, byte order marks included

    def files(self) -> list[str]:
        """The paths of all files, in subfolders too; those in the cache if the Hub must not or cannot be asked."""
        if not self.remote:
            paths = sorted(Path(self.name).rglob("*"))
            return [path.relative_to(self.name).as_posix() for path in paths if path.is_file()]
        from huggingface_hub import HfApi

        with suppress(*hub.http_errors()):  # what the cache holds, then
            if not self.options.get("local_files_only"):
                return HfApi(token=self.options.get("token")).list_repo_files(self.name, revision=self.revision)
        try:
            cached = {"cache_dir": self.options.get("cache_dir"), "local_files_only": True}
            return replace(self, options=cached).fetched().files()
        except OSError:
            return []

    def fetched(self) -> Self:
        """The same on this machine, all of it."""
        if not self.remote:
            return self
        from huggingface_hub import snapshot_download

        try:
            name = snapshot_download(self.name, revision=self.revision, **self.options)
        except hub.http_errors() as error:
            raise OSError(self.explain(error)) from error
        return replace(self, name=name, revision=None, remote=False)

    def version(self) -> str | None:
        """What tells its files from those of another time: a repository's commit, or of a folder or file on disk its
        `fingerprint`; `None` where nothing is known."""
        if not self.remote:
            return fingerprint(Path(self.name, self.subfolder or ""))
        return self.commit(INDEX_NAME, "config.json")

    def commit(self, *filenames: str) -> str | None:
        """The commit of the one of these files that is in the Hub's cache, or else the revision that was asked for."""
        for name in filenames:
            path = self.file(name)
            if path is not None and "snapshots" in path.parts:  # …/snapshots/COMMIT/model_index.json
                return path.parts[path.parts.index("snapshots") + 1]
        return self.revision

    def explain(self, error: BaseException) -> str:
        """What one of `hub.http_errors` about this repository means, and what to do."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        while error.__cause__ is not None and getattr(error, "response", None) is None:
            error = error.__cause__
        name, status = self.name, getattr(getattr(error, "response", None), "status_code", None)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"The disk is full: there is no room for the files of {name} ({error}). HF_HOME names another place."
            )
        if isinstance(error, GatedRepoError):
            return f"{name} is gated: accept its terms on its page on the Hub, and log in with `hf auth login`."
        if isinstance(error, RevisionNotFoundError):
            return f"{name} has no revision {self.revision or 'main'!r}."
        if isinstance(error, RepositoryNotFoundError):
            return f"There is no repository {name} on the Hub, or it is private and your token may not see it."
        if status == 401:
            return "The Hub refuses the token. Log in with `hf auth login`, or set HF_TOKEN to one that is valid."
        if status == 403:
            return f"The token may not do this to {name}: it needs the right to write there, and the name to be yours."
        if status is not None:
            return f"The Hub failed with status {status}. Try again."
        return f"The Hub cannot be reached ({type(error).__name__}: {error}). Try again."

    # --- weights -----------------------------------------------------------------------------------------------------
    def lora_file(self, *other_names: str) -> Path:
        """The file of a LoRA: the one named, or of a usual name (or of `other_names`), or the only one that is there.

        `FileNotFoundError` where there is none, and `ValueError` where several could be meant.
        """
        path = self.find_lora_file(*other_names)
        if path is None:
            wanted = self.weight_name or f"{WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME}"
            raise FileNotFoundError(f"No LoRA in {self}: there is no {wanted}.{self.elsewhere()}")
        return path

    def find_lora_file(self, *other_names: str) -> Path | None:
        """Like `lora_file`, but `None` where there is none."""
        if self.is_file:
            return self.around().find_lora_file()
        if self.weight_name and hub.is_pickled(self.weight_name):
            advice = self._how_to_convert(Path(self.subfolder or "", self.weight_name))
            raise ValueError(f"{self.weight_name} of {self.name} is not a .safetensors file; {advice}")
        names = (self.weight_name,) if self.weight_name else (WEIGHTS_NAME, PEFT_WEIGHTS_NAME, *other_names)
        for name in names:
            if (path := self.file(name)) is not None:
                return path
        return None if self.weight_name else self._the_only_file()

    def _the_only_file(self) -> Path | None:
        """Style LoRAs have names of their own. In the folder of a whole pipeline no file is taken for a LoRA."""
        folder = Path(self.subfolder or ".")
        here = [Path(name).name for name in self.files() if Path(name).parent == folder]
        names = [name for name in here if hub.is_safetensors(name) and name != MOTION_HEAD_NAME and name[0] != "."]
        if INDEX_NAME in here or not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"There are several files in {self}: {', '.join(names)}; name one with `weight_name` (--weight_name)."
            )
        return self.file(names[0])

    def elsewhere(self) -> str:
        """A sentence on pickled files that are there instead, or on the subfolders that hold a LoRA; empty if none."""
        files = [Path(name) for name in self.files()]
        pickled = [path for path in files if hub.is_pickled(path) and path.parent == Path(self.subfolder or ".")]
        if pickled:
            return f" There is {pickled[0].name}, but {self._how_to_convert(pickled[0])}"
        folders = sorted({p.parent.as_posix() for p in files if p.name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME)} - {"."})
        return f" There are LoRAs in its subfolders: {', '.join(folders)}; name one as `subfolder`." if folders else ""

    def _how_to_convert(self, file: Path) -> str:
        """What to do about a file of pickled weights in it, which is told with the folder where that is here."""
        return hub.how_to_convert(self.name / file if self.is_folder else file.name)

    def variant(self, variant: str | None) -> dict[str, str]:
        """`{"variant": variant}` if the component here has weights of that variant, or else nothing."""
        if variant is not None:
            for name in ("diffusion_pytorch_model", "model"):
                files = (f"{name}.{variant}.safetensors", f"{name}.safetensors.index.{variant}.json")
                if any(map(self.file, files)):
                    return {"variant": variant}
        return {}

    @contextmanager
    def never_pickled(self) -> Iterator[None]:
        """Says why a model that has no safetensors, or only those of a variant, is not loaded.

        For calls with `use_safetensors=True`.
        """
        try:
            yield
        except OSError as error:
            if "safetensors" not in str(error) or self.is_file:
                raise
            files = self.files()
            # `fp16` for `unet/diffusion_pytorch_model.fp16.safetensors`, whole or in parts
            pattern = re.compile(r"(?:^|/)(?:diffusion_pytorch_)?model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")
            variants = sorted({match[1] for match in map(pattern.search, files) if match})
            if variants:
                raise OSError(
                    f"{self.name} has no plain weights ({error}), but those of a variant: give"
                    f" `variant={variants[0]!r}` (--variant {variants[0]})"
                    + (f", or one of {', '.join(variants)}." if variants[1:] else ".")
                ) from error
            advice = self._how_to_convert(Path(next(filter(hub.is_pickled, files), "pytorch_model.bin")))
            raise OSError(f"{self.name} has no safetensors weights ({error}), and {advice}") from error


def check_whole(network: Any, where: str) -> None:
    """`ValueError` where a network that was just loaded has weights that its files lack; anything else may be given.

    transformers makes them anew, at random, with a warning, and marks those that were read; diffusers leaves them
    without values. What carries no marks at all was put together otherwise, and is not judged.
    """
    if not hasattr(network, "named_parameters") or getattr(network, "is_quantized", False):
        return
    weights = dict(network.named_parameters())
    read = {name for name, weight in weights.items() if getattr(weight, "_is_hf_initialized", False)}
    refuse_lacking(
        {name for name, weight in weights.items() if weight.is_meta or (read and name not in read)},
        f"{where} does not hold all weights of a {type(network).__name__}",
    )


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `hf_hub_download` among those of a place."""
    refuse_pickled(options.get("use_safetensors"))
    for name in options:
        if name not in (*HUB_OPTIONS, *_WITHOUT_EFFECT):
            known = ", ".join(["subfolder", "revision", "weight_name", *HUB_OPTIONS])
            raise TypeError(f"Unknown option {name!r} of a place to load from; there are {known}.")
    return {name: value for name, value in options.items() if name in HUB_OPTIONS}


def refuse_pickled(use_safetensors: bool | None) -> None:
    """`ValueError` if diffusers' option asks for pickled weights; `None` leaves open which."""
    if use_safetensors is not None and not use_safetensors:
        raise ValueError("`use_safetensors=False` was given, but pickled weights are not read.")


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """What a JSON text says; `ValueError` that names its place if it is none, or no object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} should be a JSON object, in braces; it is {content!r:.60}.")
    return content


def refuse_lacking(lacking: set[str], refusal: str) -> None:
    """`ValueError`, the refusal and the first names of weights, if any weight is lacking."""
    if lacking:
        raise ValueError(f"{refusal}: {first_names(sorted(lacking))}; they would be random.")
