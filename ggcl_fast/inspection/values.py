"""The pass over a checkpoint's values: every tensor once, and the sizes of its deltas with it.

Everything streams, by as many threads as there are processors: each reads a block of at most 1 MiB and goes through it
while it is in its processor's cache, which a block that another thread has read is not.  Small tensors go through
together, see `small`.  Memory stays at a block for each thread, whatever the size of the file.

The size of a delta ``B @ A.T`` never takes the product: ``||B A^T||^2 = sum((A^T A) * (B^T B))``, two matrices of
rank x rank that add up block by block.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..readers.engine import Engine
from ..storage.copying import BLOCK, in_order
from ..storage.outputs import Progress, begin
from ..storage.sources import Source
from .small import LARGEST_SMALL, PAIR, Batch, squared_norms, survey_batch, units
from .survey import LARGEST_BLOCK, Doubles, Floats, Kernels, Values, pick_engine

__all__ = ["LARGEST_RANK", "check_finite", "read_values"]

LARGEST_RANK: Final = 1024
"""Rank up to which the size of a delta is computed: its two Gram matrices take 16 * rank * rank bytes."""

_SAFE: Final = (1e-12, 1e12)  # largest magnitudes whose squares, and sums of those, float32 can tell
_STEP: Final = min(BLOCK, LARGEST_BLOCK)  # bytes of a block, at most
_TASK: Final = 8 << 20  # bytes that a thread is given at least, while there are as many


class _Piece(NamedTuple):
    """A stretch of one tensor."""

    row: int
    start: int
    stop: int
    pair: int | None
    """Which of the pairs it belongs to; None where there is no Gram matrix to form."""
    last: bool
    """Whether the tensor ends with it, or the second tensor of the pair."""


class _Found(NamedTuple):
    """What was found in some pieces."""

    values: list[tuple[int, Values]]
    """By row of the table, of all of a tensor or of a stretch."""
    squared: list[tuple[int, float]]
    """By pair."""
    nbytes: int


def read_values(
    checkpoint: Checkpoint, pairs: Sequence[Pair], *, engine: Engine = "auto", progress: Progress | None = None
) -> tuple[list[Values], list[float | None]]:
    """Read every tensor once.

    Parameters
    ----------
    checkpoint
        What to read.
    pairs
        Those of its pairs whose deltas are to be measured.
    engine
        See `survey.pick_engine`.
    progress
        See `summarise.summarise`.

    Returns
    -------
    tuple
        What the values are, by row of `Checkpoint.table`; and for each of `pairs` the squared Frobenius norm of
        ``B @ A.T``, None where its rank is above `LARGEST_RANK`.
    """
    n_bytes = int(checkpoint.table["nbytes"].sum())
    kernels = pick_engine(engine, n_bytes)
    if progress is not None:
        begin(progress, n_bytes)
    nothing = Values()
    values = [nothing] * len(checkpoint.names)
    squared: list[float | None] = [None] * len(pairs)
    numbers = np.array([pair[3:8] for pair in pairs], PAIR)  # in the order of its fields
    work = functools.partial(_look, checkpoint.source, kernels, numbers)
    tasks = _tasks(_pieces(checkpoint, numbers))
    # Small tensors are Python's work more than numpy's, of which several threads do no more than one; and what is far
    # away is read forward, as one stream.
    alone = checkpoint.source.far or n_bytes <= max(_TASK, LARGEST_SMALL * len(values))
    for found in map(work, tasks) if alone else in_order(work, tasks):
        for row, some in found.values:
            values[row] = some if values[row] is nothing else values[row].merged(some)
        for index, total in found.squared:
            squared[index] = total
        if progress is not None:
            progress(found.nbytes)
    return values, squared


class _Room(threading.local):
    """Room for a block, of each thread."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(_STEP))


_room: Final = _Room()


def _look(source: Source, kernels: Kernels, pairs: npt.NDArray[np.void], pieces: Sequence[_Piece | Batch]) -> _Found:
    """Go through some pieces, each pair with both of its tensors."""
    found = _Found([], [], 0)
    nbytes = 0
    delta = _Delta(kernels)
    with np.errstate(all="ignore"):  # what is not finite is counted
        for piece in pieces:
            if (memory := source.memory) is not None:
                block = memory[piece.start : piece.stop]
            else:
                source.read_into(piece.start, block := _room.block[: piece.stop - piece.start])
            floats = _floats(block)
            if isinstance(piece, Batch):
                some, wide = survey_batch(piece, floats)
                nbytes += wide.size * 4
                found.values.extend(zip(piece.rows.tolist(), some))
                totals = squared_norms(piece, wide, pairs)
                totals[~np.isfinite(totals)] = math.nan
                found.squared.extend(zip(piece.pairs.tolist(), totals.tolist()))
                continue
            nbytes += floats.nbytes
            one = kernels.survey(floats)
            found.values.append((piece.row, one))
            if piece.pair is not None:
                _, _, rank, _, row_b = pairs[piece.pair].item()
                delta.add(floats.reshape(-1, rank), one, is_b=piece.row == row_b)
                if piece.last:
                    found.squared.append((piece.pair, delta.squared()))
                    delta = _Delta(kernels)
    return found._replace(nbytes=nbytes)


