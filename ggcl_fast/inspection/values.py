"""The pass over a checkpoint's values: every tensor once, and the sizes of its deltas with it.

Everything streams: a thread reads blocks of at most 1 MiB ahead, and each block is gone through once while it is in
the processor's cache; small tensors go through together, see `small`.  Memory stays at a few of these blocks, whatever
the size of the file.

The size of a delta ``B @ A.T`` never takes the product: ``||B A^T||^2 = sum((A^T A) * (B^T B))``, two matrices of
rank x rank that add up block by block.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..readers.engine import Engine
from ..storage.copying import BLOCK, read_ahead
from ..storage.outputs import Progress, begin
from ..storage.sources import Source
from .small import PAIR, Batch, squared_norms, survey_batch, units
from .survey import LARGEST_BLOCK, Doubles, Floats, Kernels, Values, pick_engine

__all__ = ["LARGEST_RANK", "check_finite", "read_values"]

LARGEST_RANK: Final = 1024
"""Rank up to which the size of a delta is computed: its two Gram matrices take 16 * rank * rank bytes."""

_SAFE: Final = (1e-12, 1e12)  # largest magnitudes whose squares, and sums of those, float32 can tell
_STEP: Final = min(BLOCK, LARGEST_BLOCK)  # bytes of a block, at most


class _Piece(NamedTuple):
    """A stretch of one tensor."""

    row: int
    start: int
    stop: int
    rank: int
    """Of the pair that the tensor belongs to; 0 where there is no Gram matrix to form."""
    last: bool
    """Whether the tensor ends with it."""


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
    values = [Values()] * len(checkpoint.names)
    squared: list[float | None] = [None] * len(pairs)
    numbers = np.array([pair[3:8] for pair in pairs], PAIR)  # in the order of its fields
    of_row = np.zeros(len(values), np.intp)
    of_row[numbers["row_a"]] = of_row[numbers["row_b"]] = np.arange(len(pairs))
    delta = _Delta(kernels)
    with np.errstate(all="ignore"):  # what is not finite is counted
        for piece, block in _blocks(checkpoint.source, _pieces(checkpoint, numbers)):
            floats = _floats(block)
            if isinstance(piece, Batch):
                found, wide = survey_batch(piece, floats)
                for row, some in zip(piece.rows.tolist(), found):
                    values[row] = some
                for index, total in zip(piece.pairs.tolist(), squared_norms(piece, wide, numbers).tolist()):
                    squared[index] = total if math.isfinite(total) else math.nan
            else:
                row, some = piece.row, kernels.survey(floats)
                values[row] = values[row].merged(some)
                if piece.rank:
                    index = int(of_row[row])
                    is_b = row == pairs[index].row_b
                    delta.add(floats.reshape(-1, piece.rank), some, is_b=is_b)
                    if is_b and piece.last:
                        squared[index] = delta.squared()
                        delta = _Delta(kernels)
            if progress is not None:
                progress(floats.nbytes if isinstance(piece, _Piece) else wide.size * 4)
    return values, squared


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


def _pieces(checkpoint: Checkpoint, pairs: npt.NDArray[np.void]) -> Iterator[_Piece | Batch]:
    """Cut every tensor into whole rows of at most 1 MiB, each lora_b right after its lora_a; small ones together."""
    offsets, sizes, widths = (checkpoint.table[field].tolist() for field in ("offset", "nbytes", "ne0"))
    for unit in units(checkpoint.table, pairs, step=_STEP, largest_rank=LARGEST_RANK):
        if isinstance(unit, Batch):
            yield unit
            continue
        for row in unit:
            offset, end = offsets[row], offsets[row] + sizes[row]
            rank = widths[row] if len(unit) == 2 and widths[row] <= LARGEST_RANK else 0
            step = _STEP // (4 * rank) * 4 * rank if rank else _STEP
            for start in range(offset, end, step):
                yield _Piece(row, start, min(start + step, end), rank, start + step >= end)


def _blocks(source: Source, pieces: Iterator[_Piece | Batch]) -> Iterator[tuple[_Piece | Batch, memoryview]]:
    """Yield each piece with its bytes, which are there until the next one is asked for."""
    if source.memory is not None:
        for piece in pieces:
            yield piece, source.memory[piece.start : piece.stop]
        return
    for piece, buffer, release in read_ahead(source, pieces):
        yield piece, buffer[: piece.stop - piece.start]
        release()


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
