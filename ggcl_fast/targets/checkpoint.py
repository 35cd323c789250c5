"""Writing the GGUF finetune checkpoint: the conversion that the original script did, byte for byte.

Keys and their order are those of `finetune_keys`, ``training.file_version`` 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import gguf

from ..checkpoint import Checkpoint, Optimizer
from ..errors import CheckpointError
from ..formats import finetune_keys as finetune
from ..formats.finetune_keys import Key
from ..formats.gguf_writer import BulkGGUFWriter
from ..storage.copying import Progress
from ..storage.outputs import Writer
from ..storage.urls import StrPath
from .base_model import BaseModel
from .options import Options
from .plan import File, Plan

__all__ = ["add_keys", "plan", "write"]


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:  # noqa: ARG001
    """Plan the GGUF finetune checkpoint: one file."""
    _optimizer(checkpoint)
    last = checkpoint.table[-1]
    nbytes = int(last["gguf_offset"]) + int(last["nbytes"])  # the keys, some kilobytes, come before
    return Plan((File(functools.partial(write, checkpoint), nbytes),), len(checkpoint.names))


def write(checkpoint: Checkpoint, output: Writer, progress: Progress | None = None) -> None:
    """Write `checkpoint` to `output` as a GGUF finetune checkpoint.

    Version 0 of the format is written, and nothing is left out for it: what has no place in it is refused.  That is
    right for version 1 too, the later builds': without its shuffle state, context and rope keys the file would claim a
    training that never was.

    Raises
    ------
    CheckpointError
        `checkpoint` is an adapter, or has keys that version 0 does not have.
    """
    writer = BulkGGUFWriter(output, finetune.ARCH)
    add_keys(writer, checkpoint)
    writer.add_tensors(checkpoint.names, checkpoint.table, checkpoint.source)
    writer.write_all(progress)


def add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add all keys of the GGUF finetune checkpoint to `writer`, in their order; raises as `write` does."""
    for key, value in _keys(checkpoint, _optimizer(checkpoint)):
        writer.add_key_value(key.name, value, key.type)


def _keys(checkpoint: Checkpoint, optimizer: Optimizer) -> Iterator[tuple[Key, Any]]:
    """Yield keys and values in the order of the file."""
    yield from finetune.CONSTANT.items()
    yield finetune.FILE_VERSION, 0
    yield finetune.TRAINING_TYPE, finetune.TRAINED
    yield from ((key, getattr(checkpoint.training, field)) for field, key in finetune.TRAINING.items())
    yield from ((key, getattr(checkpoint.parameters, field)) for field, key in finetune.MODEL.items())
    yield from ((key, checkpoint.ranks[rank]) for rank, key in finetune.RANKS.items())
    yield finetune.OPTIMIZER_FILE_VERSION, 0
    yield from ((key, getattr(optimizer, field)) for field, key in finetune.OPTIMIZER.items())
    yield finetune.OPTIMIZER_TYPE, optimizer.name
    yield from ((key, getattr(optimizer, field)) for field, key in finetune.STATE[optimizer.name].items())


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
