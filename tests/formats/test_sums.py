"""Sums of weights and deltas: every kernel in both lives, held against numpy and gguf.quants, bit by bit."""

import functools
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from ggcl_fast.formats import sums

from ..engines import needs_numba

Type = gguf.GGMLQuantizationType
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
TYPES = pytest.mark.parametrize("type", sums.LARGEST, ids=lambda type: type.name)
PLAIN = {type: sums.on_bytes(kernel, type) for type, kernel in sums.kernels().items()}
LARGEST_HALF = np.float32(65504)


def words(*some: int) -> Floats:
    return np.array(some, np.uint32).view(np.float32)


def locked(values: Any) -> Bytes:
    data: Bytes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy()
    data.flags.writeable = False
    return data


def expected(rows: Bytes, delta: Floats, type: Type) -> Bytes:
    """What numpy and gguf make of it."""
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(rows.reshape(1, -1), type)
        total = delta.reshape(1, -1) + weights
        return np.ascontiguousarray(gguf.quants.quantize(total, type)).reshape(-1).view(np.uint8)


@functools.cache
def by_bits(type: Type) -> sums.Kernel:
    """The compiled kernel where the processor converts no halves."""
    import numba

    return sums.on_bytes(sums.kernels(numba.njit(nogil=True, error_model="numpy"))[type], type)


def compare(rows: Bytes, delta: Floats, type: Type, *, plain: bool = True) -> None:
    """Hold that both lives give the same bits as numpy, and tell the largest magnitude."""
    with np.errstate(all="ignore"):
        total = delta + gguf.quants.dequantize(rows.reshape(1, -1), type).reshape(-1)
    largest = int(np.abs(total).max().view(np.uint32)) if len(total) else 0
    for kernel in (sums.compiled(type), by_bits(type)):
        out = np.empty(len(rows), np.uint8)
        assert kernel(rows, delta, out) == largest
        np.testing.assert_array_equal(out, expected(rows, delta, type))
    if plain:
        with np.errstate(all="ignore"):
            again = np.empty_like(out)
            assert PLAIN[type](rows, delta, again) == largest
        np.testing.assert_array_equal(again, out)


def boundaries(n_bits: int) -> Iterator[Floats]:
    """Halves, or the upper halves of floats, what lies exactly between two of them, and one bit beside that."""
    if n_bits == 13:
        near = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
        between = (near[:-1].astype(np.float64) + near[1:]) / 2
        middle = between.astype(np.float32)
        assert (middle == between).all()
    else:
        near = (np.arange(0x7F7F, dtype=np.uint32) << 16).view(np.float32)
        middle = (near.view(np.uint32) | 0x8000).view(np.float32)
    for some in (near, middle):
        bits = some.view(np.uint32)
        for step in (-1, 0, 1):
            beside = (bits[1:-1].astype(np.int64) + step).astype(np.uint32).view(np.float32)
            yield beside
            yield -beside


@needs_numba
def test_every_finite_half_is_read_and_written_as_it_is() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    finite = halves[np.isfinite(halves.view(np.float16))]
    compare(locked(finite), np.full(len(finite), -0.0, np.float32), Type.F16)
    compare(locked(finite), np.zeros(len(finite), np.float32), Type.F16, plain=False)


@needs_numba
@pytest.mark.parametrize(("type", "n_bits"), [(Type.F16, 13), (Type.BF16, 16)])
def test_every_boundary_of_rounding(type: Type, n_bits: int) -> None:
    for delta in boundaries(n_bits):
        zeros = locked(np.full(len(delta), 0x8000, np.uint16))  # -0, to which anything can be added unchanged
        compare(zeros, delta, type, plain=False)


@needs_numba
@TYPES
def test_random_blocks(type: Type) -> None:
    rng = np.random.default_rng(7)
    for size in (1e-3, 1.0, 300.0):
        weights = (rng.standard_normal((1, 8192)) * size).astype(np.float32)
        weights[0, ::97] = 0
        rows = locked(gguf.quants.quantize(weights, type))
        for relative in (0.0, 1e-3, 1.0):
            delta = (rng.standard_normal(8192) * size * relative).astype(np.float32)
            compare(rows, delta, type, plain=False)
            part = len(rows) // 32
            compare(rows[:part], delta[:256], type)


@needs_numba
@TYPES
def test_any_bits_of_a_block(type: Type) -> None:
    """Scales and weights of any kind; what is not sound is told and needs no sum."""
    rng = np.random.default_rng(8)
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    n = -(-64 // block)
    n_sound = 0
    for turn in range(3000):
        kernel = (sums.compiled, by_bits)[turn % 2](type)
        rows = locked(rng.integers(0, 256, n * block_bytes, dtype=np.uint8))
        delta = rng.integers(0, 1 << 32, n * block, dtype=np.uint32).view(np.float32)
        if rng.random() < 0.8:
            delta = (rng.standard_normal(n * block) * 10.0 ** rng.integers(-38, 6)).astype(np.float32)
        out = np.empty(len(rows), np.uint8)
        if kernel(rows, delta, out) <= sums.LARGEST[type]:
            n_sound += 1
            np.testing.assert_array_equal(out, expected(rows, delta, type))
    assert n_sound > 300


@needs_numba
@TYPES
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_odd_is_told(type: Type, odd: float) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    n = 64 // block
    rows, delta = locked(np.zeros(n * block_bytes, np.uint8)), np.zeros(64, np.float32)
    delta[37] = odd
    for kernel in (sums.compiled(type), by_bits(type)):
        told = kernel(rows, delta, np.empty(len(rows), np.uint8)) > sums.LARGEST[type]
        assert told == (type != Type.F32 or not np.isfinite(odd))


@needs_numba
@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q8_0])
def test_signs_of_zeros_and_of_equal_magnitudes(type: Type) -> None:
    _, block_bytes = gguf.GGML_QUANT_SIZES[type]
    rows = locked(np.zeros(block_bytes, np.uint8))
    for values in ((0.0,), (-0.0,), (-0.0, 0.0), (0.0, -0.0), (1.0, -1.0), (-1.0, 1.0), (0.5, -1.0, 1.0)):
        delta = np.resize(np.array(values, np.float32), 32)
        compare(rows, delta, type)


@needs_numba
def test_scales_too_small_to_divide_by_are_told() -> None:
    for type in (Type.Q4_0, Type.Q8_0):
        _, block_bytes = gguf.GGML_QUANT_SIZES[type]
        rows, delta = locked(np.zeros(block_bytes, np.uint8)), np.full(32, 1e-40, np.float32)
        assert sums.compiled(type)(rows, delta, np.empty(len(rows), np.uint8)) > sums.LARGEST[type]


@needs_numba
@pytest.mark.skipif(sys.platform == "linux" and "f16c" not in Path("/proc/cpuinfo").read_text(), reason="it cannot")
def test_the_processor_converts_halves_where_it_can() -> None:
    import numba

    assert (sums._processors_halves() is not None) == (platform.machine() in ("x86_64", "AMD64"))
    for name, value in (("CPU_NAME", "generic"), ("CPU_FEATURES", ""), ("ENABLE_AVX", 0)):
        with mock.patch.object(numba.config, name, value):
            assert sums._processors_halves() is None


@TYPES
def test_what_a_kernel_is_good_for_is_what_the_type_has_room_for(type: Type) -> None:
    largest = words(sums.LARGEST[type])[0]
    with np.errstate(over="ignore"):
        written = gguf.quants.quantize(np.full((1, 32), largest), type)
        assert np.isfinite(gguf.quants.dequantize(written, type)).all()
