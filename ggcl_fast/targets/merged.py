"""Writing the base model with every delta added: one file that needs no adapter.

Weights are read, changed and written a few rows at a time, see `adding`.  Types that gguf can quantize to are kept; a
weight of another type is written as F16.  What no delta changes is copied byte for byte, and so are the keys.

A model with tied embeddings has one weight where training changed two: the one that is looked up, and the one that
multiplies at the end.  It becomes a model with both, which is what was trained.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import gguf
import numpy as np

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.gguf_tensors import GGUFTensor
from ..formats.gguf_writer import TensorInfo, head, write_padding
from ..formats.numbers import knows
from ..formats.sums import Kernel
from ..storage.copying import copy_patched, copy_tensors
from ..storage.outputs import Writer
from ..storage.sources import read_at
from ..storage.urls import StrPath
from .adding import Changed, add_deltas, pick_kernel
from .base_model import BaseModel
from .deltas import OUTPUT, TOKEN_EMBD
from .fitting import fit
from .options import Options
from .plan import File, Plan

__all__ = ["plan"]

_Type = gguf.GGMLQuantizationType
_EXACT: Final = (_Type.F32, _Type.F16, _Type.BF16)
_USUAL_ALIGNMENT: Final = 4096
_TOGETHER: Final = 4096  # tensors that are copied together


class _Item(NamedTuple):
    """A tensor of the merged model."""

    info: TensorInfo
    origin: GGUFTensor
    """The tensor of the base that it comes from."""
    pair: Pair | None
    """What changes it."""


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:  # noqa: ARG001
    """Plan the merged model.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or gguf cannot read the type of a weight.
    """
    assert base is not None  # `targets.TARGETS` says that it is needed
    checkpoint, _, notes = fit(checkpoint, options, base)
    changed = {pair.weight: pair for pair in checkpoint.pairs}
    items = functools.partial(_items, base, changed)
    n_tensors = sum(1 for _ in items())
    header = base.header
    start, stop = header.keys_span
    keys = len(header.fields), bytes(read_at(base.source, start, stop - start))
    infos = (item.info for item in items())
    beginning, nbytes = head(infos, n_tensors, keys, header.version, header.alignment)
    of_interest = [item for item in items() if item.pair or item.info.name == OUTPUT]
    n_weights = Counter[_Type]()
    for item in of_interest:
        if item.pair is not None:
            n_weights[item.origin.type] += math.prod(item.info.dims)
    kernels = {type: pick_kernel(type, options.engine, n) for type, n in n_weights.items()}
    write = functools.partial(_write, checkpoint, base, items, beginning, kernels)
    return Plan((File(write, nbytes),), n_tensors, (*notes, *_notes(of_interest)))


def _items(base: BaseModel, changed: Mapping[str, Pair]) -> Iterator[_Item]:
    """Yield the tensors of the merged model in their order: the base's, then an output weight where there was none."""
    for tensor in base.header.tensors():
        yield _item(base, tensor.name, tensor, changed)
    if base.is_tied and changed.keys() & {TOKEN_EMBD, OUTPUT}:
        yield _item(base, OUTPUT, base.named(TOKEN_EMBD), changed)


def _item(base: BaseModel, name: str, tensor: GGUFTensor, changed: Mapping[str, Pair]) -> _Item:
    pair = changed.get(name)
    written = tensor.type if pair is None else _written_type(base, tensor)
    return _Item(TensorInfo(name, tensor.dims, written), tensor, pair)


def _written_type(base: BaseModel, tensor: GGUFTensor) -> _Type:
    """Return the type that `tensor` has when its delta is added."""
    if not knows(gguf.quants.dequantize, tensor.type):
        raise CheckpointError(
            "gguf cannot read tensors of this type", source=base.source.name, tensor=tensor.name, field="type",
            found=tensor.type.name, expected="a type of floats that gguf dequantizes",
        )  # fmt: skip
    return tensor.type if knows(gguf.quants.quantize, tensor.type) else _Type.F16


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
    return ", ".join(f"{name} ({type}{f', {n} times' if n > 1 else ''})" for (name, type), n in names.items())


def _write(
    checkpoint: Checkpoint,
    base: BaseModel,
    items: Callable[[], Iterator[_Item]],
    beginning: bytes,
    kernels: dict[_Type, Kernel | None],
    output: Writer,
) -> None:
    """Write the merged model, whose file begins with `beginning`."""
    alignment = base.header.alignment
    output.writev([beginning])
    write_padding(output, len(beginning), alignment)
    for changed, some in itertools.groupby(items(), lambda item: item.pair is not None):
        if changed:
            tensors = (Changed(item.info, item.origin, item.pair) for item in some if item.pair is not None)
            for rows in add_deltas(checkpoint, base, tensors, kernels):
                output.writev([rows.data])
                if rows.last:
                    write_padding(output, rows.of.info.nbytes, alignment)
        else:
            while batch := list(itertools.islice(some, _TOGETHER)):
                _copy(base, batch, output, alignment)


def _copy(base: BaseModel, items: list[_Item], output: Writer, alignment: int) -> None:
    """Copy tensors that follow each other, together where there is no more between them than usual."""
    if alignment <= _USUAL_ALIGNMENT:
        offsets = np.array([item.origin.offset for item in items], np.int64)
        sizes = np.array([item.origin.nbytes for item in items], np.int64)
        copy_tensors(base.source, offsets, sizes, output, alignment=alignment)
        return
    for item in items:
        start, stop = item.origin.offset, item.origin.offset + item.origin.nbytes
        copy_patched(base.source, (), output, start=start, stop=stop)
        write_padding(output, item.info.nbytes, alignment)
