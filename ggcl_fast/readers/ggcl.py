"""Reading a ggcl file: bytes in, `Checkpoint` out.

Nothing that the file says is believed before it is compared with what the file has: no count is used to allocate
before `predict.smallest` has shown that it can be true.  The sweep finds where a record is wrong; `_explain`
reads that record once more, slowly, and says what is wrong, so that every such message is made in one place.
"""

from __future__ import annotations

import math
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from ..checkpoint import Adam, Checkpoint, Lbfgs, ModelParameters, Optimizer, Training
from ..errors import CheckpointError, TruncatedError, printable
from ..formats.layout import (
    ADAM_END,
    ALIGNMENT,
    GGCL_VERSION,
    HEADER,
    LBFGS_END,
    OPTIMIZER,
    OPTIMIZER_VERSION,
    RECORD,
    TENSOR,
)
from ..formats.schema import N_FF, OPTIMIZER_TENSORS, n_records, schemas
from ..storage.sources import Source, read_at
from .engine import Engine, check_engine, pick_engine, walk
from .predict import RANKS, Shape, joined, known, predict_in, predict_state, prove, smallest

__all__ = ["read", "written_n_ff"]

_END: Final = {"adam": ADAM_END, "lbfgs": LBFGS_END}
_TITLE: Final = {"adam": "Adam", "lbfgs": "L-BFGS"}
_NO_NAMES: Final = np.zeros(0, np.uint32)
_LARGEST_NAME_SHOWN: Final = 256


def read(source: Source, engine: Engine = "auto") -> Checkpoint:
    """Read the ggcl file that `source` holds; raises as `readers.open_checkpoint` does."""
    header, shape = _header(source)
    n_lora = n_records(header["n_layer"])
    check_engine(engine)
    predicts = engine != "numba"
    chosen = None if predicts else pick_engine(engine, n_lora)

    # Piece by piece: a file that lies is found out before the next one.
    pieces: list[tuple[tuple[str, ...], npt.NDArray[np.void]]] = []
    n_found = 0
    renamed: list[str] = []  # what the first one ought to be called
    position, gguf, n_ff = HEADER.itemsize, 0, 0
    for lora in schemas(header["n_layer"]):
        prediction = None
        if predicts or source.far:
            prediction = predict_in(source, lora, shape, header["n_layer"], position=position, gguf=gguf, n_ff=n_ff)
        if prediction is not None and source.far:
            source.prefetch([*prediction.table["record"].tolist(), prediction.position])
        if prediction is not None and predicts and prove(source, prediction):
            pieces.append((lora.names, prediction.table))
            position, gguf, n_ff = prediction.position, prediction.gguf, prediction.n_ff
        else:
            chosen = chosen or pick_engine(engine, n_lora - n_found)
            expected = shape.expected(lora)
            pieces.append((lora.names, table := np.zeros(len(expected), TENSOR)))
            index, position, gguf, n_ff = walk(
                source, expected, lora.name_words, table, position=position, gguf=gguf, n_ff=n_ff, engine=chosen
            )
            if index < len(expected):
                _explain(source, n_found + index, lora.names[index], expected[index], position, n_ff)
            renamed = renamed or [lora.source_name(int(row)) for row in np.flatnonzero(table["renamed"])[:1]]
        n_found += len(lora.names)

    n_elements = sum(int(table["nbytes"].sum()) for _, table in pieces) // 4
    fixed = _optimizer_header(source, position, n_elements)
    name = _which_optimizer(source, position, fixed)
    position += OPTIMIZER.itemsize
    dims = tuple(map(tuple, _optimizer_ne(name, fixed)))
    predicted = predict_state(dims, position=position, gguf=gguf)
    state = predicted.table
    if predicts and prove(source, predicted):
        position = predicted.position
    else:
        expected, state = _optimizer_records(dims), np.zeros(len(dims), TENSOR)
        index, position, _, _ = walk(
            source, expected, _NO_NAMES, state, position=position, gguf=gguf, engine=chosen or "python"
        )
        if index < len(dims):
            tensor = f"optimizer.{name}.{OPTIMIZER_TENSORS[name][index][0]}"
            _explain(source, n_lora + index, tensor, expected[index], position, 0)

    if len(pieces) == 1 and prediction is not None and pieces[0][1] is prediction.table and state is predicted.table:
        names, table = known(lora, prediction, name, predicted)
    else:
        names, table = joined(pieces, name, state)
    warnings = (_renamed_warning(source, renamed[0], table[:n_lora]),) if renamed else ()
    return Checkpoint(
        source,
        ModelParameters(
            **{name: header[name] for name in _PARAMETERS},
            n_ff=n_ff or written_n_ff(header),
            n_head_kv=header["n_head"],
        ),
        shape.ranks_by_name,
        Training(header["train_its"], header["train_samples"], header["train_tokens"]),
        _optimizer(source, name, fixed, position),
        names,
        table,
        warnings,
    )


