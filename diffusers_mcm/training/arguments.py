"""The command line of the training script, generated from `TrainingConfig`."""

import argparse
import dataclasses
import difflib
import os
import sys
import time
import typing
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from .config import TrainingConfig


def _help_text(entry: dataclasses.Field, required: bool) -> str:
    text = entry.metadata["help"].replace("%", "%%") + (" Not in the paper." if entry.metadata["beyond_paper"] else "")
    if required:
        return f"{text} Required."
    default: Any = entry.default
    default = " ".join(default) if entry.metadata["many"] else default
    return text if default in (None, "") else f"{text} (default: {default})"


class _Toggle(argparse.Action):
    """`--name` and `--no_name`, the underscored twin of argparse's BooleanOptionalAction."""

    def __init__(self, option_strings, dest, default=None, help=None):
        names = [*option_strings, *(f"--no_{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are a line or two: the usage of a hundred flags would hide them."""

    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        unknown = [word for word in message.split() if word.startswith("--") and word not in known]
        near = [name for word in unknown for name in difflib.get_close_matches(word.partition("=")[0], known, n=1)]
        meant = f" Did you mean {', '.join(near)}?" if near and message.startswith("unrecognized") else ""
        give_up(f"error: {message}.{meant} See --help." if meant or message[-1] != "." else f"error: {message}", 2)


def give_up(message: str, exit_code: int = 1) -> NoReturn:
    """End this process with one line on stderr; of several that do, one says it.

    The others leave the first process a moment: where all meet the same error its end makes the launcher end them.
    """
    if message and os.environ.get("RANK", "0") != "0":
        time.sleep(10)
        message = f"process {os.environ['RANK']}: {message}"
    if message:
        with suppress(OSError):  # the terminal may be gone, or what read the pipe
            print(message, file=sys.stderr, flush=True)
    raise SystemExit(exit_code)


_DESCRIPTION = (
    "Distil a text-to-video diffusion model into a few-step LoRA (motion consistency model). "
    "Plain LCM distillation: --motion raw --lambda_real 1 --lambda_adv 0."
)


def build_parser(prog: str | None = None, description: str = _DESCRIPTION) -> argparse.ArgumentParser:
    """One documented flag per field of `TrainingConfig`."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    hints, groups = typing.get_type_hints(TrainingConfig), {}
    for entry in dataclasses.fields(TrainingConfig):
        said, required = entry.metadata, entry.default is dataclasses.MISSING
        if said["group"] not in groups:
            groups[said["group"]] = parser.add_argument_group(said["group"])
        options: dict[str, Any] = {"required": True} if required else {"default": entry.default}
        if hints[entry.name] is bool:
            options["action"] = _Toggle
        else:  # `int | None` -> int, `tuple[str, ...]` -> str
            options["type"] = (*typing.get_args(hints[entry.name]), hints[entry.name])[0]
            options |= {"choices": said["choices"], "nargs": "*" if said["many"] else None}
        groups[said["group"]].add_argument(f"--{entry.name}", help=_help_text(entry, required), **options)
    return parser


def _current(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags under the names that they have now; each old name is warned of."""
    formerly = {entry.metadata["formerly"]: entry.name for entry in dataclasses.fields(TrainingConfig)}
    now = {f"--{no}{old}": f"--{no}{new}" for old, new in formerly.items() if old for no in ("", "no_")}
    for old in now.keys() & set(arguments):
        warnings.warn(f"{old} is called {now[old]} now.", FutureWarning, stacklevel=3)
    return [now.get(word, word) for word in arguments]


def parse_config(arguments: Sequence[str] | None = None, **program: str) -> TrainingConfig:
    """Read the command line; a value that makes no sense ends the process with a line and exit code 2.

    `program` are `prog` and `description` of another program than the training script.
    """
    parser = build_parser(**program)
    namespace = parser.parse_args(_current(sys.argv[1:] if arguments is None else arguments))
    try:
        return TrainingConfig(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))


def to_go_on(command: Sequence[str], checkpoint: str = "latest") -> list[str]:
    """The command line that goes on with the run that `command` began. A secret in it is left out."""
    dropped = {f"--{name}" for name in [*TrainingConfig.names(secret=True), "resume_from_checkpoint"]}
    kept, words = [], iter(command)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in dropped:
            kept.append(word)
        elif not equals:
            next(words, None)
    return [*kept, "--resume_from_checkpoint", checkpoint]
