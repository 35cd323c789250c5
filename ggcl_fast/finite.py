"""Looking for values that are not numbers: what a training that diverged leaves behind."""

from __future__ import annotations

from typing import Final

import numpy as np

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .sources import read_at

__all__ = ["check_finite"]

_BLOCK: Final = 1 << 20  # bytes looked at together


def check_finite(checkpoint: Checkpoint) -> None:
    """Read all tensors and hold that every value is finite.

    Raises
    ------
    CheckpointError
        Some are NaN or infinite: the message names each tensor concerned, and `found` is a dict from its name to
        the number of such values.
    """
    table = checkpoint.table
    found: dict[str, int] = {}
    for name, offset, nbytes in zip(checkpoint.names, table["offset"].tolist(), table["nbytes"].tolist()):
        n_bad = 0
        for start in range(0, nbytes, _BLOCK):
            values = np.frombuffer(read_at(checkpoint.source, offset + start, min(_BLOCK, nbytes - start)), "<f4")
            n_bad += values.size - int(np.count_nonzero(np.isfinite(values)))
        if n_bad:
            found[name] = n_bad
    if found:
        tensors = ", ".join(f"{name} ({n:,})" for name, n in found.items())
        raise CheckpointError(
            f"{len(found)} of {len(table)} tensors have values that are NaN or infinite: {tensors}",
            source=checkpoint.source.name, field="data", found=found,
        )  # fmt: skip
