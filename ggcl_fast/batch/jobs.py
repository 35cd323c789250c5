"""What is to be done, and what became of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..storage.streams import is_stream
from ..storage.urls import StrPath, is_url, located, public_name

if TYPE_CHECKING:
    from ..conversion import ConversionReport
    from ..targets.options import Options

__all__ = ["Job", "JobResult", "Status", "convert_one", "size_of"]

Status = Literal["converted", "skipped", "failed"]


class Job(NamedTuple):
    """One conversion to do."""

    source: StrPath
    """What to read: a path or a URL."""
    target: StrPath
    """What to write."""

    def __repr__(self) -> str:
        return f"Job(source={public_name(self.source)!r}, target={public_name(self.target)!r})"


def size_of(source: StrPath) -> int:
    """Return the bytes of a local file, 0 for anything else: what cannot be read is told by its job."""
    try:
        return os.path.getsize(located(source))
    except (OSError, TypeError, ValueError):
        return 0


class JobResult(NamedTuple):
    """What became of a job."""

    job: Job
    status: Status
    report: ConversionReport | None
    """Where it was converted."""
    error: Exception | None
    """Where it failed: mostly a `CheckpointError` or an `OSError`."""


def _is_there(job: Job, options: Options) -> Literal["all", "some", "nothing"]:
    """Tell how much of what a job writes is there."""
    from ..targets import names

    written = names.outputs(job.target, options)
    there = list(map(_exists, written))
    if all(there):
        return "all"
    if there[-1] and len(written) > 1 and not _needs_copy(job, options):
        return "all"  # there never was a copy of the base model
    return "some" if any(there) else "nothing"


def _exists(target: StrPath) -> bool:
    """Tell whether there is something at `target`, a path or a URL; what is there is whole."""
    name = located(target)
    if is_stream(name):
        return False
    if is_url(name):
        from ..storage.stores import remote_exists

        return remote_exists(name)
    return os.path.exists(name)


def _needs_copy(job: Job, options: Options) -> bool:
    """Tell whether an adapter comes with a copy of its base model."""
    from ..readers import open_checkpoint
    from ..targets.deltas import trains_norms

    with open_checkpoint(job.source, engine=options.engine) as checkpoint:
        return trains_norms(checkpoint)


def convert_one(job: Job, options: Options, *, skip_existing: bool, copied: StrPath | None = None) -> JobResult:
    """Do one job; `copied` is as in `conversion.run`."""
    from ..conversion import run

    try:
        if skip_existing:
            there = _is_there(job, options)
            if there == "all":
                return JobResult(job, "skipped", None, None)
            options = options.replacing() if there == "some" else options  # what is left of it is done again
        return JobResult(job, "converted", run(job.source, job.target, options, copied=copied), None)
    except Exception as error:
        return JobResult(job, "failed", None, error.with_traceback(None))
