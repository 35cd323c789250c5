"""What becomes of a number when it is written: a scale, the delta of a pair, a type with fewer bits.

- A scale multiplies in float64, and is rounded to float32 once.
- A delta ``b @ a.T`` and its sum with a weight are float32.
- NaN and infinite values are carried over, without a word.  A finite value that would become something else, whatever
  the type, is an error that names tensor and type: the file would load and answer nonsense.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError

__all__ = ["TYPES", "Floats", "knows", "quantized", "scaled", "with_delta"]

Floats = npt.NDArray[np.float32]
_Type = gguf.GGMLQuantizationType

TYPES: Final = {"f32": _Type.F32, "f16": _Type.F16, "bf16": _Type.BF16}
"""Types of floats by the names that users know."""

_LARGEST_F16: Final = 65504.0
_LARGEST: Final = {
    _Type.F32: "at most 3.4e+38",
    _Type.F16: "at most 65504",
    _Type.BF16: "at most 3.39e+38",
}
_LARGEST_BLOCK: Final = "blocks whose scales are at most 65504"


def scaled(values: Floats, scale: float, *, source: str, tensor: str) -> Floats:
    """Return ``scale * values``, as it stands where the scale is 1.

    Raises
    ------
    CheckpointError
        A finite value would become infinite; `source` and `tensor` are what the message names.
    """
    if scale == 1.0:
        return values
    with np.errstate(all="ignore"):
        result: Floats = np.multiply(values, scale, dtype=np.float64).astype(np.float32)
    if (np.isfinite(values) & ~np.isfinite(result)).any():
        raise _overflow(_Type.F32, source, tensor, _largest(values) * abs(scale))
    return result


def with_delta(weights: Floats, b: Floats, a: Floats, *, source: str, tensor: str) -> Floats:
    """Return ``weights + b @ a.T``.

    Parameters
    ----------
    weights
        (n_out, n_in), or some of its rows.
    b, a
        (n_out, rank), or the same rows of it, with the scale in it; (n_in, rank).

    Raises
    ------
    CheckpointError
        Finite values would become something else; `source` and `tensor` are what the message names.
    """
    with np.errstate(all="ignore"):
        result: Floats = b @ a.T
        result += weights
    finite: npt.NDArray[np.bool_] = np.isfinite(result)
    if not finite.all():
        rows, columns = np.isfinite(b).all(axis=1, keepdims=True), np.isfinite(a).all(axis=1, keepdims=True)
        lost: npt.NDArray[np.bool_] = ~finite & rows & columns.T & np.isfinite(weights)
        if lost.any():
            row, column = (int(index[0]) for index in np.nonzero(lost))
            terms = np.cumsum(b[row].astype(np.float64) * a[column])
            found = max(np.abs(terms).max(), abs(terms[-1] + weights[row, column]))
            raise _overflow(_Type.F32, source, tensor, float(found))
    return result


def quantized(values: Floats, type: _Type, *, source: str, tensor: str) -> npt.NDArray[Any]:
    """Return `values` in another type, contiguous: float32, float16, or bytes.

    Raises
    ------
    CheckpointError
        A finite value would become something else; `source` and `tensor` are what the message names.
    """
    values = np.ascontiguousarray(values)
    with np.errstate(all="ignore"):
        # gguf takes 16 rows at a time, and those of B are short: where blocks do not end with rows, one row has all.
        rows = values.reshape(1, -1) if gguf.GGML_QUANT_SIZES[type][0] == 1 else values
        result = np.ascontiguousarray(gguf.quants.quantize(rows, type)).reshape(*values.shape[:-1], -1)
        if type != _Type.F32 and values.size and not _is_small(values):
            # No block has a scale above its largest value, so that only larger values than F16's can come to harm.
            block, _ = gguf.GGML_QUANT_SIZES[type]
            before = np.isfinite(values).reshape(-1, block).all(axis=1)
            after = np.isfinite(_floats(result, type)).reshape(-1, block).all(axis=1)
            if (before & ~after).any():
                raise _overflow(type, source, tensor, _largest(values))
    return result


def _is_small(values: Floats) -> bool:
    """Tell whether F16 has room for every value; NaN has none."""
    return bool(values.max() <= _LARGEST_F16 and values.min() >= -_LARGEST_F16)


def _floats(written: npt.NDArray[Any], type: _Type) -> npt.NDArray[Any]:
    return written if type == _Type.F16 else gguf.quants.dequantize(written, type)


def _largest(values: Floats) -> float:
    """Return the largest finite magnitude."""
    return float(np.abs(values[np.isfinite(values)]).max())


def _overflow(type: _Type, source: str, tensor: str, found: float) -> CheckpointError:
    return CheckpointError(
        f"a value is too large for {type.name}", source=source, tensor=tensor, field="data",
        expected=_LARGEST.get(type, _LARGEST_BLOCK), found=found,
    )  # fmt: skip


@functools.cache
def knows(function: object, type: _Type) -> bool:
    """Tell whether gguf's `quantize` or `dequantize` has an implementation for `type`, by its smallest example."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    try:
        if function is gguf.quants.quantize:
            gguf.quants.quantize(np.zeros((1, block), np.float32), type)
        else:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), type)
    except NotImplementedError:
        return False
    return True
