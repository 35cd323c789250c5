"""Which files there are to convert, and what each becomes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from ..formats.signatures import GGCL, GGLA, GGUF, MADE_BY
from ..storage.opening import open_source
from ..storage.urls import below, is_folder, is_url, located, public_name
from ..targets import names
from ..targets.options import Options
from .jobs import Job, JobResult, size_of

__all__ = ["Search", "find_jobs"]

_UNKNOWN: Final = -1  # bytes


class Search(NamedTuple):
    """What there is to do."""

    jobs: list[Job]
    sizes: list[int]
    """Bytes of each job's source."""
    n_others: int
    """Files in the folders searched that are neither checkpoints nor adapters, or adapters made here."""
    failed: list[JobResult]
    """What cannot be done: folders and files that could not be read, names that lead out of the target."""


class _Find(NamedTuple):
    """A file, or what is wrong with it."""

    path: str
    below: str
    """Its name below the folder that was searched, with slashes; empty for a file that was named itself."""
    nbytes: int = _UNKNOWN
    error: OSError | None = None


def find_jobs(sources: Sequence[str], target: str, options: Options, *, recursive: bool) -> Search:
    """Find what is to be converted into the folder `target`.

    Parameters
    ----------
    sources
        Files, which are taken as they are, and folders, of whose files those are taken that hold a checkpoint or an
        adapter, whatever their names are.  URLs too.
    target
        A folder, or a URL of one.
    options
        What decides the outputs' names.
    recursive
        Search folders within folders, and keep them in the target.

    Raises
    ------
    FileExistsError
        Two sources would become the same target.
    """
    search, n_others = Search([], [], 0, []), 0
    taken: dict[str, str] = {}
    for source in sources:
        for find in _files_in(source, target, recursive) if is_folder(source) else [_Find(source, "")]:
            job = Job(find.path, target)
            try:
                if find.error is not None:
                    raise find.error
                if find.below and not _is_input(find.path):
                    n_others += 1
                    continue
                job = Job(find.path, below(target, _name(find, options)))
            except OSError as error:
                search.failed.append(JobResult(job, "failed", None, error.with_traceback(None)))
                continue
            name = os.fspath(job.target)
            if name in taken:
                problem = f"It would become of both {public_name(taken[name])} and {public_name(find.path)}"
                raise FileExistsError(errno.EEXIST, problem, public_name(name))
            taken[name] = find.path
            search.jobs.append(job)
            search.sizes.append(size_of(find.path) if find.nbytes == _UNKNOWN else find.nbytes)
    return search._replace(n_others=n_others)


def _name(find: _Find, options: Options) -> str:
    """Return the name of a find's target below the folder of targets."""
    folder = find.below.rpartition("/")[0]
    name = names.target_name(find.below or find.path, options)
    return f"{folder}/{name}" if folder or find.below.startswith("/") else name


def _files_in(folder: str, target: str, recursive: bool) -> Iterator[_Find]:
    """Yield each file, folder after folder, in the order of their names, and each folder that cannot be read."""
    place = located(folder)
    if is_url(place):
        from ..storage.stores import list_objects

        for name, size in list_objects(place, recursive=recursive):
            yield _Find(place + name, name, size)
        return
    out = os.path.realpath(located(target))
    waiting = [(place, "")]
    while waiting:
        here, prefix = waiting.pop()
        folders = []
        try:
            for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
                if entry.is_dir():
                    if recursive and not entry.is_symlink() and os.path.realpath(entry.path) != out:
                        folders.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_file():
                    yield _Find(entry.path, prefix + entry.name)
        except OSError as error:
            yield _Find(here, prefix or here, error=error)
        waiting += reversed(folders)


def _is_input(path: str) -> bool:
    """Tell whether a file is something to convert; `OSError` where it cannot be read."""
    n = len(GGUF.signature)
    if is_url(path):
        from ..storage.stores import first_bytes

        start = first_bytes(path, n)
    else:
        with open(path, "rb", buffering=0) as file:
            start = file.read(n)
    return start in (GGCL.signature, GGLA.signature) or (start == GGUF.signature and _is_gguf_input(path))


def _is_gguf_input(path: str) -> bool:
    """Tell whether a GGUF file is a checkpoint or an adapter, and none that this project wrote as its last word."""
    from ..formats import finetune_keys as finetune
    from ..formats.gguf_header import first_keys

    with contextlib.closing(open_source(path)) as source:
        keys = first_keys(source)
    is_input = keys.get(finetune.TRAINING_TYPE.name) == finetune.TRAINED or keys.get(finetune.KIND) == finetune.ADAPTER
    return is_input and MADE_BY not in keys
