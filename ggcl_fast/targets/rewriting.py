"""A model written anew from another: some weights with their deltas added, all else byte for byte.

Weights are read, changed and written a few rows at a time, see `adding`.  Types that gguf can quantize to are kept; a
weight of another type is written as F16, and a norm as F32, which is what llama.cpp computes with.  Keys are the base's
but for what `about` says of the new model.

A model with tied embeddings has one weight where training changed two: the one that is looked up, and the one that
multiplies at the end.  It becomes a model with both, which is what was trained.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import gguf
import numpy as np

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.gguf_tensors import GGUFTensor
from ..formats.gguf_writer import KeyValue, TensorInfo, head, write_padding
from ..formats.numbers import knows
from ..formats.schema import OUTPUT, TOKEN_EMBD
from ..formats.sums import Kernel
from ..readers.engine import Engine
from ..storage.copying import Cuts, copy_tensors
from ..storage.outputs import Writer
from .about import edited_keys, file_type
from .adding import Changed, add_deltas, pick_kernel
from .base_model import BaseModel
from .deltas import Census
from .plan import File

__all__ = ["Item", "Model", "model_file"]

_Type = gguf.GGMLQuantizationType
_USUAL_ALIGNMENT: Final = 4096
_TOGETHER: Final = 4096  # tensors that are copied together


class Item(NamedTuple):
    """A tensor of the new model."""

    info: TensorInfo
    origin: GGUFTensor
    """The tensor of the base that it comes from."""
    pair: Pair | None
    """What changes it."""


class Model(NamedTuple):
    """A model that is to be written."""

    file: File
    n_tensors: int
    changed: tuple[Item, ...]
    """Tensors that a pair changes, and an output weight that was added."""


def model_file(
    checkpoint: Checkpoint,
    base: BaseModel,
    pairs: Iterable[Pair],
    about: list[KeyValue],
    engine: Engine,
    census: Census,
) -> Model:
    """Return the file of `base` with the deltas of `pairs` added.

    Parameters
    ----------
    checkpoint, base
        They fit, see `fitting`.
    pairs
        Some of the checkpoint's.
    about
        What the new model says about itself.
    engine
        See `adding.pick_kernel`.
    census
        Takes note of values that are not finite.

    Raises
    ------
    CheckpointError
        gguf cannot read the type of a weight.
    """
    changed = {pair.weight: pair for pair in pairs}
    items = functools.partial(_items, base, changed)
    n_tensors, before, after = 0, Counter[_Type](), Counter[_Type]()
    for item in items():
        n_tensors += 1
        if len(item.info.dims) > 1:
            before[item.origin.type] += math.prod(item.info.dims)
            after[item.info.type] += math.prod(item.info.dims)
    header = base.header
    keys = edited_keys(base, about + file_type(before, after))
    infos = (item.info for item in items())
    beginning, nbytes = head(infos, n_tensors, keys, header.version, header.alignment)
    of_interest = tuple(item for item in items() if item.pair or item.origin.name != item.info.name)
    n_weights = Counter[_Type]()
    for item in of_interest:
        if item.pair is not None:
            n_weights[item.origin.type] += math.prod(item.info.dims)
    kernels = {type: pick_kernel(type, engine, n) for type, n in n_weights.items()}
    write = functools.partial(_write, checkpoint, base, items, beginning, kernels, census)
    return Model(File(write, nbytes), n_tensors, of_interest)


def _items(base: BaseModel, changed: Mapping[str, Pair]) -> Iterator[Item]:
    """Yield the tensors of the new model in their order: the base's, then an output weight where there was none."""
    for tensor in base.header.tensors():
        yield _item(base, tensor.name, tensor, changed)
    if base.is_tied and changed.keys() & {TOKEN_EMBD, OUTPUT}:
        yield _item(base, OUTPUT, base.named(TOKEN_EMBD), changed)


def _item(base: BaseModel, name: str, tensor: GGUFTensor, changed: Mapping[str, Pair]) -> Item:
    pair = changed.get(name)
    written = tensor.type if pair is None else _written_type(base, tensor, pair)
    return Item(TensorInfo(name, tensor.dims, written), tensor, pair)


def _written_type(base: BaseModel, tensor: GGUFTensor, pair: Pair) -> _Type:
    """Return the type that `tensor` has when its delta is added."""
    if not knows(gguf.quants.dequantize, tensor.type):
        raise CheckpointError(
            "gguf cannot read tensors of this type", source=base.source.name, tensor=tensor.name, field="type",
            found=tensor.type.name, expected="a type of floats that gguf dequantizes",
        )  # fmt: skip
    if pair.is_norm:
        return _Type.F32
    return tensor.type if knows(gguf.quants.quantize, tensor.type) else _Type.F16


def _write(
    checkpoint: Checkpoint,
    base: BaseModel,
    items: Callable[[], Iterator[Item]],
    beginning: bytes,
    kernels: dict[_Type, Kernel | None],
    census: Census,
    output: Writer,
) -> None:
    """Write the model, whose file begins with `beginning`."""
    alignment = base.header.alignment
    output.writev([beginning])
    write_padding(output, len(beginning), alignment)
    for changed, some in itertools.groupby(items(), lambda item: item.pair is not None):
        if changed:
            tensors = (Changed(item.info, item.origin, item.pair) for item in some if item.pair is not None)
            for rows in add_deltas(checkpoint, base, tensors, kernels, census):
                output.writev([rows.data])
                if rows.last:
                    write_padding(output, rows.of.info.nbytes, alignment)
        else:
            while batch := list(itertools.islice(some, _TOGETHER)):
                _copy(base, batch, output, alignment)


def _copy(base: BaseModel, items: list[Item], output: Writer, alignment: int) -> None:
    """Copy tensors that follow each other, together where there is no more between them than usual."""
    offsets = np.array([item.origin.offset for item in items], np.int64)
    sizes = np.array([item.origin.nbytes for item in items], np.int64)
    if alignment <= _USUAL_ALIGNMENT:
        copy_tensors(base.source, Cuts(offsets, sizes, alignment), output)
        return
    for i, item in enumerate(items):
        copy_tensors(base.source, Cuts(offsets[i : i + 1], sizes[i : i + 1], 1), output)
        write_padding(output, item.info.nbytes, alignment)