_PARAMETERS: Final = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot")


def _fields(source: Source, dtype: np.dtype[np.void], offset: int, what: str) -> dict[str, Any]:
    """Decode one fixed record; `TruncatedError` where the file ends before it does."""
    data = read_at(source, offset, dtype.itemsize)
    if len(data) < dtype.itemsize:
        raise TruncatedError(
            source=source.name, field=what, offset=offset, expected=f"{dtype.itemsize} bytes", found=f"{len(data)}"
        )
    return dict(zip(dtype.names or (), np.frombuffer(data, dtype, 1)[0].item()))


def _refuse(
    source: Source, dtype: np.dtype[np.void], start: int, field: str, expected: str, found: dict[str, Any], of: str = ""
) -> NoReturn:
    """Raise that `field` of the fixed record at `start` has a value that it cannot have."""
    assert dtype.fields is not None  # a fixed record
    offset = start + dtype.fields[field][1]
    raise CheckpointError(source=source.name, field=of + field, offset=offset, expected=expected, found=found[field])


def _header(source: Source) -> tuple[dict[str, int], Shape]:
    """Read the fixed header and hold its numbers against each other and against the size of the file."""
    header = _fields(source, HEADER, 0, "header")
    if header["version"] != GGCL_VERSION:
        _refuse(source, HEADER, 0, "version", f"{GGCL_VERSION}, the only one ever written", header)
    shape = Shape(header["n_vocab"], header["n_embd"], tuple(map(header.__getitem__, RANKS)))
    if not (shape.n_vocab and shape.n_embd and all(shape.ranks)):
        field = next(field for field in ("n_vocab", "n_embd", *RANKS) if header[field] == 0)
        _refuse(source, HEADER, 0, field, "at least 1", header)

    needed = HEADER.itemsize + smallest(shape, header["n_layer"])
    if needed > source.size:
        raise TruncatedError(
            "the header announces more than the file holds", source=source.name, field="header", offset=0,
            expected=f"at least {needed} bytes", found=source.size,
        )  # fmt: skip
    return header, shape


