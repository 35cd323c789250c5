"""The LoRA pairs of a checkpoint: which weight each changes, and by how much.

The delta of a pair is ``scale * B @ A.T``, with A of shape (n_in, rank) and B of shape (n_out, rank): norms too, for
which n_out is 1.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .schema import LAYER_MODULES, MODEL_MODULES, Module
from .sources import read_at

__all__ = ["OUTPUT", "TOKEN_EMBD", "Floats", "NormSize", "Pair", "norm_size", "pairs"]

Floats = npt.NDArray[np.float32]

TOKEN_EMBD: Final = "token_embd.weight"
"""The weight that is looked up instead of multiplied by, for which llama.cpp and PEFT have rules of their own."""
OUTPUT: Final = "output.weight"
"""The weight that a model with tied embeddings does not have: it uses `TOKEN_EMBD` in its place."""

_SUFFIXES: Final = (".lora_a", ".lora_b")
_MODULES: Final = {m.base_name.rpartition(".")[2]: m for m in MODEL_MODULES + LAYER_MODULES}


class Pair(NamedTuple):
    """Two tensors of a checkpoint that change one weight of its base model."""

    weight: str
    """GGUF name of the weight, such as ``blk.0.attn_q.weight``."""
    layer: int | None
    """Its layer, None for a weight of the model itself."""
    module: Module
    n_in: int
    n_out: int
    rank: int
    row_a: int
    """Row of ``Checkpoint.table`` with the place of A."""
    row_b: int

    @property
    def is_norm(self) -> bool:
        """Tell whether the weight is a vector that scales, which llama.cpp's adapters cannot change."""
        return self.module.n_out == "one"

    @property
    def dims(self) -> tuple[int, ...]:
        """Dims of the weight, innermost first, as in the base model."""
        return (self.n_in,) if self.is_norm else (self.n_in, self.n_out)

    def a(self, checkpoint: Checkpoint) -> Floats:
        """Read A, shape (n_in, rank)."""
        return _read(checkpoint, self.row_a)

    def b(self, checkpoint: Checkpoint) -> Floats:
        """Read B, shape (n_out, rank), with the checkpoint's scale in it; as it stands where the scale is 1."""
        b = _read(checkpoint, self.row_b)
        return b if checkpoint.scale == 1.0 else (b * np.float64(checkpoint.scale)).astype(np.float32)


def _read(checkpoint: Checkpoint, row: int) -> Floats:
    """Read a tensor with plain reads: a map of a file that shrinks would end the process."""
    place = checkpoint.table[row]
    data = read_at(checkpoint.source, int(place["offset"]), int(place["nbytes"]))
    return np.frombuffer(data, "<f4").reshape(int(place["ne1"]), int(place["ne0"]))


def pairs(checkpoint: Checkpoint) -> list[Pair]:
    """Return the pairs of `checkpoint` in the order of the file.

    Raises
    ------
    CheckpointError
        A tensor has no partner, or another rank than its partner, or belongs to a weight that LLaMA does not have.
    """
    rows = {name: row for row, name in enumerate(checkpoint.names)}
    found = []
    for name, row in rows.items():
        weight, suffix = name[: -len(_SUFFIXES[0])], name[-len(_SUFFIXES[0]) :]
        if suffix not in _SUFFIXES:
            continue
        other = weight + _SUFFIXES[suffix == _SUFFIXES[0]]
        if other not in rows:
            raise CheckpointError(
                "one of a pair without the other", source=checkpoint.source.name, tensor=name, index=row
            )
        if suffix == _SUFFIXES[0]:
            found.append(_pair(checkpoint, weight, row, rows[other]))
    return found


def _pair(checkpoint: Checkpoint, weight: str, row_a: int, row_b: int) -> Pair:
    (n_in, rank), (n_out, rank_b) = (
        (int(place["ne1"]), int(place["ne0"])) for place in (checkpoint.table[row_a], checkpoint.table[row_b])
    )
    if rank != rank_b:
        raise CheckpointError(
            "the two of a pair have different ranks", source=checkpoint.source.name, tensor=weight, field="dims",
            expected=rank, found=rank_b,
        )  # fmt: skip
    parts = weight.split(".")
    in_layer = len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal()
    module = _MODULES.get(parts[-2]) if len(parts) in (2, 4) else None
    if module is None or in_layer != (module in LAYER_MODULES) or (module.n_out == "one" and n_out != 1):
        raise CheckpointError(
            "no weight of a LLaMA model that finetune trained", source=checkpoint.source.name, tensor=weight
        )
    return Pair(weight, int(parts[1]) if in_layer else None, module, n_in, n_out, rank, row_a, row_b)


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


def norm_size(checkpoint: Checkpoint, found: list[Pair]) -> NormSize:
    """Measure the norm deltas among `found`."""
    n, n_values, largest, squares = 0, 0, 0.0, 0.0
    for pair in found:
        if pair.is_norm:
            delta = pair.b(checkpoint).astype(np.float64) @ pair.a(checkpoint).T
            n, n_values = n + 1, n_values + delta.size
            largest = max(largest, float(np.abs(delta).max()))
            squares += float(np.square(delta).sum())
    return NormSize(n, largest, math.sqrt(squares / max(1, n_values)))
