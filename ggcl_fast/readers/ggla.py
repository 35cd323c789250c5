"""Reading a ggla file: the adapter that finetune wrote beside each checkpoint, or one of Hugging Face's, converted.

`layout.GGLA_HEADER`, then tensor records as in a ggcl file, up to the end of the file.  Nothing says how many there
are, or what the model's dims are: names and dims of the tensors tell it.  Names are the old ones
(``layers.0.attention.wq.weight.loraA``) or GGUF's with the old suffix (``blk.0.attn_q.weight.loraA``).

finetune trained every weight, norms and embeddings too, in float32.  llama.cpp's convert-lora-to-ggml.py, which wrote
most of these files, could write neither of the two, so by them they are told apart.  It wrote any subset of the other
weights, A as float32 or float16, for models of any architecture, which it does not name; and it left the rows of B for
q and k in the order of Hugging Face's weights: `Checkpoint.rows`.

Since nothing counts the records, a file that is cut exactly behind a layer, or behind a pair where any subset can be
there, cannot be told from a smaller one; everything else that is missing is missed.
"""

from __future__ import annotations

import re
from array import array
from typing import Final, NamedTuple, NoReturn

import gguf
import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Training
from ..errors import CheckpointError, TruncatedError, printable
from ..formats.decoded import Decoded, EncodedTensor
from ..formats.finetune_keys import ARCH
from ..formats.layout import ALIGNMENT, GGLA_HEADER, GGLA_VERSION, RECORD
from ..formats.schema import LAYER_MODULES, MODEL_MODULES, MODULES
from ..storage.sources import Source, read_at
from .by_name import NamedTensors, infer, model_parameters, tensor_table
from .engine import Engine
from .ggla_order import Prediction

__all__ = ["read"]

_N_DIMS: Final = (1, 2)  # builds of 2024 left a last dim of 1 out
_LONGEST_NAME: Final = 255  # bytes; real ones have some 40
_NAME: Final = re.compile(rb"(?:(layers|blk)\.(0|[1-9][0-9]{0,8})\.)?([a-z0-9_.]+)\.weight\.lora([AB])", re.ASCII)

_WEIGHTS: Final = {
    None: {name: m.base_name for m in MODEL_MODULES for name in (m.weight, m.base_name)},
    b"layers": {m.weight: m.base_name for m in LAYER_MODULES},
    b"blk": {m.base_name.rpartition(".")[2]: m.base_name for m in LAYER_MODULES},
}
"""GGUF base name of each weight by how its name in the file begins, then by the rest of that name."""
_ONLY_FINETUNE: Final = re.compile(r"(?:token_embd|output_norm|blk\.\d+\.(?:attn|ffn)_norm)\.weight\..*", re.ASCII)
"""GGUF names of what convert-lora-to-ggml.py could not write."""
_SIZES: Final = {int(gguf.GGMLQuantizationType.F32): 4, int(gguf.GGMLQuantizationType.F16): 2}  # bytes of an element


class _Records(NamedTuple):
    """All records of a file, in its order."""

    names: tuple[str, ...]
    """GGUF names."""
    n_layer: int
    numbers: npt.NDArray[np.int64]
    """(n, 5): byte offset of the record and of its data, both dims, and the type, a `gguf.GGMLQuantizationType`."""


def read(source: Source, engine: Engine = "auto") -> Checkpoint:  # noqa: ARG001 - nothing is swept here
    """Read the ggla file that `source` holds; raises as `readers.open_checkpoint` does."""
    rank, alpha = _header(source)
    names, n_layer, numbers = _read_records(source, rank)
    by_finetune = any(map(_ONLY_FINETUNE.fullmatch, names))
    if by_finetune:
        ranks, dims = _whole(source, names, n_layer, numbers)
    shown, offsets = _decoded(source, numbers)
    table = tensor_table(offsets, numbers[:, 2:4], 2)
    table["record"] = numbers[:, 0]
    if not by_finetune:
        ranks, dims = infer(names, table)
    checkpoint = Checkpoint(
        shown,
        model_parameters(dims, n_layer),
        ranks,
        Training(0, 0, 0),
        None,
        names,
        table,
        (),
        format="ggla",
        scale=alpha / rank,
        arch=ARCH if by_finetune else None,
        rows="gguf" if by_finetune else "hf",
        partial=not by_finetune,
    )  # fmt: skip
    checkpoint.pairs  # noqa: B018 - whole only if each pair is
    return checkpoint


