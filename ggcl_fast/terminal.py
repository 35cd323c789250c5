"""What all commands share: how a conversion, a warning and a failure are told, and what a signal does."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import targets
from .errors import CheckpointError, printable

if TYPE_CHECKING:
    from .conversion import ConversionReport

__all__ = ["Stopped", "fail", "line_of", "options_of", "signals_as_exceptions", "warn", "words_of"]


def words_of(error: Exception) -> str:
    """Say in a line what failed, safe to print."""
    if isinstance(error, CheckpointError | ModuleNotFoundError):
        return str(error)
    if isinstance(error, OSError):
        names = [printable(os.fsdecode(name), longest=4096) for name in (error.filename, error.filename2) if name]
        return ": ".join([*names, printable(error.strerror or str(error), longest=1000)])
    return printable(f"{type(error).__name__}: {error}", longest=1000)


def fail(message: str, status: int = 1) -> int:
    """Print why it failed and return the exit status."""
    print(f"ggcl-fast: error: {message}", file=sys.stderr)
    return status


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
