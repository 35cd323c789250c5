"""The jobs of the command, one or thousands: who does them, and what the terminal shows of each."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import os
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..batch.jobs import Job, JobResult, convert_one, size_of
from ..storage.places import EXISTS
from ..storage.streams import STDOUT
from ..storage.system import n_cpus
from ..storage.urls import is_url, located, public_name
from ..targets.options import Options
from .reports import as_json, error_line, line_of, warn
from .terminal import LONG_WORK, Advance, Stopped, fail, shown, words_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..checkpoint import Checkpoint
    from .terminal import Signals

__all__ = ["Task", "run_jobs"]

_LARGE: Final = 16 << 20  # bytes from which on each job is sent by itself


class Task(NamedTuple):
    """What the command is to do."""

    jobs: list[Job]
    sizes: list[int]
    """Bytes of each job's source, 0 where that is not known."""
    options: Options
    n_others: int = 0
    """Files that were passed over."""
    failed: list[JobResult] = []  # noqa: RUF012 - never changed
    """What failed before it was begun."""
    alone: bool = False
    """Whether it is one file that was named, of which nothing is summed up."""

    @classmethod
    def of_one(cls, source: str, target: str, options: Options) -> Task:
        """Return the task of one file."""
        return cls([Job(source, target)], [size_of(source)], options, alone=True)

    @property
    def n_bytes(self) -> int:
        """Bytes of all sources."""
        return sum(self.sizes)


class _LostError(OSError):
    """What was to do the work is gone."""


def run_jobs(task: Task, args: Namespace, signals: Signals) -> int:
    """Do what is to be done with the arguments of `convert`, show it, and return the exit status."""
    begin = time.perf_counter()
    counts: Counter[str] = Counter()
    if task.alone and args.verbose:
        _describe(task.jobs[0].source, task.options)
    stopped, is_lost = None, 0
    signals.stop = None if task.alone else threading.Event()
    try:
        with _display(task, args) as display:
            for result in itertools.chain(task.failed, _results(task, args, signals, display)):
                counts[result.status] += 1
                display.show(result)
                if args.fail_fast and result.status == "failed" and signals.stop is not None:
                    signals.stop.set()
    except Stopped as stop:
        stopped = stop
    except _LostError as error:
        is_lost = fail(words_of(error))
    if not task.alone and (signals.number or is_lost or not args.quiet):
        more = "; --skip-existing goes on from here" if signals.number or is_lost else ""
        print(f"ggcl-fast: {_summary(counts, task, begin)}{more}", file=sys.stderr)
    if stopped is not None:
        raise stopped
    return 1 if counts["failed"] or is_lost else 0


def _results(task: Task, args: Namespace, signals: Signals, display: _Display) -> Iterator[JobResult]:
    """Yield what becomes of each job that is begun."""
    if task.alone:
        options = dataclasses.replace(task.options, progress=display.progress)
        yield convert_one(task.jobs[0], options, skip_existing=args.skip_existing)
        return
    from concurrent.futures import BrokenExecutor

    from ..batch.stream import CHUNK, convert_many

    gc.enable()  # this process lives longer than one conversion
    jobs, answered = task.jobs, list[JobResult]()
    options = dataclasses.replace(task.options, progress=display.progress)
    if args.dask and not options.force:
        # A cluster does a task again whose result it lost: it must not stumble over its own output.
        jobs, answered = _sift(jobs, args)
        options = options.replacing()
        if display.progress is not None:
            left = set(jobs)
            display.progress(sum(size for job, size in zip(task.jobs, task.sizes) if job not in left))
    yield from answered
    with _executor(args) as (executor, n_workers):
        n_workers = n_workers or max(1, min(args.jobs or n_cpus(), len(jobs)))
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        try:
            yield from convert_many(
                jobs, executor=executor, workers=n_workers, chunk=_chunk(task, n_workers),
                window=16 * CHUNK * n_workers, skip_existing=args.skip_existing, stop=signals.stop, **given,
            )  # fmt: skip
        except BrokenExecutor as error:
            raise _LostError(0, str(error), args.dask) from error


def _sift(jobs: list[Job], args: Namespace) -> tuple[list[Job], list[JobResult]]:
    """Return the jobs whose targets are not there yet, and what becomes of the others."""
    there = _existing(jobs, args.target)
    answered = []
    for job in jobs:
        if os.fspath(job.target) in there:
            error = FileExistsError(errno.EEXIST, EXISTS, public_name(job.target))
            answered.append(
                JobResult(job, "skipped", None, None) if args.skip_existing else JobResult(job, "failed", None, error)
            )
    return [job for job in jobs if os.fspath(job.target) not in there], answered


