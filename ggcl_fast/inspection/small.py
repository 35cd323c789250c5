"""Many small tensors at once: what `survey` finds in each, and the sizes of their deltas.

A call of numpy's costs as much as going through some 100 KB.  Tensors that are small and stand close together are
therefore read as one block and gone through by the same few calls, whatever their number: a model of many layers costs
what its bytes do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .survey import Doubles, Floats, Values

__all__ = ["LARGEST_SMALL", "PAIR", "Batch", "squared_norms", "survey_batch", "units"]

LARGEST_SMALL: Final = 16 << 10
"""Bytes of a tensor that is gone through with others."""
_WIDEST_GAP: Final = 256  # bytes between two of them: a record's head and name, and padding

PAIR: Final = np.dtype([(name, np.int64) for name in ("n_in", "n_out", "rank", "row_a", "row_b")])
"""The numbers of a `checkpoint.Pair`, to have them of all pairs in one array."""

_Numbers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Small tensors that stand close together, each pair with both."""

    start: int
    """Byte offset of the first."""
    stop: int
    rows: _Numbers
    """Of `Checkpoint.table`, by offset."""
    starts: _Numbers
    """Where each one's values are, in floats from `start` on."""
    sizes: _Numbers
    """How many floats each has."""
    pairs: _Numbers
    """Which pairs are in it."""


def units(
    table: npt.NDArray[np.void], pairs: npt.NDArray[np.void], *, step: int, largest_rank: int
) -> Iterator[Batch | tuple[int, ...]]:
    """Put the tensors of a checkpoint in the order in which they are read.

    Parameters
    ----------
    table
        `Checkpoint.table`.
    pairs
        (n,) `PAIR`.
    step
        Bytes that are read together at most.
    largest_rank
        Pairs of a higher rank do not stand in `Batch.pairs`.

    Yields
    ------
    Batch or tuple of int
        Small tensors; or the rows of what goes on its own: A and B of a pair, or a tensor without a partner.
    """
    alone = np.ones(len(table), np.bool_)
    alone[pairs["row_a"]] = alone[pairs["row_b"]] = False
    (singles,) = np.nonzero(alone)
    first, second = (np.concatenate([pairs[row], singles]) for row in ("row_a", "row_b"))
    measured = np.concatenate([pairs["rank"] <= largest_rank, np.zeros(len(singles), np.bool_)])
    order = np.argsort(first, kind="stable")
    first, second, measured = first[order], second[order], measured[order]
    offsets, sizes = table["offset"].astype(np.int64), table["nbytes"].astype(np.int64)
    starts, stops = offsets[first], (offsets + sizes)[second]
    small = (np.minimum(sizes[first], sizes[second]) > 0) & (np.maximum(sizes[first], sizes[second]) <= LARGEST_SMALL)
    small &= (first == second) | _is_near((offsets + sizes)[first], offsets[second])
    small &= stops - starts <= step
    joined = np.concatenate([[False], small[1:] & small[:-1] & _is_near(stops[:-1], starts[1:])])
    begins = np.flatnonzero(~joined).tolist()
    for begin, end in zip(begins, [*begins[1:], len(first)]):
        if not small[begin]:
            yield tuple(dict.fromkeys((int(first[begin]), int(second[begin]))))
            continue
        while begin < end:
            until = begin + int(np.searchsorted(stops[begin:end], starts[begin] + step, "right"))
            some = slice(begin, until)
            both = np.column_stack([first[some], second[some]]).ravel()
            rows = both[np.concatenate([[True], both[1:] != both[:-1]])]
            yield Batch(
                int(starts[begin]), int(stops[until - 1]), rows, (offsets[rows] - starts[begin]) // 4,
                sizes[rows] // 4, order[some][measured[some]],
            )  # fmt: skip
            begin = until


def _is_near(stops: _Numbers, starts: _Numbers) -> npt.NDArray[np.bool_]:
    gaps = starts - stops
    near: npt.NDArray[np.bool_] = (gaps >= 0) & (gaps <= _WIDEST_GAP) & (gaps % 4 == 0)
    return near


def survey_batch(batch: Batch, floats: Floats) -> tuple[list[Values], Doubles]:
    """Return what `survey.survey` finds in each tensor, and all their values one after the other, in float64."""
    begins = np.cumsum(batch.sizes) - batch.sizes
    wide = floats[np.repeat(batch.starts - begins, batch.sizes) + np.arange(int(batch.sizes.sum()))].astype(np.float64)
    squares = np.add.reduceat(np.square(wide), begins)
    n_nan = n_inf = np.zeros(len(begins), np.int64)
    least = most = wide
    if not np.isfinite(squares).all():
        is_nan, is_inf = np.isnan(wide), np.isinf(wide)
        n_nan, n_inf = (np.add.reduceat(one, begins, dtype=np.int64) for one in (is_nan, is_inf))
        odd = is_nan | is_inf
        squares = np.add.reduceat(np.square(np.where(odd, 0.0, wide)), begins)
        least, most = np.where(odd, np.inf, wide), np.where(odd, -np.inf, wide)
    columns = (
        n_nan, n_inf, np.add.reduceat(wide == 0, begins, dtype=np.int64),
        np.minimum.reduceat(least, begins) + 0.0, np.maximum.reduceat(most, begins) + 0.0, squares,
    )  # fmt: skip
    return list(map(Values, *(column.tolist() for column in columns))), wide


def squared_norms(batch: Batch, wide: Doubles, pairs: npt.NDArray[np.void]) -> Doubles:
    """Return the squared Frobenius norms of ``B @ A.T`` of the pairs in `batch`; not finite where a value is not.

    `wide` is what `survey_batch` gave, and `pairs` what `units` took.
    """
    begins, order, here = np.cumsum(batch.sizes) - batch.sizes, np.argsort(batch.rows), pairs[batch.pairs]
    a, b = (begins[order[np.searchsorted(batch.rows, here[row], sorter=order)]] for row in ("row_a", "row_b"))
    result = np.empty(len(batch.pairs))
    kinds, which = np.unique(here[["n_in", "n_out", "rank"]], return_inverse=True)
    for kind, (n_in, n_out, rank) in enumerate(kinds.tolist()):
        (some,) = np.nonzero(which == kind)
        left = wide[a[some][:, None] + np.arange(n_in * rank)].reshape(-1, n_in, rank)
        right = wide[b[some][:, None] + np.arange(n_out * rank)].reshape(-1, n_out, rank)
        if n_in < rank:
            product = right @ left.swapaxes(1, 2)
            result[some] = np.square(product).sum(axis=(1, 2))
        else:
            result[some] = ((left.swapaxes(1, 2) @ left) * (right.swapaxes(1, 2) @ right)).sum(axis=(1, 2))
    return result
