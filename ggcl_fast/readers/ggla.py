"""Reading a ggla file: the adapter that finetune wrote beside each checkpoint.

`layout.GGLA_HEADER`, then tensor records as in a ggcl file, up to the end of the file.  Nothing says how many there
are, or what the model's dims are: names and dims of the tensors tell it.  Names are the old ones
(``layers.0.attention.wq.weight.loraA``) or GGUF's with the old suffix (``blk.0.attn_q.weight.loraA``).

Since nothing counts the records, a file that is cut exactly behind a layer cannot be told from one of fewer layers;
everything else that is missing is missed.
"""

from __future__ import annotations

import re
import struct
from array import array
from typing import Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, ModelParameters, Training
from ..errors import CheckpointError, TruncatedError, printable
from ..layout import ALIGNMENT, GGLA_HEADER, GGLA_VERSION, RECORD
from ..schema import LAYER_MODULES, MODEL_MODULES, MODULES
from ..sources import Source, read_at
from ..sweep import Engine
from .by_name import Found, tensor_table

__all__ = ["read"]

_FIXED: Final = struct.Struct("<3I")  # layout.RECORD
_DIMS: Final = {1: struct.Struct("<I"), 2: struct.Struct("<2I")}  # builds of 2024 left a last dim of 1 out
_LONGEST_NAME: Final = 255  # bytes; real ones have some 40
_NAME: Final = re.compile(rb"(?:(layers|blk)\.(0|[1-9][0-9]{0,8})\.)?([a-z0-9_.]+)\.weight\.lora([AB])", re.ASCII)

_WEIGHTS: Final = {
    None: {name: m.base_name for m in MODEL_MODULES for name in (m.weight, m.base_name)},
    b"layers": {m.weight: m.base_name for m in LAYER_MODULES},
    b"blk": {m.base_name.rpartition(".")[2]: m.base_name for m in LAYER_MODULES},
}
"""GGUF base name of each weight by how its name in the file begins, then by the rest of that name."""
assert RECORD.itemsize == _FIXED.size


class _Records(NamedTuple):
    """All records of a file, in its order."""

    names: tuple[str, ...]
    """GGUF names."""
    n_layer: int
    numbers: npt.NDArray[np.int64]
    """(n, 4): byte offset of the record and of its data, and both dims."""


def read(source: Source, engine: Engine = "auto") -> Checkpoint:  # noqa: ARG001 - nothing is swept here
    """Read the ggla file that `source` holds; raises as `readers.open_checkpoint` does."""
    scale = _scale(source)
    names, n_layer, numbers = _read_records(source)
    ne = numbers[:, 2:4]
    padded = np.column_stack([ne, np.ones_like(ne)])
    found = Found(source, {name: row for row, name in enumerate(names)}, padded, numbers[:, 0] + RECORD.itemsize)
    found.lora_names(n_layer, "finetune wrote all of them; the file may be cut short")
    found.refuse_others(names)

    ranks, dims = _infer(found, n_layer)
    found.check_lora_dims(n_layer, ranks, dims)
    table = tensor_table(numbers[:, 1], ne, 2)
    table["record"] = numbers[:, 0]
    return Checkpoint(
        source,
        ModelParameters(
            n_vocab=dims["n_vocab"], n_embd=dims["n_embd"], n_mult=0, n_head=0, n_layer=n_layer, n_rot=0,
            n_ff=dims["n_ff"], n_head_kv=0,
        ),
        ranks,
        Training(0, 0, 0),
        None,
        names,
        table,
        (),
        kind="ggla",
        scale=scale,
    )  # fmt: skip


def _scale(source: Source) -> float:
    """Read the fixed header and return what deltas are multiplied by."""
    data = read_at(source, 0, GGLA_HEADER.itemsize)
    if len(data) < GGLA_HEADER.itemsize:
        raise TruncatedError(
            source=source.name, field="header", offset=0, expected=f"{GGLA_HEADER.itemsize} bytes", found=len(data)
        )
    _, version, rank, alpha = np.frombuffer(data, GGLA_HEADER)[0].item()
    for field, offset, good, expected, found in (
        ("version", 4, version == GGLA_VERSION, f"{GGLA_VERSION}, the only one ever written", version),
        ("lora_r", 8, rank > 0, "at least 1", rank),
        ("lora_alpha", 12, alpha > 0, "at least 1", alpha),
    ):
        if not good:
            raise CheckpointError(source=source.name, field=field, offset=offset, expected=expected, found=found)
    return float(alpha / rank)


