"""What all commands share: how a conversion, a warning and a failure are told, and what a signal does."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from . import targets
from .errors import CheckpointError, printable

if TYPE_CHECKING:
    from .conversion import ConversionReport

__all__ = [
    "ENGINES",
    "LONG_WORK",
    "Stopped",
    "fail",
    "leave",
    "line_of",
    "options_of",
    "signals_as_exceptions",
    "warn",
    "words_of",
]


LONG_WORK: Final = 64 << 20
"""Bytes from which on a terminal sees progress."""
ENGINES: Final = ("auto", "numba", "python")
"""`sweep.ENGINES`, which would bring numpy along for --help."""


def words_of(error: Exception) -> str:
    """Say in a line what failed, safe to print."""
    if isinstance(error, CheckpointError | ModuleNotFoundError):
        return str(error)
    if isinstance(error, OSError):
        names = [printable(os.fsdecode(name), longest=4096) for name in (error.filename, error.filename2) if name]
        return ": ".join([*names, printable(error.strerror or str(error), longest=1000)])
    return printable(f"{type(error).__name__}: {error}", longest=1000)


def fail(message: str, status: int = 1, *, command: str = "ggcl-fast") -> int:
    """Print why it failed and return the exit status."""
    print(f"{command}: error: {message}", file=sys.stderr)
    return status


def leave(main: Callable[[], int]) -> NoReturn:
    """Be the process of a command: run `main` and leave with its exit status.

    Half of a small conversion's time is Python's own.  Collecting garbage while gguf is imported takes a tenth of the
    whole, and taking everything down again at the end a sixth; a process that ends after one file needs neither.
    """
    gc.disable()
    status = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read our output has gone
        status = status or 1
    os._exit(status)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options for `convert`."""
    names = ("to", "base", "base_out", "outtype", "token_embd", "ff", "force", "dry_run", "fsync", "check_finite")
    return {name: getattr(args, name) for name in names}


def warn(report: ConversionReport) -> None:
    """Print the report's warnings and notes."""
    source = printable(report.source, longest=4096)
    for warning in report.warnings:
        print(f"ggcl-fast: warning: {source}: {warning}", file=sys.stderr)
    for note in report.notes:
        print(f"ggcl-fast: note: {source}: {printable(note, longest=4096)}", file=sys.stderr)


def line_of(report: ConversionReport) -> str:
    """Say in a line what was written."""
    done = "would be written" if report.dry_run else "written"
    names = " and ".join(printable(name, longest=4096) for name in (report.target, *report.extra_outputs))
    what = f"optimizer {report.optimizer}" if report.to == targets.DEFAULT else report.to
    return f"{names}: {done}, {report.n_tensors} tensors, {report.target_bytes:,} bytes, {what}, {report.seconds:.3f} s"


class Stopped(BaseException):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped`, so that what was begun is undone; the second one is ignored."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {each: signal.signal(each, stop) for each in handled}
    except ValueError:  # not in the main thread: signals are its business
        yield
        return
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
