"""Several outputs that appear together or not at all, and what one of them has to be able to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol

__all__ = ["LONGEST_GATHER", "FileWriter", "Nowhere", "Output", "Outputs", "Progress", "Told", "Writer", "begin"]

LONGEST_GATHER: Final = 1024
"""Pieces that one os.writev takes on Linux and macOS."""


Progress = Callable[[int], object]
"""Called now and then with the bytes done since the last call.  If it has a method ``begin``, that is called once
before, with the bytes that there are to do in all."""


def begin(progress: Progress, total: int) -> None:
    """Tell `progress` how many bytes there are to do, if it wants to know."""
    tell = getattr(progress, "begin", None)
    if tell is not None:
        tell(total)


class Writer(Protocol):
    """Something that takes bytes in order."""

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        """Append `pieces`, at most `LONGEST_GATHER` of them."""


class Nowhere:
    """An output that only counts: what a dry run writes to."""

    nbytes = 0
    """Bytes written so far."""

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        """Count `pieces`."""
        self.nbytes += sum(map(len, pieces))


class Told:
    """An output of which somebody is told how far it is."""

    def __init__(self, progress: Progress, writer: Writer) -> None:
        self._progress, self._writer = progress, writer

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        """Append `pieces`, then tell."""
        self._writer.writev(pieces)
        self._progress(sum(map(len, pieces)))


class FileWriter(Writer, Protocol):
    """The same of a file."""

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""

    def preallocate(self, nbytes: int, /) -> None:
        """Reserve room for `nbytes` in all, where that is supported."""


class Output(Protocol):
    """Something that comes into being by taking a place; `Outputs` calls its methods in this order."""

    path: str
    """Where it goes, as messages name it."""

    def create(self) -> None:
        """Begin it in a temporary place."""

    def file(self, name: str, /) -> contextlib.AbstractContextManager[FileWriter]:
        """Give the writer of its file `name`, or of itself where it is a file."""

    def finish(self) -> None:
        """Make the temporary place what the target shall be, down to the disk if that was asked for."""

    def take(self, *, last: bool) -> None:
        """Let it take its place; with `last` nothing follows that could fail, and it need not be given back."""

    def sync(self) -> None:
        """Make the name reach the disk, if that was asked for."""

    def give_back(self) -> None:
        """Restore what was there before, where the place was taken."""

    def discard(self) -> None:
        """Remove what is still temporary.  Can be called again at any point."""


class Outputs:
    """Outputs that come into being together when the ``with`` block ends well: all of them or none.

    Parameters
    ----------
    outputs
        In the order in which they appear.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs

    def __enter__(self) -> Sequence[Output]:
        try:
            for output in self._outputs:
                output.create()
        except BaseException:
            self._discard()
            raise
        return self._outputs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        for output in self._outputs:
            output.finish()
        try:
            for output in self._outputs:
                output.take(last=len(self._outputs) == 1)
            for output in self._outputs:
                output.sync()
        except BaseException as error:
            for output in reversed(self._outputs):
                try:
                    output.give_back()
                except OSError as another:
                    _tell(error, str(another.strerror))
            raise

    def _discard(self) -> None:
        for output in self._outputs:
            output.discard()


def _tell(error: BaseException, more: str) -> None:
    """Add to what `error` says."""
    if isinstance(error, OSError):
        error.strerror = f"{error.strerror}; {more}"
    elif hasattr(error, "add_note"):
        error.add_note(more)
