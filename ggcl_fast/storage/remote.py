"""Sources in object stores, and wherever else fsspec reads by ranges.

The records of a checkpoint lie between its tensors, so that reading one after the other would cost a round trip each;
`SourceRemote.prefetch` fetches the places where they are expected together.  Payload is streamed, a block ahead of the
reader.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from ..errors import SourceChangedError
from .identity import identities
from .sources import SMALL, closed
from .stores import as_os_errors, filesystem
from .urls import public_name

__all__ = ["SourceRemote"]

_BLOCK: Final = 8 << 20  # bytes of a request for payload; three of them are held
_WINDOW: Final = 1 << 16  # bytes of a request for a record that was not where it was expected
_HEAD: Final = 512  # bytes that the fixed part, dims and name of a sound record fit in
_GAP: Final = 1 << 16  # bytes that are rather read along than skipped
_LONGEST: Final = 1 << 20  # bytes of one prefetched range
_LONGEST_WHOLE: Final = 1 << 30  # bytes that are read at once from a server without byte ranges
_MOST: Final = 32 << 20  # bytes of all of them
_FACTS: Final = (
    "size", "ETag", "LastModified", "Last-Modified", "Content-MD5", "Digest", "VersionId", "md5Hash", "generation",
    "mtime", "created", "modified", "updated", "last_modified",
)  # fmt: skip
"""What stores tell of an object that is another where the object is."""


class SourceRemote:
    """An object that fsspec can read by ranges.  Raises `OSError` where there is none or its size is not told.

    Ranges that were fetched and the stream of payload are shared by all threads, one at a time.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = public_name(url)
        self.identity = frozenset(identities(url))
        self.closed = False
        self._store, self._path = filesystem(url)
        self._lock = threading.RLock()
        self._stream: Any = None
        self._starts: list[int] = []
        self._fetched: list[bytes] = []
        with as_os_errors(url):
            self._info = self._store.info(self._path)
        if self._info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.name)
        if self._info.get("size") is None:
            raise OSError(
                errno.ESPIPE, "The server does not tell its size, so that it cannot be read by ranges", self.name
            )
        self.size = self.file_size = int(self._info["size"])
        self.far = self.size > SMALL and self._has_ranges()
        self.memory: memoryview | None = None if self.far else memoryview(self._range(0, self.size))

    def _has_ranges(self) -> bool:
        """Tell whether pieces of the object can be had: a web server says so, or it has to be asked for all of it."""
        protocols = self._store.protocol if isinstance(self._store.protocol, tuple) else (self._store.protocol,)
        if "http" not in protocols or self._info.get("partial"):
            return True
        if self.size > _LONGEST_WHOLE:
            problem = f"The server tells of no byte ranges, and {self.size:,} bytes are not read at once: download it"
            raise OSError(errno.ESPIPE, problem, self.name)
        return False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def _range(self, start: int, stop: int) -> bytes:
        if self.closed:
            raise closed(self.name)
        with as_os_errors(self._url):
            data: bytes = self._store.cat_file(self._path, start=start, end=stop) if stop > start else b""
        if len(data) == self.size != stop - start:  # a server without byte ranges gives all of it, once
            self.memory = memoryview(data)
            return data[start:stop]
        self._check_length(start, stop, data)
        return data

    def _check_length(self, start: int, stop: int, data: bytes) -> None:
        if len(data) != stop - start:
            raise self._changed(f"bytes {start} to {stop} were asked for, and {len(data)} came")

    def _changed(self, how: str) -> SourceChangedError:
        return SourceChangedError(f"the object changed while it was read: {how}", source=self.name)

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Fetch what is at `offsets`, ascending, in as few requests as reading some gaps along allows, together."""
        if self.memory is not None:
            return
        ranges = self._ranges(offsets)
        with as_os_errors(self._url):
            starts, stops = [list(ends) for ends in zip(*ranges)] or ([], [])
            blocks = self._store.cat_ranges([self._path] * len(starts), starts, stops, on_error="raise")
        for start, stop, data in zip(starts, stops, blocks):
            self._check_length(start, stop, data)
        with self._lock:
            self._starts, self._fetched = starts, [bytes(data) for data in blocks]

    def _ranges(self, offsets: Sequence[int]) -> list[tuple[int, int]]:
        """Return start and stop of what to fetch for `offsets`, `_MOST` bytes at most."""
        ranges: list[tuple[int, int]] = []
        total = 0
        for offset in offsets:
            start, stop = min(offset, self.size) & ~3, min(offset + _HEAD, self.size)
            if start >= stop:
                break
            if ranges and start <= ranges[-1][1] + _GAP and stop - ranges[-1][0] <= _LONGEST:
                start, before = ranges.pop()
                total -= before - start
                stop = max(stop, before)
            total += stop - start
            if total > _MOST:
                break
            ranges.append((start, stop))
        return ranges

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return a fetched range around `offset`, or fetch one."""
        memory = self.memory
        if memory is not None:
            return 0, memory
        with self._lock:
            needed = min(offset + _HEAD, self.size)
            i = bisect.bisect_right(self._starts, offset) - 1
            if i < 0 or self._starts[i] + len(self._fetched[i]) < needed:
                start = offset & ~3
                data = self._range(start, min(start + _WINDOW, self.size))
                if sum(map(len, self._fetched)) > _MOST:
                    self._starts, self._fetched = [], []
                i = bisect.bisect_left(self._starts, start)
                self._starts.insert(i, start)
                self._fetched.insert(i, data)
            return self._starts[i], memoryview(self._fetched[i])

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on: little things from a window, payload from a stream."""
        memory = self.memory
        if memory is not None:
            buffer[:] = memory[offset : offset + len(buffer)]
        elif len(buffer) <= _HEAD:
            start, window = self.window(offset)
            buffer[:] = window[offset - start : offset - start + len(buffer)]
        else:
            with self._lock, as_os_errors(self._url):
                self._read_stream(offset, buffer)

    def _read_stream(self, offset: int, buffer: memoryview) -> None:
        if self.closed:
            raise closed(self.name)
        if self._stream is None:
            self._stream = self._store.open(
                self._path, "rb", block_size=_BLOCK, cache_type="background", cache_options={"maxblocks": 3}
            )
        self._stream.seek(offset)
        got = 0
        while got < len(buffer):
            data = self._stream.read(len(buffer) - got)
            if not data:
                raise self._changed(f"it had {self.size} bytes, and now ends at {offset + got}")
            buffer[got : got + len(data)] = data
            got += len(data)

    def map(self) -> memoryview:
        """Return all bytes, which are fetched for it and kept."""
        with self._lock:
            if self.memory is None:
                self.memory = memoryview(self._range(0, self.size))
            return self.memory

    def check_unchanged(self) -> None:
        """Compare what the store tells of the object with what it told at the start."""
        if self.closed:
            raise closed(self.name)
        with as_os_errors(self._url):
            self._store.invalidate_cache(self._path)
            now = self._store.info(self._path)
        for fact in _FACTS:
            if now.get(fact) != self._info.get(fact):
                raise self._changed(f"its {fact} is another")

    def close(self) -> None:
        """Let go of what was fetched."""
        with self._lock:
            self.closed = True
            if self._stream is not None:
                self._stream.close()
            self.memory, self._starts, self._fetched = None, [], []
