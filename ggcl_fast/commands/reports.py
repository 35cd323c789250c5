"""What is told of a result: a line, warnings and notes, or an object."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

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


_PLAIN: Final = (int, float, str, dict)
_FACTS: Final = ("tensor", "index", "field", "offset", "expected", "found", "hint")


def as_json(result: JobResult) -> dict[str, Any]:
    """Return what is known of a result: the same keys for every one, null or empty where there is nothing to say."""
    report = result.report
    known = report._asdict() if report is not None else {}
    return {
        "status": "checked" if report is not None and report.dry_run else result.status,
        "source": public_name(result.job.source),
        "target": public_name(result.job.target),
        "outputs": [report.target, *report.extra_outputs] if report is not None else [],
        **{field: known.get(field) for field in _NUMBERS},
        "warnings": list(known.get("warnings", ())),
        "notes": list(known.get("notes", ())),
        "error": _error(result.error) if result.error is not None else None,
    }


_NUMBERS: Final = ("to", "n_tensors", "source_bytes", "target_bytes", "optimizer", "n_ff", "seconds")


def _error(error: Exception) -> dict[str, Any]:
    """Return what an error says, and the facts that it has as attributes."""
    facts = {name: value for name in _FACTS if (value := getattr(error, name, None)) is not None}
    plain = {
        name: value if isinstance(value, int | float | str | dict) else str(value) for name, value in facts.items()
    }
    name = getattr(error, "filename", None)
    more = {"errno": error.errno, "path": public_name(name) if name else None} if isinstance(error, OSError) else {}
    return {"type": type(error).__name__, "message": words_of(error), **plain, **more}