def _whole(
    source: Source, names: tuple[str, ...], n_layer: int, numbers: npt.NDArray[np.int64]
) -> tuple[dict[str, int], dict[str, int]]:
    """Hold that a file of finetune's has every tensor, and return ranks and dims."""
    ne = numbers[:, 2:4]
    rows = {name: row for row, name in enumerate(names)}
    padded = np.column_stack([ne, np.ones_like(ne)])
    tensors = NamedTensors(source, rows, padded, numbers[:, 0] + RECORD.itemsize)
    tensors.refuse_others(tensors.lora_names(n_layer, "finetune wrote all of them; the file may be cut short"))
    ranks, dims = _infer(tensors, n_layer)
    tensors.check_lora_dims(n_layer, ranks, dims)
    return ranks, dims


def _decoded(source: Source, numbers: npt.NDArray[np.int64]) -> tuple[Source, npt.NDArray[np.int64]]:
    """Return what shows all tensors as float32, and where: the source itself where they are."""
    if not numbers[:, 4].any():
        return source, numbers[:, 1]
    tensors = [
        EncodedTensor(offset, _SIZES[type] * ne0 * ne1, gguf.GGMLQuantizationType(type), (ne1, ne0), False)
        for _, offset, ne0, ne1, type in numbers.tolist()
    ]
    shown = Decoded(source, tensors)
    return shown, np.array(shown.offsets, np.int64)


def _header(source: Source) -> tuple[int, int]:
    """Read the fixed header and return lora_r and lora_alpha."""
    data = read_at(source, 0, GGLA_HEADER.itemsize)
    if len(data) < GGLA_HEADER.itemsize:
        raise TruncatedError(
            source=source.name, field="header", offset=0, expected=f"{GGLA_HEADER.itemsize} bytes", found=len(data)
        )
    _, version, rank, alpha = np.frombuffer(data, GGLA_HEADER)[0].item()
    for field, offset, good, expected, number in (
        ("version", 4, version == GGLA_VERSION, f"{GGLA_VERSION}, the only one ever written", version),
        ("lora_r", 8, rank > 0, "at least 1", rank),
        ("lora_alpha", 12, alpha > 0, "at least 1", alpha),
    ):
        if not good:
            raise CheckpointError(source=source.name, field=field, offset=offset, expected=expected, found=number)
    return rank, alpha


def _read_records(source: Source, rank: int) -> _Records:
    """Walk the records up to the end of the file."""
    names: dict[str, None] = {}
    numbers = array("q")
    n_layer = 0
    position = GGLA_HEADER.itemsize
    prediction = Prediction(rank) if source.far else None
    while position < source.size:
        if prediction is not None:
            prediction.serve(source, len(names), position)
        name, layer, record, head = _read_record(source, len(names), position)
        if not names and not _ONLY_FINETUNE.match(name):
            prediction = None  # another order, of modules that nobody knows
        if name in names:
            raise CheckpointError(
                "the tensor is there twice", source=source.name, tensor=name, index=len(names), offset=position
            )
        if prediction is not None:
            prediction.learn(len(names), head, record)
        names[name] = None
        n_layer = max(n_layer, layer + 1)
        numbers.extend(record)
        position = record[1] + _SIZES[record[4]] * record[2] * record[3]
    if not names:
        raise CheckpointError(
            "there is no tensor in it; the file may be cut short", source=source.name, offset=position
        )
    return _Records(tuple(names), n_layer, np.array(numbers, np.int64).reshape(-1, 5))