def _existing(jobs: list[Job], target: str) -> set[str]:
    """Return which targets are there: objects by one listing of their folder."""
    if is_url(located(target)):
        from ..storage.stores import list_objects

        folder = target.rstrip("/") + "/"
        return {folder + name for name, _ in list_objects(folder, recursive=True)}
    return {os.fspath(job.target) for job in jobs if os.path.exists(located(job.target))}


def _chunk(task: Task, n_workers: int) -> int:
    from ..batch.stream import CHUNK

    large = task.n_bytes > _LARGE * len(task.sizes)
    return 1 if large else max(1, min(CHUNK, len(task.jobs) // (4 * n_workers)))


@contextlib.contextmanager
def _executor(args: Namespace) -> Iterator[tuple[Executor | None, int]]:
    """Give what runs the jobs, and its number of workers; None and 0 for what is here."""
    if not args.dask:
        yield None, 0
        return
    try:
        from distributed import Client
    except ImportError:
        raise OSError(0, "needs Dask: pip install distributed", "--dask") from None
    import logging

    logging.disable()  # a lost scheduler is told in words of our own, and not in six tracebacks of three libraries
    try:
        with Client(args.dask, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            yield client.get_executor(pure=False, retries=3), max(1, len(client.scheduler_info()["workers"]))
    finally:
        logging.disable(logging.NOTSET)


# --- what is shown --------------------------------------------------------------------------------------------------


def _describe(source: Any, options: Options) -> None:
    """Print what a checkpoint holds, a line a subject."""
    from ..readers import open_checkpoint

    with open_checkpoint(source, engine=options.engine) as checkpoint:
        lines = _description(checkpoint)
    print(*lines, sep="\n", file=sys.stderr)


def _description(checkpoint: Checkpoint) -> Iterator[str]:
    for subject, value in (
        ("model", checkpoint.parameters),
        ("ranks", dict(checkpoint.ranks)),
        ("training", checkpoint.training),
        ("optimizer", checkpoint.optimizer),
    ):
        facts = value if isinstance(value, dict) else value._asdict() if value is not None else {"name": None}
        yield f"{subject + ':':<10} {', '.join(f'{key} {fact}' for key, fact in facts.items())}"


class _Display:
    """Shows results: lines, and a bar over bytes and files where a person watches."""

    def __init__(self, task: Task, args: Namespace, bar: Any = None) -> None:
        self._args = args
        self._bar = bar
        self._sizes = dict(zip(task.jobs, task.sizes))
        self._done = f"/{len(task.jobs)} files" if not task.alone else ""
        self._n_done = 0
        self.progress = Advance(bar) if bar is not None else None

    def show(self, result: JobResult) -> None:
        """Show one result."""
        if self._bar is None:
            self._print(result)
            return
        self._n_done += 1
        if self._done:
            self._bar.set_postfix_str(f"{self._n_done}{self._done}", refresh=False)
            if result.report is None and is_url(located(result.job.source)):  # whose size is known here alone
                self._bar.update(self._sizes.get(result.job, 0))
        with self._bar.external_write_mode():
            self._print(result)

    def _print(self, result: JobResult) -> None:
        args, report = self._args, result.report
        out = sys.stderr if result.job.target == STDOUT else sys.stdout  # which the output itself has
        if result.error is not None:
            fail(error_line(result))
        elif report is not None and not args.quiet:
            warn(report)
        if args.json:
            print(json.dumps(as_json(result)), flush=True)
        elif report is not None and not args.quiet:
            print(line_of(report), file=out)
        elif result.status == "skipped" and not self._done and not args.quiet:
            print(f"{shown(os.fspath(result.job.target))}: skipped, it exists")


@contextlib.contextmanager
def _display(task: Task, args: Namespace) -> Iterator[_Display]:
    """Give what shows the results of a task."""
    is_watched = args.is_watched or (sys.stderr.isatty() and not (task.alone and _is_short(task)))
    if args.quiet or not is_watched:
        yield _Display(task, args)
        return
    from tqdm import tqdm

    delay = 0.5 if task.alone else 0
    with tqdm(
        total=None if task.alone else task.n_bytes or None,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        delay=delay,
    ) as bar:
        yield _Display(task, args, bar)


def _is_short(task: Task) -> bool:
    """Tell whether a task of one file is done before anybody wonders."""
    base = task.options.base
    return task.n_bytes + (size_of(base) if base is not None else 0) < LONG_WORK


def _summary(counts: Counter[str], task: Task, begin: float) -> str:
    parts = [f"{counts['converted']:,} converted"]
    parts += [f"{counts[status]:,} {status}" for status in ("skipped", "failed") if counts[status]]
    left = len(task.jobs) + len(task.failed) - counts.total()
    parts += [f"{left:,} not begun or undone"] if left else []
    parts += [f"{task.n_others:,} other files passed over"] if task.n_others else []
    return f"{', '.join(parts)}, {time.perf_counter() - begin:.1f} s"
