"""What becomes of a number when it is written."""

import math
import warnings
from typing import Any

import gguf
import numpy as np
import pytest

from ggcl_fast import CheckpointError
from ggcl_fast.formats.numbers import TYPES, knows, quantized, scaled, with_delta

Type = gguf.GGMLQuantizationType
NAMES: dict[str, Any] = {"source": "in.ggcl", "tensor": "x"}
BLOCKS = [one for one in Type if one in gguf.GGML_QUANT_SIZES and knows(gguf.quants.quantize, one)]
TOO_LARGE = {Type.F16: 65520.0, Type.BF16: 3.4e38, Type.Q8_0: 1e7, Type.Q4_0: 1e7, Type.Q4_1: 2e6, Type.Q5_1: 1e7}


def values(*some: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.resize(np.array(some, np.float32), (2, 512))


@pytest.mark.parametrize("type", BLOCKS)
def test_what_fits_f16_fits_every_type(type: Type) -> None:
    for some in (values(0, 1, -2), values(65504, -65504), values(1e-30)):
        written = quantized(some, type, **NAMES)
        floats = written if written.dtype.kind == "f" else gguf.quants.dequantize(written, type)
        assert np.isfinite(floats).all()


@pytest.mark.parametrize("type", TOO_LARGE)
def test_an_overflow_is_an_error_whatever_the_type(type: Type) -> None:
    for some in (values(TOO_LARGE[type]), values(0, -TOO_LARGE[type])):
        with pytest.raises(CheckpointError, match=rf"in\.ggcl: tensor 'x': data: a value is too large for {type.name}"):
            quantized(some, type, **NAMES)


@pytest.mark.parametrize("type", BLOCKS)
def test_what_is_not_finite_is_carried_over_without_a_word(type: Type) -> None:
    some = values(1)
    some[0, 0], some[0, 1] = math.nan, math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = quantized(some, type, **NAMES)
    if type in TYPES.values():
        floats = written if written.dtype.kind == "f" else gguf.quants.dequantize(written, type)
        assert math.isnan(floats[0, 0])
        assert floats[0, 1] == math.inf


def test_a_scale_multiplies_in_float64_and_rounds_once() -> None:
    """Bytes must not depend on the version of numpy: 1.26 multiplied by a Python float in float32."""
    b = np.linspace(-3, 3, 4096, dtype=np.float32)
    for scale in (16 / 3, 1 / 3, 0.1, 7 / 11):
        expected = np.array([np.float32(float(value) * scale) for value in b.tolist()], np.float32)
        assert scaled(b, scale, **NAMES).tobytes() == expected.tobytes()
        assert scaled(b, scale, **NAMES).dtype == np.float32
    assert (np.float32(16 / 3) * b != scaled(b, 16 / 3, **NAMES)).any()
    assert scaled(b, 1.0, **NAMES) is b


def test_a_scale_that_overflows_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="a value is too large for F32: expected at most"):
        scaled(values(1e38), 16.0, **NAMES)
    assert np.isinf(scaled(values(math.inf), 16.0, **NAMES)).all()


def test_a_delta_that_overflows_is_an_error() -> None:
    one, large = np.ones((3, 2), np.float32), np.full((2, 2), 1e30, np.float32)
    weights = np.zeros((3, 2), np.float32)
    with pytest.raises(CheckpointError, match="a value is too large for F32"):
        with_delta(weights, 1e10 * one, large, **NAMES)
    with pytest.raises(CheckpointError, match="a value is too large for F32"):
        with_delta(weights + np.float32(3e38), one * np.float32(1e8), large, **NAMES)


def test_a_delta_of_nan_is_one_of_its_rows_and_columns_only() -> None:
    b, a, weights = np.ones((3, 2), np.float32), np.ones((4, 2), np.float32), np.ones((3, 4), np.float32)
    b[0, 0], a[1, 0], weights[2, 2] = math.nan, math.inf, -math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = with_delta(weights, b, a, **NAMES)
    assert np.isfinite(result).tolist() == [[False] * 4, [True, False, True, True], [True, False, False, True]]
    assert result[1, 0] == 3
