"""Many files: a stream of jobs in, a stream of results out, on any executor.

Nothing here waits for all: jobs are taken from their iterable as room appears in a window of work in flight, and each
result is given out as soon as it is there.  So a million jobs need no more memory than a window of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from .sources import StrPath

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from .conversion import ConversionReport

__all__ = ["CHUNK", "Job", "JobResult", "Status", "convert_many", "n_cpus", "process_pool"]

Status = Literal["converted", "skipped", "failed"]
CHUNK: Final = 8
"""Jobs sent to a worker together: sending costs 0.2 ms, a seventh of converting 2 MB."""


_GRACE: Final = 1.0  # seconds for a worker to undo what it has begun


class Job(NamedTuple):
    """One conversion to do."""

    source: StrPath
    """What to read: a path or a URL."""
    target: StrPath
    """What to write."""


class JobResult(NamedTuple):
    """What became of a job."""

    job: Job
    status: Status
    report: ConversionReport | None
    """Where it was converted."""
    error: Exception | None
    """Where it failed: mostly a `CheckpointError` or an `OSError`."""


def convert_many(
    jobs: Iterable[Job | tuple[StrPath, StrPath]],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    on_error: Literal["return", "raise"] = "return",
    window: int | None = None,
    chunk: int = CHUNK,
    skip_existing: bool = False,
    **options: Any,
) -> Iterator[JobResult]:
    """Convert many checkpoints, and yield a result for each as it comes, in no particular order.

    Parameters
    ----------
    jobs
        Sources and targets.  Taken one after the other as work gets done, never all at once.
    executor
        What runs them: any `concurrent.futures.Executor`, such as a thread pool, loky's, mpi4py's, or Dask's
        ``client.get_executor(pure=False)``.  It is used as it is and left open.  None makes a `process_pool` for
        this call; as with any pool of processes, a script that does so keeps its own work under
        ``if __name__ == "__main__"``.  With one that does a task again when a machine is lost, give ``force=True``:
        a job must not stumble over its own output.
    workers
        Processes of the pool made here; None for one a processor.
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
    options
        For `convert`: force, ff, fsync, check_finite and so on.

    Yields
    ------
    JobResult
        For every job exactly one.  Where a worker process died, the jobs that it had are failed with a
        `concurrent.futures.BrokenExecutor`, and a pool made here is replaced by a new one.

    Raises
    ------
    TypeError
        `options` has what `convert` does not take.
    """
    if on_error not in ("return", "raise"):
        raise ValueError(f"on_error must be 'return' or 'raise', not {on_error!r}")
    _check_options(options)
    chunk = max(1, chunk)
    n_chunks = max(1, -(-window // chunk)) if window is not None else 16 * (workers or n_cpus())
    work = _Work(skip_existing, options)
    chunks = _chunks((Job(*job) for job in jobs), chunk)
    pool = executor
    pending: dict[Future[list[JobResult]], list[Job]] = {}
    try:
        while True:
            for some in islice(chunks, n_chunks - len(pending)):
                if pool is None:
                    pool = process_pool(workers)
                try:
                    pending[pool.submit(work, some)] = some
                except BrokenExecutor as error:
                    yield from _failed(some, error, on_error)
                    pool = executor  # None: a new one for the next
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                some = pending.pop(future)
                problem = future.exception()
                if isinstance(problem, Exception):
                    if isinstance(problem, BrokenExecutor):
                        pool = executor
                    yield from _failed(some, problem, on_error)
                elif problem is not None:
                    raise problem
                else:
                    for result in future.result():
                        if result.error is not None and on_error == "raise":
                            raise result.error
                        yield result
    finally:
        for future in pending:
            future.cancel()
        if isinstance(pool, _Pool) and executor is None:
            pool.end(now=bool(pending))


def _failed(jobs: list[Job], error: Exception, on_error: str) -> Iterator[JobResult]:
    if on_error == "raise":
        raise error
    for job in jobs:
        yield JobResult(job, "failed", None, error)


def _chunks(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    while some := list(islice(jobs, size)):
        yield some


def _check_options(options: dict[str, Any]) -> None:
    """Raise `TypeError` here and now rather than once a job."""
    import inspect

    from .conversion import convert

    inspect.signature(convert).bind("source", "target", **options)


class _Work:
    """What a worker does with some jobs; goes there by pickle."""

    def __init__(self, skip_existing: bool, options: dict[str, Any]) -> None:
        self.skip_existing = skip_existing
        self.options = options

    def __call__(self, jobs: list[Job]) -> list[JobResult]:
        try:
            return [self._one(job) for job in jobs]
        except _Ended:  # what was begun has been undone on the way here; a pool would only go on with the next job
            os._exit(_Ended.status)

    def _one(self, job: Job) -> JobResult:
        from .conversion import convert, target_exists

        try:
            if self.skip_existing and target_exists(job.target):
                return JobResult(job, "skipped", None, None)
            return JobResult(job, "converted", convert(job.source, job.target, **self.options), None)
        except Exception as error:
            return JobResult(job, "failed", None, error.with_traceback(None))


def n_cpus() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Ended(BaseException):
    """Raised in a worker's main thread when it is to end at once."""

    status = 128 + signal.SIGTERM


class _Pool(ProcessPoolExecutor):
    """Processes that hold one end of a pipe, and end when the other is closed: by `end`, or with their parent."""

    def __init__(self, n_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        super().__init__(n_workers, mp_context=context, initializer=_begin_worker, initargs=(theirs,))

    def end(self, *, now: bool) -> None:
        """Wait for what is running, or with `now` interrupt it, which leaves no part of a file."""
        if now:
            self._ours.close()
        self.shutdown(cancel_futures=True)
        self._ours.close()


def process_pool(n_workers: int | None = None) -> ProcessPoolExecutor:
    """Return a pool of `n_workers` fresh processes, one a processor by default.

    Its workers leave SIGINT to their parent, and end when it dies.
    """
    return _Pool(n_workers or n_cpus())


def _begin_worker(pipe: Connection) -> None:
    from . import conversion  # noqa: F401  # what every job needs

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The pool's own code may catch what is raised and wait for the next job: so the end is sure to come.
        threading.Thread(target=_end_soon, daemon=True).start()
        raise _Ended

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_soon() -> None:
    time.sleep(_GRACE)
    os._exit(_Ended.status)


def _end_with(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
