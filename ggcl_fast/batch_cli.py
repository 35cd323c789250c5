"""The command over many files: which, on what, and what the terminal shows of it."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final

from . import targets
from .batch import CHUNK, Job, JobResult, convert_many, n_cpus
from .discovery import Found, find_jobs
from .errors import CheckpointError, printable
from .sources import is_url
from .terminal import Stopped, fail, line_of, options_of, warn, words_of

__all__ = ["run_many"]

_LARGE: Final = 16 << 20  # bytes from which on each job is sent by itself


def run_many(args: Namespace) -> int:
    """Run the command with the arguments of `cli`, and return its exit status."""
    gc.enable()  # this process lives longer than one conversion
    if (
        not is_url(args.target)
        and (len(args.sources) > 1 or os.path.exists(args.target))
        and not os.path.isdir(args.target)
    ):
        return fail(f"{printable(args.target, longest=4096)}: Not a folder")
    begin = time.perf_counter()
    if args.dask:  # whose workers are in other folders
        args.sources = list(map(_absolute, args.sources))
        args.base = _absolute(args.base) if args.base else args.base
        args.target = _absolute(args.target)
    if args.base_out is not None:
        return fail("--base-out is for one file; several have theirs beside their adapters")
    suffix = "" if args.to is not None and targets.TARGETS[args.to].folder else ".gguf"
    found = find_jobs(args.sources, args.target, recursive=args.recursive, suffix=suffix)
    if not found.jobs:
        return fail(f"no checkpoints found, {found.n_others:,} other files passed over")
    options = options_of(args) | {"engine": args.engine, "parents": True, "skip_existing": args.skip_existing}
    counts: Counter[str] = Counter()
    try:
        with _executor(args, len(found.jobs)) as (executor, n_workers), _display(args, found) as show:
            jobs, answered = found.jobs, list[JobResult]()
            if args.dask and not args.force:
                # A cluster does a task again whose result it lost: it must not stumble over its own output.
                jobs, answered = _sift(jobs, args)
                options["force"] = True
            for result in itertools.chain(answered, convert_many(
                jobs, executor=executor, workers=n_workers, chunk=_chunk(found, n_workers),
                window=16 * CHUNK * n_workers, **options,
            )):  # fmt: skip
                counts[result.status] += 1
                show(result)
                if args.fail_fast and result.status == "failed":
                    break
    except Stopped:
        print(f"ggcl-fast: {_summary(counts, found, begin)}; --skip-existing goes on from here", file=sys.stderr)
        raise
    if not args.quiet:
        print(f"ggcl-fast: {_summary(counts, found, begin)}", file=sys.stderr)
    return 1 if counts["failed"] else 0


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _sift(jobs: list[Job], args: Namespace) -> tuple[list[Job], list[JobResult]]:
    """Return the jobs whose targets are not there yet, and what becomes of the others."""
    if is_url(args.target):
        from .remote import list_objects

        folder = args.target.rstrip("/") + "/"
        there = {folder + name for name, _ in list_objects(folder, recursive=True)}
        exists = [os.fspath(job.target) in there for job in jobs]
    else:
        exists = [os.path.exists(job.target) for job in jobs]
    answered = []
    for job in itertools.compress(jobs, exists):
        error = FileExistsError(errno.EEXIST, "The target exists; use --force to replace it", os.fspath(job.target))
        answered.append(
            JobResult(job, "skipped", None, None) if args.skip_existing else JobResult(job, "failed", None, error)
        )
    return [job for job, there_already in zip(jobs, exists) if not there_already], answered


def _chunk(found: Found, n_workers: int) -> int:
    large = sum(found.sizes) > _LARGE * len(found.sizes)
    return 1 if large else max(1, min(CHUNK, len(found.jobs) // (4 * n_workers)))


@contextlib.contextmanager
def _executor(args: Namespace, n_jobs: int) -> Iterator[tuple[Executor | None, int]]:
    """Give what runs the jobs, and its number of workers."""
    if args.dask:
        try:
            from distributed import Client
        except ImportError:
            raise OSError(0, "needs Dask: pip install 'ggcl_fast[dask]'", "--dask") from None
        with Client(args.dask, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            yield client.get_executor(pure=False, retries=3), max(1, len(client.scheduler_info()["workers"]))
        return
    n_workers = max(1, min(args.jobs or n_cpus(), n_jobs))
    if n_workers == 1:
        with ThreadPoolExecutor(1) as executor:
            yield executor, 1
    else:
        yield None, n_workers


@contextlib.contextmanager
def _display(args: Namespace, found: Found) -> Iterator[Any]:
    """Give a function that shows a result: lines, and a bar over bytes and files where a person watches."""
    sizes = dict(zip(found.jobs, found.sizes))
    if args.quiet or not sys.stderr.isatty():
        yield lambda result: _show(args, result)
        return
    from tqdm import tqdm

    with tqdm(total=sum(found.sizes), unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        n_done = 0

        def show(result: JobResult) -> None:
            nonlocal n_done
            n_done += 1
            with tqdm.external_write_mode():
                _show(args, result)
            bar.set_postfix_str(f"{n_done}/{len(found.jobs)} files", refresh=False)
            bar.update(sizes[result.job])

        yield show


def _show(args: Namespace, result: JobResult) -> None:
    report, error = result.report, result.error
    if error is not None:
        fail(_error_line(result))
    elif report is not None and not args.quiet:
        warn(report)
    if args.json:
        print(json.dumps(_as_json(result)), flush=True)
    elif report is not None and not args.quiet:
        print(line_of(report))


def _error_line(result: JobResult) -> str:
    assert result.error is not None
    words = words_of(result.error)
    named = isinstance(result.error, CheckpointError) or getattr(result.error, "filename", None)
    return words if named else f"{printable(os.fspath(result.job.source), longest=4096)}: {words}"


def _as_json(result: JobResult) -> dict[str, Any]:
    row: dict[str, Any] = {"status": result.status}
    if result.report is not None:
        return row | result.report._asdict()
    row |= {"source": os.fspath(result.job.source), "target": os.fspath(result.job.target)}
    if result.error is not None:
        row |= {"error": words_of(result.error), "kind": type(result.error).__name__}
    return row


def _summary(counts: Counter[str], found: Found, begin: float) -> str:
    parts = [f"{counts['converted']:,} converted"]
    parts += [f"{counts[status]:,} {status}" for status in ("skipped", "failed") if counts[status]]
    left = len(found.jobs) - counts.total()
    parts += [f"{left:,} not begun or undone"] if left else []
    parts += [f"{found.n_others:,} other files passed over"] if found.n_others else []
    return f"{', '.join(parts)}, {time.perf_counter() - begin:.1f} s"
