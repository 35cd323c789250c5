"""A pool of processes that can be stopped between files, ended at once, and never outlives its parent."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import connection
from typing import Final

from ..storage.outputs import Progress
from ..storage.system import n_cpus, share_cpus, without_blas_threads
from ..storage.urls import StrPath, located
from ..targets.options import Options
from .jobs import Job, JobResult, convert_one
from .progress import Share, Teller, read_told

__all__ = ["Pool", "Work", "is_lost", "process_pool"]

_CLOCK: Final = 0.02  # seconds by which a file system's clock may be behind
_GRACE: Final = 1.0  # seconds for a worker to undo what it has begun

_stopping = threading.Event()  # in a worker: begin nothing more
_telling: Progress | None = None  # in a worker whose parent wants to know how far it is


class _Ended(BaseException):
    """Raised in a worker's main thread when it is to end at once."""

    status = 128 + signal.SIGTERM


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with some jobs; goes to workers by pickle.

    It returns a result for each job that was begun: all of them, unless the worker was told to stop.
    """

    options: Options
    skip_existing: bool
    copies: Mapping[str, StrPath]
    """As of `copies.Queue.copies`."""
    since: float | None = None

    def again(self, since: float) -> Work:
        """Return the same for jobs that may have been done since that time, without anybody's hearing of it."""
        return dataclasses.replace(self, since=since)

    def for_jobs(self, jobs: list[Job]) -> Work:
        """Return the same with what concerns these jobs alone, as it is now."""
        targets = [located(job.target) for job in jobs]
        copies = {target: self.copies[target] for target in targets if target in self.copies}
        return dataclasses.replace(self, copies=copies)

    def __call__(self, jobs: list[Job]) -> list[JobResult]:
        """Do some jobs."""
        results: list[JobResult] = []
        try:
            for job in jobs:
                if _stopping.is_set():
                    break
                results.append(self.one(job, _telling))
        except _Ended:  # what was begun has been undone on the way here; a pool would only go on with the next job
            os._exit(_Ended.status)
        return results

    def one(self, job: Job, progress: Progress | None = None) -> JobResult:
        """Do one job, and tell `progress` of bytes of its source."""
        options, skip_existing = self.options, self.skip_existing
        copied = self.copies.get(located(job.target)) if self.copies else None
        if self.since is not None and _is_newer(job.target, self.since):  # no other job of the run writes it
            options, skip_existing = options.replacing(), False
        if progress is None:
            return convert_one(job, options, skip_existing=skip_existing, copied=copied)
        share = Share(job.source, progress)
        options = dataclasses.replace(options, progress=share)
        result = convert_one(job, options, skip_existing=skip_existing, copied=copied)
        share.finish(result)
        return result


def _is_newer(target: StrPath, since: float) -> bool:
    try:
        return os.stat(located(target)).st_mtime >= since - _CLOCK
    except (OSError, ValueError):
        return False


def is_lost(executor: Executor | None) -> bool:
    """Tell whether nothing more can come from `executor`: Dask's has a client, and forgets futures when that closes."""
    return getattr(getattr(executor, "_client", None), "status", "") == "closed"


class Pool(ProcessPoolExecutor):
    """Fresh processes that hold the ends of pipes: the closing of two tells them what to do, by a third they tell.

    Nothing that is locked is shared: a worker that is killed can hold up nobody.
    """

    def __init__(self, n_workers: int, *, tells: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        (stop, self._stop), (end, self._end) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self._told: connection.Connection | None = None
        telling = None
        if tells:
            self._told, telling = context.Pipe(duplex=False)
            os.set_blocking(self._told.fileno(), False)
        super().__init__(
            n_workers, mp_context=context, initializer=_begin_worker, initargs=(n_workers, stop, end, telling)
        )

    def told(self) -> int:
        """Return the bytes of sources that the workers have done since the last call, if they tell it."""
        return read_told(self._told.fileno()) if self._told is not None else 0

    def stop(self) -> None:
        """Let every worker finish the file in its hands, and begin no other."""
        self._stop.close()

    def end(self, *, now: bool) -> None:
        """Wait for what is running, or with `now` interrupt it, which leaves no part of a file."""
        if now:
            self._end.close()
        self.shutdown(cancel_futures=True)
        self._end.close()
        self._stop.close()


def process_pool(n_workers: int | None = None) -> ProcessPoolExecutor:
    """Return a pool of `n_workers` fresh processes, one a processor by default.

    Its workers leave SIGINT to their parent, and end when it dies.
    """
    return Pool(n_workers or n_cpus())


def _begin_worker(
    n_workers: int, stop: connection.Connection, end: connection.Connection, telling: connection.Connection | None
) -> None:
    share_cpus(n_workers)
    without_blas_threads()
    from .. import conversion  # noqa: F401  # what every job needs

    global _telling
    if telling is not None:
        _telling = Teller(os.dup(telling.fileno()))

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The pool's own code may catch what is raised and wait for the next job: so the end is sure to come.
        threading.Thread(target=_end_soon, daemon=True).start()
        raise _Ended

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=_follow, args=(stop, end), daemon=True).start()


def _end_soon() -> None:
    time.sleep(_GRACE)
    os._exit(_Ended.status)


def _follow(stop: connection.Connection, end: connection.Connection) -> None:
    """Wait for the parent to close its end of a pipe, or to die, which closes both."""
    waiting = {stop, end}
    while end in waiting:
        with contextlib.suppress(OSError):
            for closed in connection.wait(list(waiting)):
                waiting.discard(closed)
        _stopping.set()
    os.kill(os.getpid(), signal.SIGTERM)