def written_n_ff(header: dict[str, int]) -> int:
    """Return the feed-forward length that the writer computed: all there is to go by in a file without layers."""
    n_mult = header["n_mult"] or 1
    return -(-(2 * (4 * header["n_embd"]) // 3) // n_mult) * n_mult


def _optimizer_header(source: Source, position: int, n_elements: int) -> dict[str, int]:
    """Read the fixed part of the optimizer state."""
    fixed = _fields(source, OPTIMIZER, position, "optimizer header")
    if fixed["version"] != OPTIMIZER_VERSION:
        _refuse(source, OPTIMIZER, position, "version", str(OPTIMIZER_VERSION), fixed, "optimizer ")
    for field in ("past", "lbfgs_m", "iter"):
        if fixed[field] < 0:
            _refuse(source, OPTIMIZER, position, field, "at least 0", fixed, "optimizer ")
    if fixed["nx"] != n_elements:
        expected = f"{n_elements}, the number of LoRA elements"
        _refuse(source, OPTIMIZER, position, "nx", expected, fixed, "optimizer ")
    return fixed


def _optimizer_ne(name: str, fixed: dict[str, int]) -> list[list[int]]:
    """Return the dims of each of the optimizer's records; an absent one has none."""
    dims = ([fixed[dim] for dim in dims] for _, dims in OPTIMIZER_TENSORS[name])
    return [ne if ne[0] else [] for ne in dims]


def _optimizer_records(dims: tuple[tuple[int, ...], ...]) -> npt.NDArray[np.int64]:
    """Return what `sweep.sweep` expects of the optimizer's records, of these dims."""
    expected = np.zeros((len(dims), 5), np.int64)
    expected[:, 2] = 1
    for row, ne in enumerate(dims):
        expected[row, 0] = len(ne)
        expected[row, 1 : 1 + len(ne)] = ne
    return expected


def _end_of(name: str, position: int, fixed: dict[str, int]) -> int:
    """Return the size that a file with optimizer `name` would have, in Python integers."""
    position += OPTIMIZER.itemsize
    for ne in _optimizer_ne(name, fixed):
        position = -(-(position + RECORD.itemsize + 4 * len(ne)) // ALIGNMENT) * ALIGNMENT
        position += 4 * math.prod(ne) if ne else 0
    return position + _END[name].itemsize


def _which_optimizer(source: Source, position: int, fixed: dict[str, int]) -> str:
    """Tell the optimizer from where the file of each candidate would end.

    The file does not name its optimizer, but it ends exactly behind the closing record, and the sizes of all records
    follow from `fixed`.  L-BFGS state is always longer than Adam's of the same numbers, so at most one fits.  Its
    records have no names; one that has moves all behind it by 32 bytes or more, past the end.
    """
    ends = {name: _end_of(name, position, fixed) for name in _END if name == "adam" or fixed["lbfgs_m"] > 0}
    for name, end in ends.items():
        if end == source.size:
            return name
    error = TruncatedError if source.size < ends["adam"] else CheckpointError
    raise error(
        "the file's end fits no optimizer", source=source.name, field="optimizer state", offset=position,
        expected="a file of " + " or ".join(f"{end} bytes ({_TITLE[name]})" for name, end in ends.items()),
        found=source.size,
    )  # fmt: skip


def _optimizer(source: Source, name: str, fixed: dict[str, int], position: int) -> Optimizer:
    """Read the closing record."""
    end = _fields(source, _END[name], position, f"{name} state")
    stalled = end["n_no_improvement"]
    if stalled < 0:
        _refuse(source, _END[name], position, "n_no_improvement", "at least 0", end, f"{name} ")
    common = (fixed["past"], fixed["nx"], fixed["iter"], fixed["just_initialized"] != 0)
    if name == "adam":
        return Adam(*common, end["fx_best"], end["fx_prev"], stalled)
    return Lbfgs(
        *common, fixed["lbfgs_m"], end["fx_best"], end["step"],
        end["j"], end["k"], end["end"], stalled,
    )  # fmt: skip


def _explain(
    source: Source, index: int, name: str, expected: npt.NDArray[np.int64], position: int, n_ff: int
) -> NoReturn:
    """Decode the record at `position`, where the sweep stopped, and raise what is wrong with it."""

    def fault(error: type[CheckpointError], field: str, offset: int, expected: object, found: object) -> NoReturn:
        raise error(
            source=source.name, tensor=name, index=index, field=field, offset=offset, expected=expected, found=found
        )

    data = read_at(source, position, RECORD.itemsize)
    if len(data) < RECORD.itemsize:
        fault(TruncatedError, "record", position, f"{RECORD.itemsize} bytes", len(data))
    n_dims, name_len, dtype = (int(word) for word in np.frombuffer(data, "<u4"))
    expected_dims, ne0, ne1 = (int(number) for number in expected[:3])
    if n_dims != expected_dims:
        fault(CheckpointError, "n_dims", position, expected_dims, n_dims)
    if dtype != 0:
        fault(CheckpointError, "dtype", position + 8, "0 (float32)", dtype)
    at = position + RECORD.itemsize
    data = read_at(source, at, 4 * n_dims)
    if len(data) < 4 * n_dims:
        fault(TruncatedError, "dims", at, f"{4 * n_dims} bytes", len(data))
    dims = tuple(int(word) for word in np.frombuffer(data, "<u4"))
    right = (ne0, (n_ff or "n_ff") if ne1 == N_FF else ne1)[:n_dims]
    if dims != right and not (right[-1:] == ("n_ff",) and dims[0] == ne0 and dims[1] > 0):
        fault(CheckpointError, "dims", at, str(right).replace("'", ""), dims)
    at += 4 * n_dims
    if name_len > source.size - at:
        fault(TruncatedError, "name", at, f"{name_len} bytes", f"{source.size - at}")
    at += name_len
    padding = -at % ALIGNMENT
    if padding > source.size - at:
        fault(TruncatedError, "padding", at, f"{padding} bytes", f"{source.size - at}")
    at += padding
    nbytes = 4 * math.prod(dims) if dims else 0
    fault(TruncatedError, "data", at, f"{nbytes} bytes", f"{source.size - at}")


def _renamed_warning(source: Source, expected: str, table: npt.NDArray[np.void]) -> str:
    """Tell of tensors whose names are not those that finetune wrote; they are taken by position all the same."""
    renamed = np.flatnonzero(table["renamed"])
    first = int(renamed[0])
    record = int(table["record"][first])
    name_len = int(np.frombuffer(read_at(source, record, RECORD.itemsize), RECORD)[0]["name_len"])
    name = bytes(read_at(source, record + RECORD.itemsize + 8, min(name_len, _LARGEST_NAME_SHOWN)))
    return (
        f"{len(renamed)} of {len(table)} tensors have unexpected names and were taken by their position; "
        f"the first is tensor {first}, at offset {record} ({record:#x}): expected '{expected}', "
        f"found '{printable(name)}'"
    )
