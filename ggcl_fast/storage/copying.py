"""Moving tensor bytes from a source to an output, as fast as the system copies.

The tensors are cut into blocks: stretches of the source of at most 1 MiB, which still fits in the processor's cache
when it is written.  Each block is read in one go, the records between its tensors included, and its tensors leave it
as slices, handed to the system together.  For a source on disk one thread reads ahead while the caller's writes: the
kernel's two copies, which are all that this costs, overlap.
"""

from __future__ import annotations

import functools
import operator
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .outputs import LONGEST_GATHER, Writer
from .sources import Source
from .system import n_cpus

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["BLOCK", "Cuts", "Stretch", "copy_tensors", "in_order", "read_ahead"]

BLOCK: Final = 1 << 20
"""Bytes of a block; more falls out of cache, less costs calls."""
_AHEAD: Final = 4  # blocks in flight
_WAITING: Final = 2  # pieces of work that are done, or not begun, besides one for each thread
_WIDEST_GAP: Final = 1 << 16  # bytes between two tensors that are read along rather than skipped
_PIECE: Final = 32  # bytes of a tensor that are worth a place in a block that it does not fit into

_Numbers = npt.NDArray[np.int64]


class Stretch(Protocol):
    """Bytes of a source that are read in one go, at most `BLOCK` of them."""

    @property
    def start(self) -> int:
        """Offset of the first."""

    @property
    def stop(self) -> int:
        """Offset behind the last."""


_S = TypeVar("_S", bound=Stretch)
_T = TypeVar("_T")
_R = TypeVar("_R")


class _Block(NamedTuple):
    start: int
    stop: int
    cuts: list[tuple[int, int, int]]  # of each piece: start and stop within the block, padding after it

    def pieces(self, view: memoryview) -> list[bytes | memoryview]:
        """Slice the block's bytes."""
        pieces: list[bytes | memoryview] = []
        for start, stop, padding in self.cuts:
            pieces.append(view[start:stop])
            if padding:
                pieces.append(bytes(padding))
        return pieces


class Cuts:
    """Where tensors are in a source, and what stands between them in an output.

    Parameters
    ----------
    offsets, sizes
        (n,) int64: where each tensor is in the source and how long, in bytes, in the order of the output.
    alignment
        Bytes, few; each tensor is padded with zeros to a multiple of them.
    """

    def __init__(self, offsets: _Numbers, sizes: _Numbers, alignment: int) -> None:
        self._offsets, self._sizes, self._alignment = offsets, sizes, alignment

    @functools.cached_property
    def of_memory(self) -> Callable[[bytes, memoryview], tuple[bytes | memoryview, ...]]:
        """What gives a head, then slices of memory and the zeros between them: in two calls of C, once it is made."""
        padding = -self._sizes % self._alignment
        # One slice more than is wanted: of a single one itemgetter would not make a tuple.
        slices = map(slice, [0, *self._offsets.tolist()], [0, *(self._offsets + self._sizes).tolist()])
        cut = operator.itemgetter(*slices)
        zeros = [bytes(n) for n in range(1, self._alignment)]
        order = np.stack([np.arange(len(padding)) + len(zeros) + 2, padding], axis=1).ravel()
        arrange = operator.itemgetter(0, *order[order != 0].tolist())
        return lambda head, memory: arrange((head, *zeros, *cut(memory)))

    def blocks(self) -> Iterator[_Block]:
        """Cut the tensors into blocks, in order."""
        start = stop = 0
        cuts: list[tuple[int, int, int]] = []
        for offset, left in zip(self._offsets.tolist(), self._sizes.tolist()):
            padding = -left % self._alignment
            while left:
                room = start + BLOCK - offset
                fits = stop <= offset <= stop + _WIDEST_GAP and room >= min(left, _PIECE)
                if cuts and not (fits and 2 * len(cuts) < LONGEST_GATHER - 2):
                    yield _Block(start, stop, cuts)
                    cuts = []
                if not cuts:
                    start, room = offset, BLOCK
                take = min(left, room)
                left -= take
                stop = offset + take
                cuts.append((offset - start, stop - start, 0 if left else padding))
                offset = stop
        if cuts:
            yield _Block(start, stop, cuts)


def copy_tensors(source: Source, cuts: Cuts, output: Writer, *, head: bytes = b"") -> None:
    """Append `head`, then the tensors that `cuts` tells, to `output`.

    The size of `source` is trusted only as far as `Source.read_into` finds the bytes.
    """
    if (memory := source.memory) is not None:  # nothing is gained by blocks here
        pieces = cuts.of_memory(head, memory)
        for first in range(0, len(pieces), LONGEST_GATHER):
            output.writev(pieces[first : first + LONGEST_GATHER])
        return
    output.writev([head])
    for block, view, release in read_ahead(source, cuts.blocks()):
        output.writev(block.pieces(view))
        release()


def in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Do `work` on each of `items` by as many threads as there are processors; yield the results in order.

    A few are in work at a time.  What goes wrong is raised when its turn comes, and all threads have ended when the
    iterator has.
    """
    from concurrent.futures import ThreadPoolExecutor  # a copy does without

    n_threads = n_cpus()
    pool = ThreadPoolExecutor(n_threads, "ggcl_fast-worker")
    begun: deque[Future[_R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > n_threads + _WAITING:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(source: Source, blocks: Iterator[_S]) -> Iterator[tuple[_S, memoryview, Callable[[], object]]]:
    """Yield each block with its bytes, read by a thread of its own, and a function that gives the bytes back.

    The bytes are at the start of a memoryview of `BLOCK` bytes, of which a few take turns, so memory stays small.
    What goes wrong in the thread is raised here; the thread has ended when the iterator has.
    """
    free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
    full: queue.SimpleQueue[tuple[_S, memoryview] | BaseException | None] = queue.SimpleQueue()
    for _ in range(_AHEAD):
        free.put(memoryview(bytearray(BLOCK)))

    def read() -> None:
        try:
            for block in blocks:
                buffer = free.get()
                if buffer is None:
                    return
                source.read_into(block.start, buffer[: block.stop - block.start])
                full.put((block, buffer))
            full.put(None)
        except BaseException as error:  # raised again in the thread that waits
            full.put(error)

    reader = threading.Thread(target=read, name="ggcl_fast-reader", daemon=True)
    reader.start()
    try:
        while (item := full.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            block, buffer = item
            yield block, buffer, lambda buffer=buffer: free.put(buffer)  # type: ignore[misc]
    finally:
        free.put(None)
        reader.join()
