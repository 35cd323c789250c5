"""Outputs by their names, wherever they go."""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence

from .files import OutputFile, OutputFolder
from .outputs import Output
from .streams import OutputStream, is_stream
from .urls import StrPath, is_url, located, public_name

__all__ = ["new_outputs"]


def new_outputs(
    names: Sequence[StrPath], *, folder: Collection[str], together: bool, force: bool, fsync: bool, parents: bool
) -> list[Output]:
    """Return the outputs of these names, checked; nothing of them is made yet.

    Parameters
    ----------
    names
        Paths, or one URL.
    folder
        Names of its files, where the only one is a folder.
    together
        Whether several go into one place, where a stream has no room for them.
    force, fsync, parents
        See `files.OutputFile`.

    Raises
    ------
    OSError
        One cannot be made, or is of a kind that cannot be with the others: see `files` and `uploads`.
    """
    places = list(map(located, names))
    urls = list(filter(is_url, places))
    if urls and (len(places) > 1 or folder):
        problem = "Where there are several outputs, they are files on a local disk"
        raise OSError(errno.EOPNOTSUPP, problem, public_name(urls[0]))
    if urls:
        from .uploads import OutputRemote

        return [OutputRemote(urls[0], force=force)]
    streams = list(map(is_stream, places))
    if any(streams) and (folder or (len(places) > 1 and together)):
        what = "a folder" if folder else "two files: --base-out (base_out=) says where the other one goes"
        raise OSError(errno.ESPIPE, f"A stream has no room for {what}", places[-1])
    how = {"force": force, "fsync": fsync, "parents": parents}
    if folder:
        return [OutputFolder(places[0], folder, **how)]
    return [OutputStream(place) if stream else OutputFile(place, **how) for place, stream in zip(places, streams)]
