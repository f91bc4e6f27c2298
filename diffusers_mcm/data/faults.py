"""Whose fault it is that a file cannot be read: its own, so that another is read instead, or the machine's."""

import errno

import numpy as np
from av.error import FFmpegError

# What the system says of the file that was asked for, and of no other.
_OF_THE_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EINVAL, errno.EILSEQ, errno.EFBIG, errno.EOVERFLOW, errno.ENXIO),
}
# FFmpeg also borrows the system's numbers for what it finds inside a file; these it has from the system.
_MACHINE_NAMES = """
    EMFILE ENFILE ENOBUFS ENOSPC EDQUOT EROFS ESTALE ENODEV ENOLCK EKEYEXPIRED EREMOTEIO ETIMEDOUT ECONNREFUSED
    ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ENOTCONN ESHUTDOWN
"""
_OF_THE_MACHINE = {getattr(errno, name) for name in _MACHINE_NAMES.split() if hasattr(errno, name)}
# Of Python, and of libraries that name theirs so; of aiohttp and of httpx.
_LOST_CONNECTIONS = {"ConnectionError", "TimeoutError", "Timeout", "ClientConnectionError", "ClientPayloadError"}
_LOST_CONNECTIONS |= {"TransportError"}
_BUSY_SERVER = {408, 425, 429}
_LITTLE_MEMORY = 256 << 20
_ADVICE: dict[int | None, str] = {
    errno.EMFILE: "Allow more open files (ulimit -n), or take fewer --dataloader_num_workers.",
    errno.ENFILE: "Too many files are open on the whole machine.",
    errno.ENOMEM: "Take fewer --dataloader_num_workers, or a machine with more memory.",
}


class UnusableItem(Exception):
    """One item of a data set cannot be used; the message says why. The data set replaces it by another."""


class MachineError(OSError):
    """A file cannot be read, and the machine is why: its disk, its memory, its connection. Nothing is skipped then."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)  # without the system's number, which would stand before the message
        self.errno = number


def is_remote(path: str) -> bool:
    """Whether `path` is an address (`hf://…`, `https://…`, `zip://…`) and not a file of this machine."""
    return "://" in path


def check_own_fault(error: BaseException, name: str | None) -> None:
    """Return if an error that reading the file at `name` (None: bytes in memory) gave is about the file itself.

    Raises:
        MachineError: if it is the machine's, so that another file would not do better; it names the file.
    """
    if isinstance(error, MachineError) and (name is None or name in str(error)):
        raise error
    if isinstance(error, MachineError):
        raise MachineError(f"{name}: {error}", error.errno) from error
    if not is_of_the_machine(error, name):
        return
    error = _behind(error)
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    message = (
        f"{name or 'Its data'} cannot be read, and not by its own fault: {type(error).__name__}: {error}. "
        f"{_ADVICE.get(number, 'See to the disk or the connection.')} It is not skipped, for others would be too; a "
        "run goes on from its last checkpoint with --resume_from_checkpoint latest."
    )
    raise MachineError(message, number) from error


def unusable(error: BaseException, name: str | None, what: str) -> UnusableItem:
    """Why `what` cannot be used, where the error is about the file; `MachineError` where it is not."""
    check_own_fault(error, name)
    return UnusableItem(f"{what} cannot be read ({type(error).__name__}: {error})")


def is_of_the_machine(error: BaseException, name: str | None) -> bool:
    """Whether an error that reading the file at `name` gave is about the machine or its connection, not the file."""
    error = _behind(error)
    number = getattr(error, "errno", None)
    if isinstance(error, FFmpegError) and isinstance(error, MemoryError):
        try:  # FFmpeg also says this of a header that asks for gigabytes
            return not np.empty(_LITTLE_MEMORY, np.uint8).size
        except MemoryError:
            return True
    if isinstance(error, FFmpegError) and number == errno.EIO:  # and this of a file that breaks off
        return name is not None and not is_remote(name) and not _can_be_read(name)
    if isinstance(error, FFmpegError):
        return number in _OF_THE_MACHINE
    if number is None or not isinstance(error, OSError):
        answer = getattr(error, "response", error)
        status = getattr(answer, "status_code", None) or getattr(error, "status", None) or 0
        lost = _LOST_CONNECTIONS & {kind.__name__ for kind in type(error).__mro__}
        busy = isinstance(status, int) and (status >= 500 or status in _BUSY_SERVER)
        return bool(lost) or busy or isinstance(error, MemoryError)
    return number not in _OF_THE_FILE


def _behind(error: BaseException) -> BaseException:
    """The error itself; where `fsspec` calls each failure over HTTP a file that is not there, what went wrong."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def _can_be_read(path: str) -> bool:
    """Whether the system gives every byte of a file."""
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        return error.errno in _OF_THE_FILE
    return True
