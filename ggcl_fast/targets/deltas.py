"""A and B of a checkpoint's pairs, read for writing, and how much of a training is in the norms."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from ..checkpoint import Checkpoint, Pair
from ..formats.numbers import Floats, scaled
from ..storage.sources import read_at

__all__ = ["Census", "NormSize", "lora_a", "lora_b", "norm_size", "trains_norms"]


class Census:
    """Values that are NaN or infinite, counted as they are read for an output."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def look(self, name: str, values: Floats) -> None:
        """Count those of a tensor.  A sum tells that there are none, several times as fast."""
        with np.errstate(all="ignore"):
            if not math.isfinite(np.add.reduce(values, axis=None)) and (n := int((~np.isfinite(values)).sum())):
                self._found[name] = n

    def warnings(self) -> tuple[str, ...]:
        """Say how many there were, and where."""
        if not self._found:
            return ()
        names = [f"{name} ({n:,})" for name, n in self._found.items()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        total = sum(self._found.values())
        return (f"{total:,} values of the deltas are NaN or infinite: {', '.join(names[:_NAMED])}{more}",)


def lora_a(checkpoint: Checkpoint, pair: Pair, census: Census | None = None) -> Floats:
    """Read A of `pair`, shape (n_in, rank)."""
    return _read(checkpoint, pair.row_a, census)


def lora_b(checkpoint: Checkpoint, pair: Pair, census: Census | None = None) -> Floats:
    """Read B of `pair`, shape (n_out, rank), with the scale in it.

    Raises
    ------
    CheckpointError
        A value times the scale is too large.
    """
    b = _read(checkpoint, pair.row_b, census)
    return scaled(b, pair.scale, source=checkpoint.source.name, tensor=f"{pair.weight}.lora_b")


def _read(checkpoint: Checkpoint, row: int, census: Census | None) -> Floats:
    """Read a tensor with plain reads: a map of a file that shrinks would end the process."""
    place = checkpoint.table[row]
    data = read_at(checkpoint.source, int(place["offset"]), int(place["nbytes"]))
    values = np.frombuffer(data, "<f4").reshape(int(place["ne1"]), int(place["ne0"]))
    if census is not None:
        census.look(checkpoint.names[row], values)
    return values


_NAMED: Final = 3  # tensors that a warning names


class NormSize(NamedTuple):
    """How much of the training is in the norms; their weights are near one."""

    n: int
    """Number of norm weights trained."""
    largest: float
    """Largest absolute value of all deltas."""
    rms: float
    """Root of the mean of their squares."""

    def __str__(self) -> str:
        return f"{self.n} norm deltas (at most {self.largest:.3g}, RMS {self.rms:.3g}, beside norm weights of about 1)"


def trains_norms(checkpoint: Checkpoint) -> bool:
    """Tell whether a norm has a delta other than zero."""
    norms = (pair for pair in checkpoint.pairs if pair.is_norm)
    with np.errstate(all="ignore"):  # of NaN
        return any(lora_b(checkpoint, pair).any() and lora_a(checkpoint, pair).any() for pair in norms)


def norm_size(checkpoint: Checkpoint) -> NormSize:
    """Measure the norm deltas of `checkpoint`."""
    n, n_values, largest, squares = 0, 0, 0.0, 0.0
    with np.errstate(all="ignore"):
        for pair in checkpoint.pairs:
            if pair.is_norm:
                delta = lora_b(checkpoint, pair).astype(np.float64) @ lora_a(checkpoint, pair).T
                n, n_values = n + 1, n_values + delta.size
                largest = max(largest, float(np.abs(delta).max()))
                squares += float(np.square(delta).sum())
    return NormSize(n, largest, math.sqrt(squares / max(1, n_values)))
