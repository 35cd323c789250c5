"""Jobs that would write the same copy of the base model: one writes it, and the others give it their names."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Final

from ..storage.streams import is_stream
from ..storage.urls import StrPath, is_url, located
from ..targets.options import Options
from .jobs import Job, JobResult

__all__ = ["Queue"]

_KEPT: Final = 1000  # copies that were made, for jobs that come later

_Copy = tuple[str, str]  # its folder, and what tells it from others there


class Queue:
    """The jobs of a run that write a copy, one at a time of those that would write the same."""

    def __init__(self, options: Options, *, skip_existing: bool) -> None:
        self._options = options
        self._skip_existing = skip_existing
        self._in_work: dict[str, _Copy] = {}  # by target
        self._behind: dict[_Copy, deque[Job]] = {}  # who waits for those in work
        self._made: dict[_Copy, StrPath] = {}
        self.copies: dict[str, StrPath] = {}
        """Copies that were made, by targets of jobs in work that would write the same."""
        self.free: deque[Job] = deque()
        """Jobs that have waited and can be done now."""
        self.n_waiting = 0
        """Jobs that wait, these included."""

    def admit(self, job: Job) -> bool:
        """Tell whether `job` can be done now; if not, it waits, and `released` gives it out."""
        copy = self._copy(job)
        if copy is None:
            return True
        if copy in self._behind:
            self._behind[copy].append(job)
            self.n_waiting += 1
            return False
        self._behind[copy] = deque()
        self._begin(job, copy)
        return True

    def released(self) -> Iterator[Job]:
        """Yield the jobs that are free, and forget them."""
        while self.free:
            self.n_waiting -= 1
            yield self.free.popleft()

    def land(self, result: JobResult) -> None:
        """Take what became of a job that could be done."""
        target = located(result.job.target)
        self.copies.pop(target, None)
        copy = self._in_work.pop(target, None)
        if copy is None:
            return
        if result.report is not None and result.report.extra_outputs and not result.report.dry_run:
            self._made[copy] = result.report.extra_outputs[0]
            if len(self._made) > _KEPT:
                del self._made[next(iter(self._made))]
        if self._behind[copy]:
            job = self._behind[copy].popleft()
            self._begin(job, copy)
            self.free.append(job)
        else:
            del self._behind[copy]

    def _begin(self, job: Job, copy: _Copy) -> None:
        self._in_work[located(job.target)] = copy
        if copy in self._made:
            self.copies[located(job.target)] = self._made[copy]

    def _copy(self, job: Job) -> _Copy | None:
        """Return what tells the copy that `job` would write.

        None where it writes none, or its source is no local file, which can be read twice at no cost.
        """
        if self._options.base is None or self._options.base_out is not None:
            return None
        if self._options.to not in ("adapter", None) or is_url(located(job.target)):
            return None
        from ..readers import open_checkpoint
        from ..targets import names
        from ..targets.copies import copy_fingerprint

        with contextlib.suppress(Exception):  # told when its turn comes
            written = names.outputs(job.target, self._options)
            if self._skip_existing and all(os.path.exists(located(name)) for name in written):
                return None
            if os.path.isfile(located(job.source)) and not is_stream(located(job.source)):
                with open_checkpoint(job.source) as checkpoint:
                    if self._options.for_format(checkpoint.format, checkpoint.source.name).to == "adapter":
                        norms = copy_fingerprint(checkpoint)
                        folder = os.path.realpath(os.path.dirname(located(job.target)))
                        return (folder, norms) if norms is not None else None
        return None
