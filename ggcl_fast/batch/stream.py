"""A stream of jobs in, a stream of results out, on any executor."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

from ..storage.identity import Claims
from ..storage.system import n_cpus
from ..storage.urls import StrPath
from ..targets import names
from ..targets.options import Choices, Options
from .copies import Queue
from .flight import Flight
from .jobs import Job, JobResult
from .pool import Work
from .progress import Tally

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CHUNK", "convert_many"]

CHUNK: Final = 8
"""Jobs sent to a worker together: sending costs 0.2 ms, a seventh of converting 2 MB."""


def convert_many(
    jobs: Iterable[Job | tuple[StrPath, StrPath]],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    on_error: Literal["return", "raise"] = "return",
    window: int | None = None,
    chunk: int = CHUNK,
    skip_existing: bool = False,
    stop: threading.Event | None = None,
    **options: Unpack[Choices],
) -> Iterator[JobResult]:
    """Convert many checkpoints, and yield a result for each as it comes, in no particular order.

    Jobs are taken from their iterable as room appears in a window of work in flight, and each result is given out as
    soon as it is there: a million jobs need the memory of a window of them, and 200 bytes for each.  Local files
    of which the same copy of the base model would be written to the same folder come one after the other: the first
    writes it, and the others give that file their names, which a note in their reports tells.

    Parameters
    ----------
    jobs
        Sources and targets.  Taken one after the other as work gets done, never all at once.  One whose output is an
        input or an output of another job fails, whatever links and URLs lead there; which inputs come later is known
        where `jobs` is a sequence.
    executor
        What runs them: any `concurrent.futures.Executor`, such as a thread pool, loky's, mpi4py's, or Dask's
        ``client.get_executor(pure=False)``.  It is used as it is and left open.  None makes a `pool.process_pool` for
        this call; as with any pool of processes, a script that does so keeps its own work under
        ``if __name__ == "__main__"``.  With one that does a task again when a machine is lost, give ``force=True``:
        a job must not stumble over its own output.
    workers
        Processes of the pool made here; None for one a processor.  1 makes none: each job is done here, when its
        result is asked for.
    on_error
        "return": a failed job is a result like others.  "raise": the first failure is raised, and what has not
        begun is cancelled.
    window
        Jobs in flight at a time, about; None for 16 times the number of processors and chunks here.  With an executor
        that spans machines, give four times its workers times `chunk` or more.
    chunk
        Jobs that are sent to a worker together.  1 where each takes seconds.
    skip_existing
        Leave a job whose target exists: it is whole, since targets appear in one step.
    stop
        Set it, from a signal handler or another thread, and no other job begins; the results of those in work still
        come.  An `executor` that was given finishes the chunks in work.
    options
        For `convert`: force, ff, fsync, check_finite and so on.  `progress` is called here, while a result is waited
        for, with the bytes of sources that are done since its last call: within local files too, of others and with an
        `executor` when results come.  Its method ``begin`` is not; what it raises ends the run.

    Yields
    ------
    JobResult
        For every job exactly one, until `stop` is set.  Where a process of a pool made here died, a new pool does again
        what was lost, and a job that brings it down by itself has failed with a `concurrent.futures.BrokenExecutor`.
        Where an `executor` broke and says so, all jobs that it had have.

    Raises
    ------
    TypeError
        `options` has what `convert` does not take.
    BrokenExecutor
        An `executor` that spans machines is lost: it gave up by itself what it had to do, or takes no more.  Jobs
        without a result may have been done.
    ValueError
        `on_error` is neither, or `options` do not fit together: see `convert`.
    """
    if on_error not in ("return", "raise"):
        raise ValueError(f"on_error must be 'return' or 'raise', not {on_error!r}")
    given = Options(**options)
    common = dataclasses.replace(given, progress=None)
    tally = Tally(given.progress) if given.progress is not None else None
    source = _Jobs((Job(*job) for job in jobs), common, stop, skip_existing=skip_existing)
    work = Work(common, skip_existing, source.queue.copies)
    if isinstance(jobs, Sequence):
        source.expect([Job(*job) for job in jobs])
    if executor is None and workers == 1:
        results = _here(source, work, tally)
    else:
        chunk = max(1, chunk)
        n_chunks = max(1, -(-window // chunk)) if window is not None else 16 * (workers or n_cpus())
        results = _elsewhere(source, Flight(work, executor, workers, tally), n_chunks, chunk)
    if tally is not None:
        results = _tallied(results, tally)
    return _raising(results) if on_error == "raise" else results


class _Jobs:
    """The jobs as they are taken, each held against those before it, and held back while one writes for both."""

    def __init__(
        self, jobs: Iterator[Job], options: Options, stop: threading.Event | None, *, skip_existing: bool
    ) -> None:
        self._jobs = jobs
        self._options = options
        self._claims = Claims()
        self._refused: list[JobResult] = []
        self.queue = Queue(options, skip_existing=skip_existing)
        self._ended = False
        self.stop = stop

    def expect(self, jobs: Sequence[Job]) -> None:
        """Know beforehand what is read, so that no job that comes first writes over the source of a later one."""
        for job in jobs:
            with contextlib.suppress(Exception):  # told when its turn comes
                self._claims.add(names.inputs(job.source, self._options), ())

    @property
    def stopped(self) -> bool:
        """Whether no other job is to begin."""
        return self.stop is not None and self.stop.is_set()

    @property
    def n_waiting(self) -> int:
        """Jobs that were taken and wait for another; none while some can be done at once."""
        return self.queue.n_waiting if not self.queue.free else 0

    @property
    def has_more(self) -> bool:
        """Whether there may be more to take."""
        return not self.stopped and bool(self.queue.free or not self._ended)

    def take(self, n: int) -> list[Job]:
        """Take up to `n` jobs; return those that can be done now, which may be none."""
        some = list(islice(self.queue.released(), n)) if not self.stopped else []
        n_taken = len(some)
        while n_taken < n and self.has_more and not self.queue.free:
            job = next(self._jobs, None)
            if job is None:
                self._ended = True
                break
            try:
                self._claims.add(names.inputs(job.source, self._options), names.taken(job.target, self._options))
            except Exception as error:  # a job that cannot be is a result like others
                self._refused.append(JobResult(job, "failed", None, error.with_traceback(None)))
            else:
                n_taken += 1
                if self.queue.admit(job):
                    some.append(job)
        return some

    def landed(self, results: Iterable[JobResult]) -> Iterator[JobResult]:
        """Yield what became of jobs that were given out; others may have waited for it."""
        for result in results:
            self.queue.land(result)
            yield result

    def refused(self) -> Iterator[JobResult]:
        """Yield what became of the jobs that were not given out."""
        while self._refused:
            yield self._refused.pop(0)


def _here(jobs: _Jobs, work: Work, tally: Tally | None) -> Iterator[JobResult]:
    """Do one job after the other."""
    while jobs.has_more:
        for job in jobs.take(1):
            yield from jobs.refused()
            result = work.one(job, tally.share_from_within if tally is not None else None)
            if tally is not None and tally.error is not None:
                raise tally.error
            yield from jobs.landed([result])
        yield from jobs.refused()


def _elsewhere(jobs: _Jobs, flight: Flight, n_chunks: int, chunk: int) -> Iterator[JobResult]:
    """Send jobs to an executor, up to `n_chunks` at a time, those counted that wait for others."""
    stopping = False
    try:
        while True:
            if not jobs.stopped:
                yield from jobs.landed(flight.send_again())
            while jobs.has_more and flight.has_room(n_chunks - -(-jobs.n_waiting // chunk)):
                if some := jobs.take(chunk):
                    yield from jobs.landed(flight.send(some))
            yield from jobs.refused()
            if jobs.stopped and not stopping:
                stopping = True
                flight.stop()
            if not flight.pending:
                if jobs.stopped or not flight.lost:
                    return
                continue
            for future in flight.wait(looks=jobs.stop is not None):
                yield from jobs.landed(flight.land(future))
    finally:
        flight.end()


def _tallied(results: Iterator[JobResult], tally: Tally) -> Iterator[JobResult]:
    """Yield `results`, having told how far all is."""
    with contextlib.closing(results):  # type: ignore[type-var]
        for result in results:
            tally.land(result)
            yield result


def _raising(results: Iterator[JobResult]) -> Iterator[JobResult]:
    """Yield `results` up to the first failure, and raise that."""
    for result in results:
        if result.error is not None:
            results.close()  # type: ignore[attr-defined]
            raise result.error
        yield result
