"""What all commands share: a process's streams, how a failure is told, and what a signal does."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn

from ..errors import CheckpointError, printable
from ..storage.system import without_blas_threads
from ..storage.urls import public_name

__all__ = [
    "ENGINES",
    "GONE",
    "LONG_WORK",
    "Advance",
    "Signals",
    "Stopped",
    "complete",
    "fail",
    "leave",
    "shown",
    "signals_as_exceptions",
    "without_keywords",
    "words_of",
]  # fmt: skip

LONG_WORK: Final = 64 << 20
"""Bytes from which on a terminal sees progress."""
ENGINES: Final = ("auto", "numba", "python")
"""`engine.ENGINES`, which would bring numpy along for --help."""

GONE: Final = 128 + signal.SIGPIPE
"""Exit status where whoever read our output has gone: what the shell shows of others who end by that."""
_HANDLED: Final = (signal.SIGINT, signal.SIGTERM)
_CLEAR_LINE: Final = "\r\x1b[K"  # a bar may stand there
_LONGEST_PATH: Final = 4096
_WAITING: Final = "stops when the files in work are done; once more, and they are undone"


def shown(name: str | bytes) -> str:
    """Return a path or a URL as it is shown."""
    return printable(public_name(os.fsdecode(name)), longest=_LONGEST_PATH)


def without_keywords(text: str) -> str:
    """Return a message without what it tells those who call the library."""
    return _keywords().sub("", text)


@functools.cache
def _keywords() -> re.Pattern[str]:
    """Return what finds a keyword of `conversion.convert` in brackets."""
    from ..targets.options import Choices

    return re.compile(rf" \((?:{'|'.join(Choices.__annotations__)})=[^()]*\)")


def words_of(error: Exception) -> str:
    """Say in a line what failed, safe to print."""
    if isinstance(error, CheckpointError | ModuleNotFoundError):
        return without_keywords(str(error))
    if isinstance(error, OSError):
        names = [shown(name) for name in (error.filename, error.filename2) if name]
        return ": ".join([*names, without_keywords(printable(error.strerror or str(error), longest=1000))])
    return printable(f"{type(error).__name__}: {error}", longest=1000)


def fail(message: str, status: int = 1, *, command: str = "ggcl-fast") -> int:
    """Print why it failed and return the exit status."""
    print(f"{command}: error: {message}", file=sys.stderr)
    return status


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end, where one asks what could stand next: see argcomplete, of the extra ``complete``."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            from argcomplete import autocomplete
        except ImportError:
            os._exit(1)  # nothing to say, which is how a shell understands it
        autocomplete(parser)


class Advance:
    """Lets a bar of tqdm's tell how far something is: an `outputs.Progress`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def begin(self, total: int) -> None:
        """Take the bytes that there are to do."""
        self._bar.total = total

    def __call__(self, nbytes: int) -> None:
        """Tell of bytes that are done."""
        self._bar.update(nbytes)


def leave(main: Callable[[], int], *, command: str = "ggcl-fast") -> NoReturn:
    """Be the process of a command: run `main` and leave with its exit status.

    Half of a small conversion's time is Python's own.  Collecting garbage while gguf is imported takes a tenth of the
    whole, and taking everything down again at the end a sixth; a process that ends after one file needs neither.
    """
    gc.disable()
    without_blas_threads()
    _open_streams()
    status = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = status or GONE
    except OSError as error:
        with contextlib.suppress(OSError):
            status = status or fail(words_of(error), command=command)
            sys.stderr.flush()
        status = status or 1
    os._exit(status)


def _open_streams() -> None:
    """See that there are three standard streams, and that they take every character.

    A stream that the caller closed leads to the null device: a file that is opened later must not take its place.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class Stopped(BaseException):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def signals_as_exceptions(command: str) -> Iterator[Signals]:
    """Turn SIGINT and SIGTERM into `Stopped`, so that what was begun is undone; one that comes after is ignored."""
    signals = Signals(command)
    try:
        before = {each: signal.signal(each, signals) for each in _HANDLED}
    except ValueError:  # not in the main thread: signals are its business
        yield signals
        return
    try:
        yield signals
    except Exception as error:
        if signals.raised:  # C code in the middle of an import makes an ImportError of whatever comes up there
            raise Stopped(signals.number) from error
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Signals:
    """What a signal does."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.stop: threading.Event | None = None
        """Where it is there, the first signal sets it, and only the second raises `Stopped`."""
        self.number = 0
        """Of the signal that came."""
        self.raised = False
        """Whether `Stopped` was raised."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Be the handler of a signal."""
        self.number = number
        if self.stop is not None and not self.stop.is_set():
            self.stop.set()
            # Not with print: the signal may have come in the middle of one.
            clear = _CLEAR_LINE if os.isatty(2) else ""
            os.write(2, f"{clear}{self.command}: {signal.Signals(number).name}: {_WAITING}\n".encode())
            return
        for each in _HANDLED:
            signal.signal(each, signal.SIG_IGN)
        self.raised = True
        raise Stopped(number)
