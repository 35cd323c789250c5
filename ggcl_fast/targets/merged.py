"""Writing the base model with every delta added: one file that needs no adapter.

Weights are read, changed and written a few rows at a time.  Types that gguf can quantize to are kept; a weight of
another type is written as F16.  What no delta changes is copied byte for byte, and so are the keys.

A model with tied embeddings has one weight where training changed two: the one that is looked up, and the one that
multiplies at the end.  It becomes a model with both, which is what was trained.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

import gguf
import numpy as np

from ..base_model import BaseModel
from ..checkpoint import Checkpoint
from ..deltas import OUTPUT, TOKEN_EMBD, Pair, pairs
from ..errors import CheckpointError
from ..gguf_reader import GGUFTensor
from ..gguf_writer import TensorInfo, as_bytes, head, padding, quantized
from ..payload import Output, Progress, copy_patched
from ..sources import read_at
from .plan import File, Options, Plan

__all__ = ["plan"]

_Type = gguf.GGMLQuantizationType
_EXACT: Final = (_Type.F32, _Type.F16, _Type.BF16)
_ROWS: Final = 1 << 18  # bytes of float32 that are changed together; more falls out of cache


class _Item(NamedTuple):
    """A tensor of the merged model."""

    info: TensorInfo
    origin: GGUFTensor
    """The tensor of the base that it comes from."""
    pair: Pair | None
    """What changes it."""


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan the merged model.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or gguf cannot read the type of a weight.
    """
    base = options.base
    assert base is not None  # `targets.TARGETS` says that it is needed
    found = pairs(checkpoint)
    base.check(checkpoint, found)
    items = _items(base, found)
    size = base.source.size + sum(max(0, item.info.nbytes - item.origin.nbytes) for item in items)
    return Plan((File(functools.partial(_write, checkpoint, base, items), size),), len(items), tuple(_notes(items)))


def _items(base: BaseModel, found: list[Pair]) -> list[_Item]:
    """Return the tensors of the merged model in their order: the base's, then an output weight where there was none."""
    changed = {pair.weight: pair for pair in found}
    tensors = [(name, tensor) for name, tensor in base.tensors.items()]
    if base.is_tied and changed.keys() & {TOKEN_EMBD, OUTPUT}:
        tensors.append((OUTPUT, base.tensors[TOKEN_EMBD]))
    items = []
    for name, tensor in tensors:
        pair = changed.get(name)
        kind = tensor.type if pair is None else _written_type(base, tensor)
        items.append(_Item(TensorInfo(name, tensor.dims, kind), tensor, pair))
    return items


def _written_type(base: BaseModel, tensor: GGUFTensor) -> _Type:
    """Return the type that `tensor` has when its delta is added."""
    if not _knows(gguf.quants.dequantize, tensor.type):
        raise CheckpointError(
            "gguf cannot read tensors of this type", source=base.source.name, tensor=tensor.name, field="type",
            found=tensor.type.name, expected="a type of floats that gguf dequantizes",
        )  # fmt: skip
    return tensor.type if _knows(gguf.quants.quantize, tensor.type) else _Type.F16


@functools.cache
def _knows(function: object, kind: _Type) -> bool:
    """Tell whether gguf's `quantize` or `dequantize` has an implementation for `kind`, by its smallest example."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        if function is gguf.quants.quantize:
            gguf.quants.quantize(np.zeros((1, block), np.float32), kind)
        else:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _notes(items: list[_Item]) -> Iterator[str]:
    """Tell which weights could not be kept as they were."""
    changed = [item for item in items if item.pair is not None]
    as_f16 = [item for item in changed if item.info.type != item.origin.type]
    if as_f16:
        yield f"written as F16, since gguf cannot quantize to their types: {_listed(as_f16)}"
    rounded = [item for item in changed if item.info.type == item.origin.type and item.info.type not in _EXACT]
    if rounded:
        yield f"quantized anew, which rounds small deltas away: {_listed(rounded)}; an adapter with --base is exact"
    if any(item.info.name == OUTPUT and item.origin.name != OUTPUT for item in items):
        yield f"the embeddings are no longer tied: {OUTPUT} was added, since training changed the two apart"


def _listed(items: list[_Item]) -> str:
    """Name tensors and their types, those of all layers together."""
    names = Counter((re.sub(r"^blk\.\d+\.", "blk.*.", item.info.name), item.origin.type.name) for item in items)
    return ", ".join(f"{name} ({kind}{f', {n} times' if n > 1 else ''})" for (name, kind), n in names.items())


def _write(
    checkpoint: Checkpoint, base: BaseModel, items: list[_Item], output: Output, progress: Progress | None = None
) -> None:
    """Write the merged model."""
    header, source = base.header, base.source
    start, stop = header.keys_span
    keys = bytes(read_at(source, start, stop - start))
    infos = [item.info for item in items]
    output.writev([head(infos, len(header.fields), keys, version=header.version, alignment=header.alignment)])
    for item in items:
        origin = item.origin
        if item.pair is None:
            copy_patched(source, (), output, start=origin.offset, stop=origin.offset + origin.nbytes, progress=progress)
        else:
            _write_changed(checkpoint, base, item.info, origin, item.pair, output, progress)
        output.writev([padding(item.info.nbytes, header.alignment)])


def _write_changed(
    checkpoint: Checkpoint,
    base: BaseModel,
    info: TensorInfo,
    origin: GGUFTensor,
    pair: Pair,
    output: Output,
    progress: Progress | None,
) -> None:
    """Write a tensor with the delta of `pair` added, some rows at a time: no type's blocks reach across rows."""
    a, b = pair.a(checkpoint), pair.b(checkpoint)
    row_bytes = origin.nbytes // pair.n_out
    n_rows = max(1, _ROWS // (4 * pair.n_in))
    for first in range(0, pair.n_out, n_rows):
        stop = min(first + n_rows, pair.n_out)
        data = read_at(base.source, origin.offset + first * row_bytes, (stop - first) * row_bytes)
        rows = np.frombuffer(data, np.uint8).reshape(stop - first, row_bytes)
        values = b[first:stop] @ a.T
        values += gguf.quants.dequantize(rows, origin.type).reshape(values.shape)
        changed = quantized(values, info.type, source=base.source.name, tensor=info.name)
        output.writev([as_bytes(changed)])
        if progress is not None:
            progress(len(data))
