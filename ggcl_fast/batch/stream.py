"""A stream of jobs in, a stream of results out, on any executor."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Final, Literal

from ..storage.identity import Claims
from ..storage.system import n_cpus
from ..storage.urls import StrPath
from ..targets import names
from ..targets.options import Choices, Options
from .jobs import Job, JobResult
from .pool import Pool, Work, is_lost, process_pool

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CHUNK", "convert_many"]

CHUNK: Final = 8
"""Jobs sent to a worker together: sending costs 0.2 ms, a seventh of converting 2 MB."""

_ALONE: Final = 2  # times that a job was lost with others, before it is done alone
_LOST: Final = "the executor gave up what it had to do: the way to it may be lost"
_LOOK: Final = 0.1  # seconds between two looks at whether to stop, or whether an executor is lost


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
    soon as it is there: a million jobs need the memory of a window of them, and 200 bytes for each.

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
        For `convert`: force, ff, fsync, check_finite and so on.

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
    work = Work(Options(**options), skip_existing=skip_existing)
    source = _Jobs((Job(*job) for job in jobs), work.options, stop)
    if isinstance(jobs, Sequence):
        source.expect([Job(*job) for job in jobs])
    if executor is None and workers == 1:
        results = _here(source, work)
    else:
        chunk = max(1, chunk)
        n_chunks = max(1, -(-window // chunk)) if window is not None else 16 * (workers or n_cpus())
        results = _elsewhere(source, work, executor, workers, n_chunks, chunk)
    return _raising(results) if on_error == "raise" else results


class _Jobs:
    """The jobs as they are taken, each held against those before it."""

    def __init__(self, jobs: Iterator[Job], options: Options, stop: threading.Event | None) -> None:
        self._jobs = jobs
        self._options = options
        self._claims = Claims()
        self._refused: list[JobResult] = []
        self.stop = stop

    def expect(self, jobs: Sequence[Job]) -> None:
        """Know beforehand what is read, so that no job that comes first writes over the source of a later one."""
        for job in jobs:
            with contextlib.suppress(TypeError):  # told when its turn comes
                self._claims.add(names.inputs(job.source, self._options), ())

    @property
    def stopped(self) -> bool:
        """Whether no other job is to begin."""
        return self.stop is not None and self.stop.is_set()

    def take(self, n: int) -> list[Job]:
        """Take up to `n` jobs, none where they have come to an end or were stopped."""
        return [] if self.stopped else list(islice(self._good(), n))

    def _good(self) -> Iterator[Job]:
        for job in self._jobs:
            try:
                self._claims.add(names.inputs(job.source, self._options), names.taken(job.target, self._options))
            except Exception as error:  # a job that cannot be is a result like others
                self._refused.append(JobResult(job, "failed", None, error.with_traceback(None)))
            else:
                yield job

    def refused(self) -> Iterator[JobResult]:
        """Yield what became of the jobs that were not given out."""
        while self._refused:
            yield self._refused.pop(0)


def _here(jobs: _Jobs, work: Work) -> Iterator[JobResult]:
    """Do one job after the other."""
    while some := jobs.take(1):
        yield from jobs.refused()
        yield work.one(some[0])
    yield from jobs.refused()


def _elsewhere(
    jobs: _Jobs, work: Work, executor: Executor | None, workers: int | None, n_chunks: int, chunk: int
) -> Iterator[JobResult]:
    """Send jobs to `executor`, or to a pool of our own, up to `n_chunks` at a time."""
    flight = _Flight(work, executor, workers)
    stopping = False
    try:
        while True:
            if not jobs.stopped:
                yield from flight.send_again()
            while flight.has_room(n_chunks) and (some := jobs.take(chunk)):
                yield from flight.send(some)
            yield from jobs.refused()
            if jobs.stopped and not stopping:
                stopping = True
                flight.stop()
            if not flight.pending:
                if jobs.stopped or not flight.lost:
                    return
                continue
            looks = jobs.stop is not None or executor is not None
            done, _ = wait(flight.pending, _LOOK if looks else None, FIRST_COMPLETED)
            if not done and is_lost(executor):
                raise BrokenExecutor(_LOST)
            for future in done:
                yield from flight.land(future)
    finally:
        flight.end()


class _Flight:
    """The jobs in work on an executor.

    Where a pool of our own breaks, because one of its workers died, all that it had in hand is lost, and nobody knows
    whose fault it was.  A new pool gets each of these jobs by itself, a few at a time; if that breaks too, the few are
    done one by one, and the one that breaks the pool once more has failed.
    """

    def __init__(self, work: Work, executor: Executor | None, workers: int | None) -> None:
        self._work = work
        self._again = work.again(time.time())
        self._executor = self._pool = executor
        self._workers = workers or n_cpus()
        self._is_ending = False
        self.lost: list[tuple[Job, int]] = []
        self.pending: dict[Future[list[JobResult]], tuple[list[Job], int, Executor]] = {}

    def has_room(self, n_chunks: int) -> bool:
        """Tell whether more jobs can be sent."""
        return not self.lost and len(self.pending) < n_chunks

    def send(self, jobs: list[Job], times_lost: int = 0) -> Iterator[JobResult]:
        """Send some jobs; yield what fails at once."""
        if self._pool is None:
            self._pool = process_pool(self._workers)
        pool = self._pool
        try:
            future = pool.submit(self._again if times_lost else self._work, jobs)
        except BrokenExecutor as error:
            yield from self._lose(jobs, times_lost, pool, error)
        except (RuntimeError, OSError) as error:
            raise BrokenExecutor(f"the executor takes no more work: {error}") from error
        else:
            self.pending[future] = jobs, times_lost, pool

    def land(self, future: Future[list[JobResult]]) -> Iterator[JobResult]:
        """Yield what became of jobs whose future is done."""
        jobs, times_lost, pool = self.pending.pop(future)
        if future.cancelled():
            if not self._is_ending:  # nor was it us
                raise BrokenExecutor(_LOST)
            return
        problem = future.exception()
        if isinstance(problem, BrokenExecutor):
            yield from self._lose(jobs, times_lost, pool, problem)
        elif isinstance(problem, Exception):
            yield from _failed(jobs, problem)
        elif problem is not None:
            raise problem
        else:
            yield from future.result()

    def _lose(self, jobs: list[Job], times_lost: int, pool: Executor, error: BrokenExecutor) -> Iterator[JobResult]:
        if pool is self._pool:  # and not one before it, of which this is the last to be heard
            self._pool = self._executor  # None: a new one for the next
        if self._executor is not None or times_lost == _ALONE:
            yield from _failed(jobs, error)
        else:
            self.lost += ((job, times_lost + 1) for job in jobs)

    def send_again(self) -> Iterator[JobResult]:
        """Send jobs that were lost: as many as there are workers, and those lost twice alone."""
        self.lost.sort(key=itemgetter(1), reverse=True)
        while self.lost:
            job, times_lost = self.lost[-1]
            if len(self.pending) >= (1 if times_lost == _ALONE else self._workers):
                return
            self.lost.pop()
            yield from self.send([job], times_lost)

    def stop(self) -> None:
        """Let what is in work be finished, and nothing else begin."""
        self._is_ending = True
        for future in self.pending:
            future.cancel()
        if isinstance(self._pool, Pool) and self._executor is None:
            self._pool.stop()

    def end(self) -> None:
        """Leave nothing behind."""
        self._is_ending = True
        for future in self.pending:
            future.cancel()
        if isinstance(self._pool, Pool) and self._executor is None:
            self._pool.end(now=bool(self.pending))


def _failed(jobs: list[Job], error: Exception) -> Iterator[JobResult]:
    for job in jobs:
        yield JobResult(job, "failed", None, error)


def _raising(results: Iterator[JobResult]) -> Iterator[JobResult]:
    """Yield `results` up to the first failure, and raise that."""
    for result in results:
        if result.error is not None:
            results.close()  # type: ignore[attr-defined]
            raise result.error
        yield result
