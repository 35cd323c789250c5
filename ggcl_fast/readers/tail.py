"""A file that ends in zeros: what a download that was never finished, or a disk without power, leaves."""

from __future__ import annotations

import dataclasses
from typing import Final

from ..checkpoint import Checkpoint, Lbfgs
from ..errors import CheckpointError
from ..storage.sources import Source, read_at

__all__ = ["with_tail_noted", "with_tail_told"]

_SUSPECT: Final = 512  # bytes: padding and counts of nothing have fewer
_BLOCK: Final = 1 << 20  # bytes looked at together
_WHY: Final = "as a download leaves them that was never finished"
_GRADIENTS: Final = "optimizer.lbfgs.current_gradients"


def with_tail_noted(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """Return `checkpoint`, which was read from `source`, with a warning where the file ends in zeros for no reason.

    Far sources are not asked.
    """
    if _is_far_or_ends(source) or _can_end_in_zeros(checkpoint):
        return checkpoint
    n = _zeros_at_end(source)
    warning = f"the last {n:,} bytes are zeros, {_WHY}"
    return dataclasses.replace(checkpoint, zero_tail=n, warnings=(*checkpoint.warnings, warning))


def with_tail_told(error: CheckpointError, source: Source) -> CheckpointError:
    """Return `error`, which `source` gave, with the cause where that is the zeros that the file ends with."""
    at = error.offset
    if at is None or _is_far_or_ends(source) or not _is_zero(source, at, min(_BLOCK, source.size - at)):
        return error
    return error.with_hint(f"zeros follow, {_WHY}")


def _is_far_or_ends(source: Source) -> bool:
    """Tell whether the end is not to be asked for, or other than zeros."""
    return source.far or source.size < _SUSPECT or not _is_zero(source, source.size - _SUSPECT, _SUSPECT)


def _can_end_in_zeros(checkpoint: Checkpoint) -> bool:
    """Tell whether zeros at the end may be what was written.

    Before the first step the moments are zero, and B of an adapter, but A is not.  The memory of L-BFGS, which a GGUF
    file ends with, is zero until it has been filled, but the gradients before it are not.
    """
    table, optimizer = checkpoint.table, checkpoint.optimizer
    pairs = sorted(checkpoint.pairs, key=lambda pair: max(map(int, table["offset"][[pair.row_a, pair.row_b]])))

    def is_zero(row: int, last: int | None = None) -> bool:
        offset, nbytes = int(table["offset"][row]), int(table["nbytes"][row])
        n = min(nbytes, last or nbytes)
        return _is_zero(checkpoint.source, offset + nbytes - n, n)

    if is_zero(pairs[-1].row_a) and is_zero(pairs[-1].row_b):
        return False
    if optimizer is None:
        return is_zero(pairs[0].row_b)
    if checkpoint.format == "gguf" and isinstance(optimizer, Lbfgs) and not optimizer.just_initialized:
        return not is_zero(checkpoint.names.index(_GRADIENTS), last=_SUSPECT)
    return optimizer.just_initialized


def _is_zero(source: Source, offset: int, nbytes: int) -> bool:
    """Tell whether there is nothing but zeros."""
    for start in range(offset, offset + nbytes, _BLOCK):
        block = bytes(read_at(source, start, min(_BLOCK, offset + nbytes - start)))
        if block.count(0) != len(block):
            return False
    return True


def _zeros_at_end(source: Source) -> int:
    """Return how many bytes at the end are zero."""
    stop = source.size
    while stop:
        start = max(0, stop - _BLOCK)
        block = bytes(read_at(source, start, stop - start)).rstrip(b"\0")
        stop = start + len(block)
        if block:
            break
    return source.size - stop
