"""Copies of the base model that several jobs of a run would write alike: one of them does, the others come after it.

finetune kept its latest checkpoint under two names, and an adapter beside each: four files of one training.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..storage.streams import is_stream
from ..storage.urls import StrPath, located
from ..targets.options import Options
from .jobs import Job, JobResult

__all__ = ["Copies"]

_MOST: Final = 1024  # jobs that wait


class _Copy(NamedTuple):
    """The copy that a job would write."""

    content: str
    """What tells it from others."""
    path: StrPath


class Copies:
    """The copies of a run, and the jobs that wait for one.

    Where the job that writes a copy fails, the next of those that wait for it writes its own.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._makers: dict[str, _Copy] = {}  # by target
        self._waiting: dict[str, list[tuple[Job, _Copy]]] = {}  # by content of a copy that is being made
        self._made: dict[str, StrPath] = {}  # by content
        self._free: deque[tuple[Job, _Copy]] = deque()
        self.of: dict[str, StrPath] = {}
        """Copies that are there, by the targets of jobs in work that make use of them."""

    @property
    def is_full(self) -> bool:
        """Whether so many jobs wait that no other is to be taken."""
        return sum(map(len, self._waiting.values())) >= _MOST

    def let(self, job: Job) -> bool:
        """Tell whether `job` can be done now; if not, it waits, and `free` gives it out."""
        copy = self._copy(job)
        return copy is None or self._let(job, copy)

    def free(self) -> Iterator[Job]:
        """Yield jobs that have waited and can be done now."""
        while self._free:
            job, copy = self._free.popleft()
            if self._let(job, copy):
                yield job

    def land(self, result: JobResult) -> None:
        """Take what became of a job that could be done."""
        target = located(result.job.target)
        self.of.pop(target, None)
        copy = self._makers.pop(target, None)
        if copy is not None:
            if result.status != "failed":
                self._made[copy.content] = copy.path
            self._free.extend(self._waiting.pop(copy.content))

    def _let(self, job: Job, copy: _Copy) -> bool:
        if copy.content in self._waiting:
            self._waiting[copy.content].append((job, copy))
            return False
        if copy.content in self._made:
            self.of[located(job.target)] = self._made[copy.content]
        else:
            self._waiting[copy.content] = []
            self._makers[located(job.target)] = copy
        return True

    def _copy(self, job: Job) -> _Copy | None:
        """Return the copy that `job` would write, None where it writes none, or its source can be read but once."""
        if self._options.base is None or self._options.to not in ("adapter", None):
            return None
        from ..readers import open_checkpoint
        from ..targets import names
        from ..targets.about import copy_fingerprint

        with contextlib.suppress(Exception):  # told when its turn comes
            if os.path.isfile(located(job.source)) and not is_stream(located(job.source)):
                with open_checkpoint(job.source, engine=self._options.engine) as checkpoint:
                    options = self._options.for_format(checkpoint.format)
                    outputs = names.outputs(job.target, options)
                    if len(outputs) > 1 and (content := copy_fingerprint(checkpoint)) is not None:
                        return _Copy(content, outputs[0])
        return None
