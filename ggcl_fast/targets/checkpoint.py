"""Writing the GGUF finetune checkpoint: the conversion that the original script did, byte for byte.

Keys and their order are those of `finetune_keys`, ``training.file_version`` 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Optimizer
from ..errors import CheckpointError
from ..formats import finetune_keys as finetune
from ..formats.finetune_keys import Key
from ..formats.gguf_writer import KeyTemplate, beginning, new_writer, padding, tensor_infos
from ..formats.layout import ALIGNMENT
from ..storage.copying import Cuts, copy_tensors
from ..storage.outputs import Writer
from ..storage.urls import StrPath
from .base_model import BaseModel
from .options import Options
from .plan import File, Plan

__all__ = ["add_keys", "plan", "write"]


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:  # noqa: ARG001
    """Plan the GGUF finetune checkpoint: one file.

    Version 0 of the format is written, and nothing is left out for it: what has no place in it is refused.  That is
    right for version 1 too, the later builds': without its shuffle state, context and rope keys the file would claim a
    training that never was.

    Raises
    ------
    CheckpointError
        `checkpoint` is an adapter, or has keys that version 0 does not have.
    """
    optimizer = _optimizer(checkpoint)
    keys = _template(optimizer.name).fill([one for one in _values(checkpoint, optimizer) if not isinstance(one, str)])
    shape = _Shape(checkpoint.names, checkpoint.table)
    # The reader has made what cannot change for the next file of the shape too; anything else is of this file alone.
    tensors = (_tensors.__wrapped__ if shape.table.flags.writeable else _tensors)(shape)
    start = beginning(tensors.infos, len(shape.names), keys)
    start += padding(len(start))
    write = functools.partial(copy_tensors, checkpoint.source, tensors.cuts, head=start)
    return Plan((File(write, len(start) + tensors.nbytes),), len(shape.names))


class _Shape:
    """Names and rows of all tensors; one that has the very same objects is equal, as the next file of a shape has."""

    def __init__(self, names: tuple[str, ...], table: npt.NDArray[np.void]) -> None:
        self.names, self.table = names, table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and self.names is other.names and self.table is other.table

    def __hash__(self) -> int:
        return id(self.table)


class _Tensors(NamedTuple):
    """All that the tensors alone decide."""

    infos: bytes
    cuts: Cuts
    nbytes: int
    """Of the data section."""


@functools.lru_cache(maxsize=4)
def _tensors(shape: _Shape) -> _Tensors:
    table = shape.table
    last = table[-1]
    nbytes = int(last["gguf_offset"]) + int(last["nbytes"])
    cuts = Cuts(table["offset"], table["nbytes"], ALIGNMENT)
    return _Tensors(tensor_infos(shape.names, table), cuts, nbytes + len(padding(nbytes)))


def write(checkpoint: Checkpoint, output: Writer) -> None:
    """Write `checkpoint` to `output` as a GGUF finetune checkpoint; raises as `plan` does."""
    plan(checkpoint, Options("checkpoint"), None, ()).files[0].write(output)


def add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add all keys of the GGUF finetune checkpoint to `writer`, in their order; raises as `plan` does."""
    optimizer = _optimizer(checkpoint)
    for key, value in zip(_keys(optimizer.name), _values(checkpoint, optimizer)):
        writer.add_key_value(key.name, value, key.type)


def _keys(optimizer: str) -> tuple[Key, ...]:
    """Return all keys in the order of the file; the architecture, which gguf's writer adds itself, is before them."""
    return (
        *finetune.CONSTANT, finetune.FILE_VERSION, finetune.TRAINING_TYPE, *finetune.TRAINING.values(),
        *finetune.MODEL.values(), *finetune.RANKS.values(), finetune.OPTIMIZER_FILE_VERSION,
        *finetune.OPTIMIZER.values(), finetune.OPTIMIZER_TYPE, *finetune.STATE[optimizer].values(),
    )  # fmt: skip


def _values(checkpoint: Checkpoint, optimizer: Optimizer) -> list[Any]:
    """Return the values of `_keys`."""
    parameters, ranks = checkpoint.parameters, checkpoint.ranks
    return [
        *finetune.CONSTANT.values(), 0, finetune.TRAINED,
        *(getattr(checkpoint.training, field) for field in finetune.TRAINING),
        *(getattr(parameters, field) for field in finetune.MODEL), *(ranks[rank] for rank in finetune.RANKS), 0,
        *(getattr(optimizer, field) for field in finetune.OPTIMIZER), optimizer.name,
        *(getattr(optimizer, field) for field in finetune.STATE[optimizer.name]),
    ]  # fmt: skip


@functools.cache
def _template(optimizer: str) -> KeyTemplate:
    """Return the keys of every file with this optimizer, to be filled in."""
    writer = new_writer(finetune.ARCH)
    texts = {finetune.TRAINING_TYPE: finetune.TRAINED, finetune.OPTIMIZER_TYPE: optimizer}
    keys = _keys(optimizer)
    for key in keys:
        writer.add_key_value(key.name, texts.get(key, 0), key.type)
    return KeyTemplate(writer, [key.name for key in keys if key not in texts])


def _optimizer(checkpoint: Checkpoint) -> Optimizer:
    """Return the optimizer state of `checkpoint` if that can be written whole."""
    if checkpoint.optimizer is None:
        raise CheckpointError(
            "an adapter has neither optimizer state nor training counts", source=checkpoint.source.name,
            field="optimizer", hint="it cannot become a checkpoint again: take the one that finetune wrote beside it",
        )  # fmt: skip
    if checkpoint.extra:
        keys = list(checkpoint.extra)
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise CheckpointError(
            f"a checkpoint of training.file_version 0 has no place for {', '.join(keys[:3])}{more}",
            source=checkpoint.source.name, field="keys", hint="it is in GGUF form already; copy it as it is",
        )  # fmt: skip
    return checkpoint.optimizer
