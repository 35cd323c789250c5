"""Tensors that are known by their names: what the readers of GGUF and ggla files share.

Files of both formats name their tensors and may have them in any order.  Here they are held against the schema: that
all of them are there, and no others, and that their dims fit together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint import ModelParameters
from ..errors import CheckpointError
from ..formats.layout import ALIGNMENT, TENSOR
from ..formats.schema import MODULES, schemas
from ..storage.sources import Source

__all__ = ["NamedTensors", "infer", "model_parameters", "tensor_table"]

_MODULES: Final = {module.name: module for module in MODULES}
_OF_HEADS: Final = {("attn_q", "b"), ("attn_output", "a")}
"""Tensors as long as all heads together, which is n_embd in the models that finetune knew and not in all."""


class NamedTensors(NamedTuple):
    """The tensors of a file."""

    source: Source
    """Where they are, for messages."""
    rows: Mapping[str, int]
    """Row in `ne` and `dims_at` by GGUF name."""
    ne: npt.NDArray[np.int64]
    """(n, 4) dims, innermost first; 1 beyond the dims that are there."""
    dims_at: npt.NDArray[np.int64]
    """(n,) byte offset of the dims in the file."""

    def lora_names(self, n_layer: int, hint: str) -> tuple[str, ...]:
        """Return the GGUF names of all LoRA tensors of `n_layer` layers, in the order of a ggcl file.

        Raises
        ------
        CheckpointError
            One of them is missing; `hint` ends the message.  That is found out before `n_layer` costs anything.
        """
        names: list[str] = []
        for lora in schemas(n_layer):
            for name in lora.names:
                if name not in self.rows:
                    raise CheckpointError(
                        f"the tensor is missing; a checkpoint of {n_layer} layers has it",
                        source=self.source.name, tensor=name, hint=hint,
                    )  # fmt: skip
            names += lora.names
        return tuple(names)

    def refuse_others(self, names: Sequence[str]) -> None:
        """Raise `CheckpointError` if there are tensors besides `names`."""
        if len(names) == len(self.rows):
            return
        known = set(names)
        other = next(name for name in self.rows if name not in known)
        raise CheckpointError(
            "a finetune checkpoint of this shape has no tensor of this name",
            source=self.source.name, tensor=other, index=self.rows[other],
        )  # fmt: skip

    def check_lora_dims(self, n_layer: int, ranks: dict[str, int], dims: dict[str, int]) -> None:
        """Hold the dims of all LoRA tensors against `ranks` and `dims`; see `Schema.expected`, n_ff included."""
        for lora in schemas(n_layer):
            ne = lora.expected(ranks, dims)[:, 1:3]
            self._check(lora.names, np.column_stack([ne, np.ones_like(ne)]))

    def check_dims(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Hold the dims of some tensors, by name, against those that they must have."""
        wanted = np.ones((len(expected), 4), np.int64)
        for row, ne in enumerate(expected.values()):
            wanted[row, : len(ne)] = ne
        self._check(tuple(expected), wanted)

    def _check(self, names: Sequence[str], wanted: npt.NDArray[np.int64]) -> None:
        # Dims of 1 at the end may be there or not: builds of 2024 left them out.
        rows = [self.rows[name] for name in names]
        bad = np.flatnonzero((self.ne[rows] != wanted).any(axis=1))
        if len(bad):
            name, row = names[int(bad[0])], rows[int(bad[0])]
            raise CheckpointError(
                source=self.source.name, tensor=name, index=row, field="dims", offset=int(self.dims_at[row]),
                expected=_shown(wanted[bad[0]]), found=_shown(self.ne[row]),
            )  # fmt: skip


def _shown(ne: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Return dims without the ones at the end, but two at least."""
    dims = ne.tolist()
    while len(dims) > 2 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def tensor_table(
    offsets: npt.NDArray[np.int64], ne: npt.NDArray[np.int64], n_dims: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.void]:
    """Return (n,) `layout.TENSOR` for float32 tensors, their places in the GGUF file as the conversion lays it out.

    Parameters
    ----------
    offsets
        (n,) where the data is in the source.
    ne
        (n, 2) dims.
    n_dims
        How many dims each has, 1 or 2.
    """
    table = np.zeros(len(offsets), TENSOR)
    table["offset"] = offsets
    table["ne0"], table["ne1"] = ne[:, 0], ne[:, 1]
    table["n_dims"] = n_dims
    table["nbytes"] = 4 * ne[:, 0] * ne[:, 1]
    padded = (table["nbytes"] + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    table["gguf_offset"] = np.cumsum(padded) - padded
    return table


def infer(names: Sequence[str], table: npt.NDArray[np.void]) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the tensors of an adapter tell of ranks and dims, of which any may be missing.

    Parameters
    ----------
    names, table
        As in `Checkpoint`: any of the tensors that a model has.

    Returns
    -------
    tuple of dict
        The rank of each `Module.rank`, 0 where there is none or more than one; n_embd, n_ff and n_vocab, 0 where no
        tensor tells.
    """
    ranks: dict[str, set[int]] = {module.rank: set() for module in MODULES}
    dims = dict.fromkeys(("n_embd", "n_ff", "n_vocab"), 0)
    for name, rank, length in zip(names, table["ne0"].tolist(), table["ne1"].tolist()):
        module = _MODULES.get(name.split(".")[-3])
        if module is None:
            continue
        ranks[module.rank].add(rank)
        end = name[-1]
        dim = module.n_in if end == "a" else module.n_out
        if dim in dims and (module.name, end) not in _OF_HEADS:
            dims[dim] = dims[dim] or length
    return {rank: some.pop() if len(some) == 1 else 0 for rank, some in ranks.items()}, dims


def model_parameters(dims: Mapping[str, int], n_layer: int) -> ModelParameters:
    """Return what an adapter tells of its model: `dims` as `infer` has them, and how many layers it reaches."""
    return ModelParameters(
        n_vocab=dims["n_vocab"], n_embd=dims["n_embd"], n_mult=0, n_head=0, n_layer=n_layer, n_rot=0,
        n_ff=dims["n_ff"], n_head_kv=0,
    )  # fmt: skip
