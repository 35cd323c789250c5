"""The jobs in work on an executor: sent, landed, and sent again where the processes that had them died."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from operator import itemgetter
from typing import Final

from ..storage.system import n_cpus
from .jobs import Job, JobResult
from .pool import Pool, Work, is_lost
from .progress import Tally

__all__ = ["Flight"]

_ALONE: Final = 2  # times that a job was lost with others, before it is done alone
_LOST: Final = "the executor gave up what it had to do: the way to it may be lost"
_LOOK: Final = 0.1  # seconds between two looks at whether to stop, how far all is, or whether an executor is lost


class Flight:
    """The jobs in work on an executor.

    Where a pool of our own breaks, because one of its workers died, all that it had in hand is lost, and nobody knows
    whose fault it was.  A new pool gets each of these jobs by itself, a few at a time; if that breaks too, the few are
    done one by one, and the one that breaks the pool once more has failed.
    """

    def __init__(self, work: Work, executor: Executor | None, workers: int | None, tally: Tally | None) -> None:
        self._work = work
        self._tally = tally
        self._again = work.again(time.time())
        self._executor = self._pool = executor
        self._workers = workers or n_cpus()
        self._is_ending = False
        self.lost: list[tuple[Job, int]] = []
        self.pending: dict[Future[list[JobResult]], tuple[list[Job], int, Executor]] = {}

    @property
    def _own_pool(self) -> Pool | None:
        return self._pool if isinstance(self._pool, Pool) and self._executor is None else None

    def has_room(self, n_chunks: int) -> bool:
        """Tell whether more jobs can be sent."""
        return not self.lost and len(self.pending) < n_chunks

    def send(self, jobs: list[Job], times_lost: int = 0) -> Iterator[JobResult]:
        """Send some jobs; yield what fails at once."""
        if self._pool is None:
            self._pool = Pool(self._workers, tells=self._tally is not None)
        pool = self._pool
        try:
            future = pool.submit((self._again if times_lost else self._work).for_jobs(jobs), jobs)
        except BrokenExecutor as error:
            yield from self._lose(jobs, times_lost, pool, error)
        except (RuntimeError, OSError) as error:
            raise BrokenExecutor(f"the executor takes no more work: {error}") from error
        else:
            self.pending[future] = jobs, times_lost, pool

    def wait(self, *, looks: bool) -> set[Future[list[JobResult]]]:
        """Return what is done, as soon as there is something; with `looks`, nothing after a while."""
        looks = looks or self._executor is not None or self._tally is not None
        done, _ = wait(self.pending, _LOOK if looks else None, FIRST_COMPLETED)
        if not done and is_lost(self._executor):
            raise BrokenExecutor(_LOST)
        if self._tally is not None and (pool := self._own_pool) is not None:
            self._tally.share(pool.told())
        return done

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
            if self._tally is not None:
                self._tally.lose()
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
        if (pool := self._own_pool) is not None:
            pool.stop()

    def end(self) -> None:
        """Leave nothing behind."""
        self._is_ending = True
        for future in self.pending:
            future.cancel()
        if (pool := self._own_pool) is not None:
            pool.end(now=bool(self.pending))


def _failed(jobs: list[Job], error: Exception) -> Iterator[JobResult]:
    for job in jobs:
        yield JobResult(job, "failed", None, error)
