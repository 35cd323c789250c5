"""A file that ends in zeros: what a download that was never finished, or a disk without power, leaves."""

from __future__ import annotations

import dataclasses
from typing import Final

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.schema import OUTPUT, TOKEN_EMBD
from ..storage.sources import Source, read_at

__all__ = ["with_tail_noted", "with_tail_told"]

_SUSPECT: Final = 512  # bytes: padding and counts of nothing have fewer
_BLOCK: Final = 1 << 20  # bytes looked at together
_WHY: Final = "as a download leaves them that was never finished"
_FEW: Final = 64  # values that may be zero by themselves
_FILLED: Final = {"adam": "optimizer.adam.second_moments", "lbfgs": "optimizer.lbfgs.current_gradients"}
"""The last tensor of a GGUF checkpoint that is full after the first step."""


def with_tail_noted(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """Return `checkpoint`, which was read from `source`, with a warning where the file ends in zeros for no reason.

    Far sources are not asked.
    """
    if _is_far_or_ends(source) or _can_end_in_zeros(checkpoint):
        return checkpoint
    n = _zeros(source, 0, source.size)
    warning = f"the last {n:,} bytes are zeros, {_WHY}"
    return dataclasses.replace(checkpoint, zero_tail=n, warnings=(*checkpoint.warnings, warning))


def with_tail_told(error: CheckpointError, source: Source) -> CheckpointError:
    """Return `error`, which `source` gave, with the cause where that is the zeros that the file ends with."""
    at = error.offset
    if at is None or _is_far_or_ends(source) or not _is_zero(source, at, min(_BLOCK, source.size - at)):
        return error
    return error.with_hint(f"{error.hint}; zeros follow, {_WHY}" if error.hint else f"zeros follow, {_WHY}")


def _is_far_or_ends(source: Source) -> bool:
    """Tell whether the end is not to be asked for, or other than zeros."""
    return source.far or source.size < _SUSPECT or not _is_zero(source, source.size - _SUSPECT, _SUSPECT)


def _can_end_in_zeros(checkpoint: Checkpoint) -> bool:
    """Tell whether zeros at the end may be what was written.

    Before the first step the moments are zero, and B of an adapter, but A is not.  What a GGUF checkpoint ends with,
    the memory of L-BFGS or Adam's past losses, is zero until it has been filled, but what is before it is not.
    """
    optimizer = checkpoint.optimizer
    offsets = checkpoint.table["offset"]
    last = max(checkpoint.pairs, key=lambda pair: max(map(int, offsets[[pair.row_a, pair.row_b]])))
    if optimizer is None:
        return _can_end_so(checkpoint, last)
    if not _n_values(checkpoint, last.row_a) and not _n_values(checkpoint, last.row_b):
        return False
    if checkpoint.format == "gguf" and not optimizer.just_initialized:
        return _n_values(checkpoint, checkpoint.names.index(_FILLED[optimizer.name]), _SUSPECT // 4) > 0
    return optimizer.just_initialized


def _can_end_so(checkpoint: Checkpoint, pair: Pair) -> bool:
    """Tell whether an adapter can end as `pair`, its last, does: in nothing of B, or of some tokens."""
    offsets = checkpoint.table["offset"]
    other, row = sorted((pair.row_a, pair.row_b), key=lambda row: int(offsets[row]))
    size, row_size = int(checkpoint.table["nbytes"][row]) // 4, int(checkpoint.table["ne0"][row])
    left = _n_values(checkpoint, row)
    if left == 0:
        return _n_values(checkpoint, other, _FEW) > 0
    return size - left < _FEW or (pair.weight in (TOKEN_EMBD, OUTPUT) and left % row_size == 0)


def _n_values(checkpoint: Checkpoint, row: int, last: int = 0) -> int:
    """Return how many values of a tensor are left without the zeros that it ends with, of the `last` alone if given."""
    place = checkpoint.table[row]
    offset, nbytes = int(place["offset"]), int(place["nbytes"])
    n = min(nbytes, 4 * last) if last else nbytes
    return n // 4 - _zeros(checkpoint.source, offset + nbytes - n, offset + nbytes) // 4


def _is_zero(source: Source, offset: int, nbytes: int) -> bool:
    """Tell whether there is nothing but zeros."""
    return _zeros(source, offset, offset + nbytes) >= nbytes


def _zeros(source: Source, start: int, stop: int) -> int:
    """Return how many of the bytes from `start` to `stop` are zeros, counted from their end to the first other."""
    end = stop
    while end > start:
        first = max(start, end - _BLOCK)
        block = bytes(read_at(source, first, end - first)).rstrip(b"\0")
        end = first + len(block)
        if block:
            break
    return stop - end