def _read_records(source: Source) -> _Records:
    """Walk the records up to the end of the file."""
    names: dict[str, None] = {}
    numbers = array("q")
    n_layer = 0
    position = GGLA_HEADER.itemsize
    while position < source.size:
        name, layer, record = _read_record(source, len(names), position)
        if name in names:
            raise CheckpointError(
                "the tensor is there twice", source=source.name, tensor=name, index=len(names), offset=position
            )
        names[name] = None
        n_layer = max(n_layer, layer + 1)
        numbers.extend(record)
        position = record[1] + 4 * record[2] * record[3]
    return _Records(tuple(names), n_layer, np.array(numbers, np.int64).reshape(-1, 4))


def _read_record(source: Source, index: int, position: int) -> tuple[str, int, tuple[int, int, int, int]]:
    """Read the record at `position`: its GGUF name, its layer (-1 for none), and a row of `_Records.numbers`."""
    start, window = source.window(position)
    head, ne0, ne1, name_len = _read_head(source, index, position, window[position - start :])
    at = position + head
    raw = bytes(window[at - start : at - start + name_len])
    known = _gguf_name(raw)
    if known is None:
        expected = "the name of a LoRA tensor, such as 'blk.0.attn_q.weight.loraA'"
        _fault(CheckpointError, source, index, "name", at, expected, f"'{printable(raw)}'")
    data = -(-(at + name_len) // ALIGNMENT) * ALIGNMENT
    nbytes = 4 * ne0 * ne1
    if data + nbytes > source.size:
        raise TruncatedError(
            source=source.name, tensor=known[0], index=index, field="data", offset=data, expected=f"{nbytes} bytes",
            found=max(0, source.size - data),
        )  # fmt: skip
    return *known, (position, data, ne0, ne1)


def _read_head(source: Source, index: int, position: int, window: memoryview) -> tuple[int, int, int, int]:
    """Read what stands before the name of a record: how long that is, both dims, and the length of the name."""
    left = source.size - position
    at = _FIXED.size
    if left < at:
        _fault(TruncatedError, source, index, "head", position, f"{at} bytes", left)
    n_dims, name_len, dtype = _FIXED.unpack_from(window)
    if n_dims not in _DIMS:
        _fault(CheckpointError, source, index, "n_dims", position, 2, n_dims)
    if dtype != 0:
        _fault(CheckpointError, source, index, "dtype", position + 8, "0 (float32)", dtype)
    head = at + 4 * n_dims
    if left < head:
        _fault(TruncatedError, source, index, "dims", position + at, f"{head - at} bytes", left - at)
    ne0, ne1 = (*_DIMS[n_dims].unpack_from(window, at), 1)[:2]
    if ne0 == 0 or ne1 == 0:
        _fault(CheckpointError, source, index, "dims", position + at, "at least 1 each", (ne0, ne1))
    if name_len > _LONGEST_NAME:
        _fault(CheckpointError, source, index, "name length", position + 4, f"at most {_LONGEST_NAME}", name_len)
    if left < head + name_len:
        _fault(TruncatedError, source, index, "name", position + head, f"{name_len} bytes", left - head)
    return head, ne0, ne1, name_len


def _fault(
    kind: type[CheckpointError], source: Source, index: int, field: str, offset: int, expected: object, found: object
) -> NoReturn:
    """Raise that something is wrong with a record of which the name is not known yet."""
    where = f"record {index} {field}"
    raise kind(source=source.name, index=index, field=where, offset=offset, expected=expected, found=found)


def _gguf_name(raw: bytes) -> tuple[str, int] | None:
    """Return the GGUF name and the layer (-1 for none) of a tensor named `raw` in the file; None for no such name."""
    match = _NAME.fullmatch(raw)
    if match is None:
        return None
    prefix, layer, weight, end = match.groups()
    base_name = _WEIGHTS[prefix].get(weight.decode())
    if base_name is None:
        return None
    name = f"{base_name.format(bid=(layer or b'').decode())}.weight.lora_{end.decode().lower()}"
    return name, int(layer) if layer else -1


def _infer(found: Found, n_layer: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return ranks and dims as the tensors of the model and of its first layer have them; 0 where there is no layer."""

    def ne(base_name: str, end: str) -> list[int]:
        row = found.rows[f"{base_name.format(bid=0)}.weight.lora_{end}"]
        return [int(dim) for dim in found.ne[row, :2]]

    ranks = dict.fromkeys((m.rank for m in MODULES), 0)
    dims = dict.fromkeys(("n_embd", "n_vocab", "n_ff", "n_embd_kv"), 0)
    for module in MODULES if n_layer else MODEL_MODULES:
        ranks[module.rank], n_in = ne(module.base_name, "a")
        n_out = ne(module.base_name, "b")[1]
        # The first tensor to tell a dim binds all others.
        for dim, value in ((module.n_in, n_in), (module.n_out, n_out)):
            dims[dim] = dims.get(dim) or value
    dims.pop("one", None)
    return ranks, dims