def _read_record(source: Source, index: int, position: int) -> tuple[str, int, tuple[int, ...], int]:
    """Read the record at `position`: GGUF name, layer (-1 for none), row of `_Records.numbers`, bytes with its name."""
    start, window = source.window(position)
    head, ne0, ne1, name_len, type = _read_head(source, index, position, window[position - start :])
    at = position + head
    raw = bytes(window[at - start : at - start + name_len])
    known = _gguf_name(raw)
    if known is None:
        expected = "the name of a LoRA tensor, such as 'blk.0.attn_q.weight.loraA'"
        _fault(CheckpointError, source, index, "name", at, expected, f"'{printable(raw)}'")
    data = -(-(at + name_len) // ALIGNMENT) * ALIGNMENT
    nbytes = _SIZES[type] * ne0 * ne1
    if data + nbytes > source.size:
        raise TruncatedError(
            source=source.name, tensor=known[0], index=index, field="data", offset=data, expected=f"{nbytes} bytes",
            found=max(0, source.size - data),
        )  # fmt: skip
    return *known, (position, data, ne0, ne1, type), head + name_len


def _read_head(source: Source, index: int, position: int, window: memoryview) -> tuple[int, int, int, int, int]:
    """Read what stands before the name of a record: how long that is, both dims, length of the name, and the type."""
    left = source.size - position
    at = RECORD.itemsize
    if left < at:
        _fault(TruncatedError, source, index, "head", position, f"{at} bytes", left)
    n_dims, name_len, dtype = np.frombuffer(window, RECORD, 1)[0].item()
    if n_dims not in _N_DIMS:
        _fault(CheckpointError, source, index, "n_dims", position, 2, n_dims)
    if dtype not in _SIZES:
        _fault(CheckpointError, source, index, "dtype", position + 8, "0 (float32) or 1 (float16)", dtype)
    head = at + 4 * n_dims
    if left < head:
        _fault(TruncatedError, source, index, "dims", position + at, f"{head - at} bytes", left - at)
    ne0, ne1 = (*np.frombuffer(window, "<u4", n_dims, at).tolist(), 1)[:2]
    if ne0 == 0 or ne1 == 0:
        _fault(CheckpointError, source, index, "dims", position + at, "at least 1 each", (ne0, ne1))
    if name_len > _LONGEST_NAME:
        _fault(CheckpointError, source, index, "name length", position + 4, f"at most {_LONGEST_NAME}", name_len)
    if left < head + name_len:
        _fault(TruncatedError, source, index, "name", position + head, f"{name_len} bytes", left - head)
    return head, ne0, ne1, name_len, dtype


def _fault(
    error: type[CheckpointError], source: Source, index: int, field: str, offset: int, expected: object, found: object
) -> NoReturn:
    """Raise that something is wrong with a record of which the name is not known yet."""
    where = f"record {index} {field}"
    raise error(source=source.name, index=index, field=where, offset=offset, expected=expected, found=found)


def _gguf_name(raw: bytes) -> tuple[str, int] | None:
    """Return the GGUF name and the layer (-1 for none) of a tensor named `raw` in the file; None for no such name."""
    match = _NAME.fullmatch(raw)
    if match is None:
        return None
    prefix, layer, weight, end = match.groups()
    base_name = _WEIGHTS[prefix].get(weight.decode())
    if base_name is None and prefix != b"blk":
        return None
    base_name = base_name or f"blk.{{bid}}.{weight.decode()}"  # of another architecture
    name = f"{base_name.format(bid=(layer or b'').decode())}.weight.lora_{end.decode().lower()}"
    return name, int(layer) if layer else -1


def _infer(tensors: NamedTensors, n_layer: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return ranks and dims as the tensors of the model and of its first layer have them; 0 where there is no layer."""

    def ne(base_name: str, end: str) -> list[int]:
        row = tensors.rows[f"{base_name.format(bid=0)}.weight.lora_{end}"]
        return [int(dim) for dim in tensors.ne[row, :2]]

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
