"""Jobs whose adapters are for the same copy of the base model: one of them writes it, the others come after it."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator

from ..storage.streams import is_stream
from ..storage.urls import is_url, located
from ..targets.options import Options
from .jobs import Job, JobResult

__all__ = ["Queue"]


class Queue:
    """The jobs of a run that would write a copy, each behind those that would write the same.

    Who comes after finds the copy where `targets.copies` looks for it; where it is not there, because its writer has
    failed, the next one writes it.
    """

    def __init__(self, options: Options, *, skip_existing: bool) -> None:
        self._options = options
        self._skip_existing = skip_existing
        self._first: dict[str, tuple[str, str]] = {}  # copies that are being written, by their writers' targets
        self._behind: dict[tuple[str, str], deque[Job]] = {}  # by copy
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
        self._first[located(job.target)] = copy
        return True

    def released(self) -> Iterator[Job]:
        """Yield the jobs that are free, and forget them."""
        while self.free:
            self.n_waiting -= 1
            yield self.free.popleft()

    def land(self, result: JobResult) -> None:
        """Take what became of a job that could be done."""
        copy = self._first.pop(located(result.job.target), None)
        if copy is None:
            return
        behind = self._behind.pop(copy)
        if result.status == "failed" and behind:  # one after the other, until one has written it
            self._behind[copy] = behind
            job = behind.popleft()
            self._first[located(job.target)] = copy
            self.free.append(job)
        else:
            self.free += behind

    def _copy(self, job: Job) -> tuple[str, str] | None:
        """Return what tells the copy that `job` would write: its folder and its norms.

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