def check_finite(checkpoint: Checkpoint, *, engine: Engine = "auto") -> None:
    """Read all tensors and hold that every value is finite.

    Raises
    ------
    CheckpointError
        Some are NaN or infinite: the message names the tensors concerned, and `found` is a dict from the name of each
        to the number of such values.
    """
    values, _ = read_values(checkpoint, (), engine=engine)
    bad = {name: one.n_nan + one.n_inf for name, one in zip(checkpoint.names, values) if one.n_nan or one.n_inf}
    if bad:
        tensors = ", ".join(f"{name} ({n:,})" for name, n in bad.items())
        raise CheckpointError(
            f"{len(bad)} of {len(values)} tensors have values that are NaN or infinite: {tensors}",
            source=checkpoint.source.name, field="data", found=bad,
        )  # fmt: skip


def _tasks(pieces: Iterator[_Piece | Batch]) -> Iterator[list[_Piece | Batch]]:
    """Put pieces together for a thread, those of a pair always."""
    task: list[_Piece | Batch] = []
    nbytes = 0
    for piece in pieces:
        task.append(piece)
        nbytes += piece.stop - piece.start
        if nbytes >= _TASK and (isinstance(piece, Batch) or piece.pair is None or piece.last):
            yield task
            task, nbytes = [], 0
    if task:
        yield task


def _pieces(checkpoint: Checkpoint, pairs: npt.NDArray[np.void]) -> Iterator[_Piece | Batch]:
    """Cut every tensor into whole rows of at most 1 MiB, each lora_b right after its lora_a; small ones together."""
    offsets, sizes, widths = (checkpoint.table[field].tolist() for field in ("offset", "nbytes", "ne0"))
    of_row = dict(zip(pairs["row_a"].tolist(), range(len(pairs))))
    for unit in units(checkpoint.table, pairs, step=_STEP, largest_rank=LARGEST_RANK):
        if isinstance(unit, Batch):
            yield unit
            continue
        rank = widths[unit[0]]
        pair = of_row[unit[0]] if len(unit) == 2 and rank <= LARGEST_RANK else None
        step = _STEP // (4 * rank) * 4 * rank if pair is not None else _STEP
        for row in unit:
            offset, end = offsets[row], offsets[row] + sizes[row]
            for start in range(offset, end, step):
                yield _Piece(row, start, min(start + step, end), pair, start + step >= end and row == unit[-1])


def _floats(block: memoryview) -> Floats:
    floats = np.frombuffer(block, "<f4")
    if sys.byteorder == "big" or not floats.flags.aligned:
        floats = floats.astype(np.float32)
    floats.flags.writeable = False  # one signature for every kind of buffer
    return floats


class _Delta:
    """The squared norm of one pair's ``B @ A.T``, from all rows of A and then all of B, block by block.

    Two Gram matrices of rank x rank, whose work pays where A has as many rows at least; a shorter A is kept, and
    multiplied by the rows of B as they come.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._grams: list[Doubles | float] = [0.0, 0.0]
        self._rows: list[Doubles] = []
        self._n_rows = 0
        self._a: Doubles | None = None
        self._squares = 0.0

    def add(self, rows: Floats, values: Values, *, is_b: bool) -> None:
        """Take some rows, of which `values` says what is in them."""
        rank = rows.shape[1]
        if not is_b and self._n_rows + len(rows) < rank:
            self._n_rows += len(rows)
            self._rows.append(rows.astype(np.float64))
            return
        if not is_b:  # it is as long as its rank after all
            for some in self._rows:
                self._grams[0] = self._grams[0] + some.T @ some
            self._rows, self._n_rows = [], rank
        if is_b and self._rows:
            self._a = np.concatenate(self._rows) if self._a is None else self._a
            product = rows.astype(np.float64) @ self._a.T
            self._squares += float(np.vdot(product, product))
        else:
            self._grams[is_b] = self._grams[is_b] + _gram(rows, values, self._kernels)

    def squared(self) -> float:
        """Return the sum of squares; NaN where a value is not finite, and never below 0, as it can be by rounding."""
        a, b = self._grams
        total = self._squares if self._rows else float(np.add.reduce(np.multiply(a, b), axis=None))
        if not math.isfinite(total):
            return math.nan
        return max(total, 0.0)


def _gram(rows: Floats, some: Values, kernels: Kernels) -> Doubles:
    """Return ``rows.T @ rows``; NaN where `rows` has values that are not finite."""
    rank = rows.shape[1]
    if some.n_nan or some.n_inf:
        return np.full((rank, rank), np.nan)
    if rank == 1:
        return np.array([[some.squares]])
    if _SAFE[0] < max(-some.lowest, some.highest) < _SAFE[1]:
        return kernels.gram(rows)
    wide = rows.astype(np.float64)
    return wide.T @ wide
