"""What is told of a result: a line, warnings and notes, or an object."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ..batch.jobs import JobResult
from ..errors import CheckpointError, printable
from ..storage.urls import public_name
from ..targets import DEFAULT
from .terminal import shown, words_of

if TYPE_CHECKING:
    from ..conversion import ConversionReport

__all__ = ["as_json", "error_line", "line_of", "warn"]


def warn(report: ConversionReport) -> None:
    """Print the report's warnings and notes."""
    source = shown(report.source)
    for warning in report.warnings:
        print(f"ggcl-fast: warning: {source}: {warning}", file=sys.stderr)
    for note in report.notes:
        print(f"ggcl-fast: note: {source}: {printable(note, longest=4096)}", file=sys.stderr)


def line_of(report: ConversionReport) -> str:
    """Say in a line what was written."""
    done = "would be written" if report.dry_run else "written"
    paths = " and ".join(map(shown, (report.target, *report.extra_outputs)))
    what = f"optimizer {report.optimizer}" if report.to == DEFAULT else report.to
    return f"{paths}: {done}, {report.n_tensors} tensors, {report.target_bytes:,} bytes, {what}, {report.seconds:.3f} s"


def error_line(result: JobResult) -> str:
    """Say in a line why a job failed."""
    assert result.error is not None
    words = words_of(result.error)
    named = isinstance(result.error, CheckpointError | ModuleNotFoundError) or getattr(result.error, "filename", None)
    return words if named else f"{shown(os.fspath(result.job.source))}: {words}"


def as_json(result: JobResult, *, alone: bool) -> dict[str, Any]:
    """Return what is known of a result; of one that is `alone`, the report only."""
    if result.report is not None:
        report = result.report._asdict()
        return report if alone else {"status": result.status, **report}
    row = {"status": result.status, "source": public_name(result.job.source), "target": public_name(result.job.target)}
    if result.error is not None:
        row |= {"error": words_of(result.error), "error_class": type(result.error).__name__}
    return row
