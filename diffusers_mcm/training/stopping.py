"""A run that is told to stop: it is asked by a signal, finishes its step, keeps what it has, and says how to go on."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# A launcher hands on the signal that the terminal, or the scheduler, has sent to each process already.
ONE_REQUEST = 5.0  # seconds in which several signals are one
_LAUNCHERS = (
    "ACCELERATE_MIXED_PRECISION",
    "TORCHELASTIC_RUN_ID",
)  # what accelerate and torchrun put into `os.environ`


class Stopped(Exception):
    """A run ended because it was told to; its message says what was kept and where, in the main process.

    `checkpoint` is what `--resume_from_checkpoint` takes to go on, where there is anything to go on with.
    """

    def __init__(self, message: str, signum: int, checkpoint: str | None = None):
        super().__init__(message)
        self.checkpoint = checkpoint
        self.exit_code = 128 + signum  # as a shell reports it


def command_line() -> list[str]:
    """The words of the command that started this process, its launcher included; none if that cannot be told."""
    if not launched():
        return sys.orig_argv
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        if words[-1:] == sys.argv[-1:]:  # or it is the launcher of the launcher
            return words
    return []


def launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return any(name in os.environ for name in _LAUNCHERS)


class StopRequests:
    """In this context a signal to stop is noted in `received`, and nothing is interrupted; the second one is obeyed.

    Signals that were ignored before, as SIGHUP is under `nohup`, stay so. In another thread than the main one no
    handler can be set: signals then do what they did before. A process whose launcher has died is told to stop too.
    """

    def __init__(self, tell: bool = True):
        self.tell, self.number, self.since = tell, 0, 0.0
        self.before: dict[int, Any] = {}
        self.parent = os.getppid() if launched() else None

    @property
    def received(self) -> int:
        """The number of the signal; 0 as long as there was none."""
        if not self.number and self.parent is not None and os.getppid() != self.parent:
            self.number = signal.SIGTERM
        return self.number

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                # None is a handler that was not set from Python, and that could not be put back.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self.before[signum] = signal.signal(signum, self.note)
        return self

    def __exit__(self, *raised: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        if not self.number:
            self.number, self.since = signum, time.monotonic()
            if self.tell:
                name = signal.Signals(signum).name
                said = f"\n{name}: stopping after this step, with a checkpoint. Once more stops at once.\n"
                with suppress(OSError):  # the terminal may be gone; and a stream of Python's may be in use just now
                    os.write(2, said.encode())
        elif time.monotonic() - self.since > ONE_REQUEST:
            self.__exit__()
            os.kill(os.getpid(), signum)
