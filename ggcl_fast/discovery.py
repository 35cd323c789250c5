"""Which files there are to convert, and what each becomes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from .kinds import GGCL
from .sources import StrPath, is_url

if TYPE_CHECKING:
    from .batch import Job

__all__ = ["Found", "find_jobs", "is_folder", "target_name"]

_SUFFIXES: Final = (".ggcl", ".bin", ".ckpt", ".chk", ".checkpoint", ".dat")


class Found(NamedTuple):
    """What a search found."""

    jobs: list[Job]
    sizes: list[int]
    """Bytes of each job's source."""
    n_others: int
    """Files in the folders searched that are no checkpoints."""


def target_name(path: str, suffix: str = ".gguf") -> str:
    """Return the output's name for a checkpoint's path: a customary suffix is replaced, any other is kept."""
    name = os.path.basename(re.split(r"[?#]", path)[0] if is_url(path) else path)
    stem, old = os.path.splitext(name)
    return (stem if old.lower() in _SUFFIXES else name) + suffix


def is_folder(path: StrPath) -> bool:
    """Tell whether `path` is a folder; a URL is one where it ends with a slash."""
    return str(path).endswith("/") if is_url(path) else os.path.isdir(path)


def find_jobs(sources: Sequence[str], target: str, *, recursive: bool, suffix: str = ".gguf") -> Found:
    """Find what is to be converted into the folder `target`.

    Parameters
    ----------
    sources
        Files, which are taken as they are, and folders, of whose files those are taken that begin as a checkpoint
        does, whatever their names are.  URLs too.
    target
        A folder, or a URL of one.
    recursive
        Search folders within folders, and keep them in the target.
    suffix
        Of the outputs' names.

    Raises
    ------
    FileExistsError
        Two sources would become the same target.
    OSError
        A source is not there, or a folder cannot be read.
    """
    from .batch import Job  # which brings along what one file does not need

    found, n_others = Found([], [], 0), 0
    taken: dict[str, str] = {}
    for source in sources:
        folder = is_folder(source)
        files = _files_in(source, target, recursive) if folder else [(source, source, -1)]
        for path, relative, size in files:
            if folder and not _is_checkpoint(path):
                n_others += 1
                continue
            name = os.path.join(os.path.dirname(relative) if folder else "", target_name(relative, suffix))
            job = Job(path, os.path.join(target, name))
            if name in taken:
                problem = f"It would become of both {taken[name]} and {path}"
                raise FileExistsError(errno.EEXIST, problem, str(job.target))
            taken[name] = path
            found.jobs.append(job)
            found.sizes.append(_size(path) if size < 0 else size)
    return found._replace(n_others=n_others)


def _files_in(folder: str, target: str, recursive: bool) -> Iterator[tuple[str, str, int]]:
    """Yield path, path below `folder` and size of each file, folder after folder, in the order of their names."""
    if is_url(folder):
        yield from _objects_in(folder, recursive)
        return

    def fail(error: OSError) -> None:
        raise error

    out = os.path.realpath(target)
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(f for f in folders if recursive and os.path.realpath(os.path.join(here, f)) != out)
        for name in sorted(names):
            path = os.path.join(here, name)
            if os.path.isfile(path):
                yield path, os.path.relpath(path, folder), os.path.getsize(path)


def _objects_in(url: str, recursive: bool) -> Iterator[tuple[str, str, int]]:
    from .remote import list_objects

    for name, size in list_objects(url, recursive=recursive):
        yield url + name, name, size


def _is_checkpoint(path: str) -> bool:
    if is_url(path):
        from .remote import first_bytes

        return first_bytes(path, len(GGCL.signature)) == GGCL.signature
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(len(GGCL.signature)) == GGCL.signature
    except PermissionError:
        return True  # let it fail where failures are told


def _size(path: str) -> int:
    try:
        return 0 if is_url(path) else os.path.getsize(path)
    except OSError:
        return 0  # its job will tell
