"""What is to be done, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from ..storage.urls import StrPath, public_name

if TYPE_CHECKING:
    from ..conversion import ConversionReport
    from ..targets.options import Options

__all__ = ["Job", "JobResult", "Status", "convert_one"]

Status = Literal["converted", "skipped", "failed"]


class Job(NamedTuple):
    """One conversion to do."""

    source: StrPath
    """What to read: a path or a URL."""
    target: StrPath
    """What to write."""

    def __repr__(self) -> str:
        return f"Job(source={public_name(self.source)!r}, target={public_name(self.target)!r})"


class JobResult(NamedTuple):
    """What became of a job."""

    job: Job
    status: Status
    report: ConversionReport | None
    """Where it was converted."""
    error: Exception | None
    """Where it failed: mostly a `CheckpointError` or an `OSError`."""


def convert_one(job: Job, options: Options, *, skip_existing: bool) -> JobResult:
    """Do one job."""
    from ..conversion import run, target_exists

    try:
        if skip_existing and target_exists(job.target):
            return JobResult(job, "skipped", None, None)
        return JobResult(job, "converted", run(job.source, job.target, options), None)
    except Exception as error:
        return JobResult(job, "failed", None, error.with_traceback(None))
