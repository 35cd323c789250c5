"""Several sources as one, behind each other: a model that is split into files."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Sequence

from .sources import WINDOW, Source, read_at

__all__ = ["Joined"]


class Joined:
    """Sources as one; see `sources.Source`.

    Parameters
    ----------
    sources
        In their order; they are closed with this one.
    """

    memory: memoryview | None = None

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._map: memoryview | None = None
        self._stops = list(itertools.accumulate(source.size for source in sources))
        self.starts = [stop - source.size for source, stop in zip(sources, self._stops)]
        """Byte offset at which each begins."""
        self.name = sources[0].name
        self.identity = frozenset[tuple[object, ...]]().union(*(source.identity for source in sources))
        self.size = self.file_size = self._stops[-1]
        self.far = any(source.far for source in sources)

    @property
    def closed(self) -> bool:
        """Whether they were closed."""
        return self._sources[0].closed

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes from `offset` on."""
        return offset, read_at(self, offset, WINDOW)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, from as many of them as it takes."""
        done = 0
        while done < len(buffer):
            index = bisect.bisect_right(self._stops, offset + done)
            source, start = self._sources[index], self.starts[index]
            n = min(len(buffer) - done, self._stops[index] - offset - done)
            source.read_into(offset + done - start, buffer[done : done + n])
            done += n

    def map(self) -> memoryview:
        """Return all bytes, copied into memory."""
        if self._map is None:
            self._map = read_at(self, 0, self.size).toreadonly()
        return self._map

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Have each fetch its own."""
        for source, start, stop in zip(self._sources, self.starts, self._stops):
            if own := [offset - start for offset in offsets if start <= offset < stop]:
                source.prefetch(own)

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if one of them has changed."""
        for source in self._sources:
            source.check_unchanged()

    def close(self) -> None:
        """Let go of them."""
        with contextlib.ExitStack() as stack:
            for source in self._sources:
                stack.callback(source.close)
        self._map = None
