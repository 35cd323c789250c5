"""A file that ends in zeros: what a download that was never finished, or a disk without power, leaves."""

from __future__ import annotations

import dataclasses
from typing import Final

from ..checkpoint import Checkpoint, Lbfgs
from ..storage.sources import Source, read_at

__all__ = ["with_tail_noted"]

_SUSPECT: Final = 512  # bytes: padding and counts of nothing have fewer
_BLOCK: Final = 1 << 20  # bytes looked at together


def with_tail_noted(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """Return `checkpoint`, which was read from `source`, with a warning where the file ends in zeros for no reason.

    Before the first step the moments are zero, and B of an adapter; and the memory of L-BFGS, which a GGUF file ends
    with, is zero until it has been filled.  Far sources are not asked.
    """
    if source.far or source.size < _SUSPECT or any(read_at(source, source.size - _SUSPECT, _SUSPECT)):
        return checkpoint
    is_early = checkpoint.optimizer is not None and checkpoint.training.iterations == 0
    is_filling = checkpoint.format == "gguf" and isinstance(checkpoint.optimizer, Lbfgs)
    if is_early or is_filling or (checkpoint.optimizer is None and not _is_trained(checkpoint)):
        return checkpoint
    n = _zeros_at_end(source)
    warning = f"the last {n:,} bytes are zeros, as a download leaves them that was never finished"
    return dataclasses.replace(checkpoint, zero_tail=n, warnings=(*checkpoint.warnings, warning))


def _is_trained(checkpoint: Checkpoint) -> bool:
    """Tell whether B of the first pair has a value other than zero."""
    rows = [pair.row_b for pair in checkpoint.pairs]
    place = checkpoint.table[min(rows, key=lambda row: int(checkpoint.table["offset"][row]))]
    return any(read_at(checkpoint.source, int(place["offset"]), int(place["nbytes"])))


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
