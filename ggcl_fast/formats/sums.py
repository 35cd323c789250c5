"""Sums of weights and deltas, in the type that the weights have: what merging spends its time on.

A kernel takes the bytes of some rows and their delta, ``b @ a.T``, and gives the bytes of the sums, rounded as gguf and
numpy round them.  `kernels` has them as plain functions, with two lives as `sweep.sweep` has: interpreted as they
stand, and compiled by numba, for one type at a time.

They are for what is sound.  Each tells the largest magnitude that it met, as the bits of a float32, and where that is
more than `LARGEST` the rows are added once more by `numbers`, which has a rule for NaN, infinities and overflow.

Halves are converted by the processor where it is known to do so.  Elsewhere LLVM's conversion would end the process;
there they are converted by arithmetic on their bits, in both directions exact for every finite number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import gguf
import numpy as np

__all__ = ["LARGEST", "Kernel", "compiled", "jitted", "kernels", "on_bytes"]

_Type = gguf.GGMLQuantizationType
_U = np.uint32
_F = np.float32

Kernel = Callable[[Any, Any, Any], int]
"""Takes the rows' bytes, (n,) uint8, read-only; the delta, (n,) float32; and room for the bytes of the sums, which is
never the same memory.  Returns the bits of the largest magnitude."""

_SIGN, _MAGNITUDE = _U(0x80000000), _U(0x7FFFFFFF)
_LEAST = np.int32(-0x80000000)
_INFINITE = _U(0x7F800000)
_SMALLEST_HALF = _U(113 << 23)  # the smallest normal half, 2^-14, as a float32
_TINY = _U(27 << 23)  # 2^-100: the reciprocal of a smaller scale would leave the range of floats, or its precision
_LARGEST_HALF = 0x477FE000  # 65504

LARGEST: Final[Mapping[_Type, int]] = {
    _Type.F32: 0x7F7FFFFF, _Type.F16: _LARGEST_HALF, _Type.BF16: 0x7F7F0000, _Type.Q8_0: _LARGEST_HALF,
    _Type.Q4_0: _LARGEST_HALF,
}  # fmt: skip
"""Bits of the largest magnitude that a kernel's result is good for, by the types that have one."""


_STORED: Final[Mapping[_Type, Any]] = {
    _Type.F32: np.float32, _Type.F16: np.uint16, _Type.BF16: np.uint16, _Type.Q8_0: np.uint8, _Type.Q4_0: np.uint8,
}  # fmt: skip


def kernels(
    jit: Callable[[Any], Any] = lambda function: function, halves: tuple[Any, Any] | None = None
) -> Mapping[_Type, Any]:
    """Return the kernels, which take rows and room as arrays of what they store.

    Parameters
    ----------
    jit
        Makes of each function, and of those that it calls, what is to run.
    halves
        What takes the place of ``half_to_float`` and ``float_to_half``.
    """

    @jit
    def chosen(condition: Any, one: Any, other: Any) -> Any:
        """Return one of two words without a branch, which vector code has not."""
        mask = _U(_U(0) - _U(condition))
        return _U(_U(one & mask) | _U(other & _U(~mask)))

    @jit
    def half_to_float(half: Any) -> Any:
        """Convert the bits of a half, in a uint32; NaN becomes an infinity, and is told as well."""
        bits = _U(_U(half & _U(0x7FFF)) << _U(13))
        raised = np.uint32(bits + _SMALLEST_HALF)
        subnormal = np.float32(raised.view(np.float32) - _F(2.0**-14))
        word = chosen(bits < _U(1 << 23), subnormal.view(np.uint32), _U(bits + _U(112 << 23)))
        word = chosen(bits >= _U(31 << 23), _INFINITE, word)
        value = np.uint32(word | _U(_U(half & _U(0x8000)) << _U(16)))
        return value.view(np.float32)

    @jit
    def float_to_half(value: Any) -> Any:
        """Round a float32 of at most 65504 to the nearest half, ties to even; its bits, in a uint32."""
        number = np.float32(value)
        word = number.view(np.uint32)
        magnitude = np.uint32(word & _MAGNITUDE)
        raised = np.float32(magnitude.view(np.float32) + _F(0.5))  # the unit in its last place is the subnormals'
        subnormal = _U(raised.view(np.uint32) - _U(0x3F000000))
        odd = _U(_U(magnitude >> _U(13)) & _U(1))
        normal = _U(_U(_U(magnitude + _U(0xC8000FFF)) + odd) >> _U(13))  # the exponent's bias less 112, and half a unit
        half = chosen(magnitude < _SMALLEST_HALF, subnormal, normal)
        return _U(half | _U(_U(word & _SIGN) >> _U(16)))

    half_to_float, float_to_half = halves or (half_to_float, float_to_half)

    @jit
    def magnitude_of(value: Any) -> Any:
        number = np.float32(value)
        return _U(number.view(np.uint32) & _MAGNITUDE)

    @jit
    def add_f32(rows: Any, delta: Any, out: Any) -> Any:
        largest = _U(0)
        for i in range(len(delta)):
            value = np.float32(delta[i] + rows[i])
            largest = max(largest, magnitude_of(value))
            out[i] = value
        return largest

    @jit
    def add_f16(rows: Any, delta: Any, out: Any) -> Any:
        largest = _U(0)
        for i in range(len(delta)):
            value = np.float32(delta[i] + half_to_float(_U(rows[i])))
            largest = max(largest, magnitude_of(value))
            out[i] = np.uint16(float_to_half(value))
        return largest

    @jit
    def add_bf16(rows: Any, delta: Any, out: Any) -> Any:
        largest = _U(0)
        for i in range(len(delta)):
            weight = np.uint32(_U(rows[i]) << _U(16))
            value = np.float32(delta[i] + weight.view(np.float32))
            word = _U(value.view(np.uint32))
            largest = max(largest, _U(word & _MAGNITUDE))
            odd = _U(_U(word >> _U(16)) & _U(1))
            out[i] = np.uint16(_U(_U(_U(word + _U(0x7FFF)) + odd) >> _U(16)))
        return largest

    @jit
    def add_q8_0(rows: Any, delta: Any, out: Any) -> Any:
        values = np.empty(32, np.float32)
        largest = _U(0)
        n_blocks = len(delta) // 32
        n = len(out) // n_blocks - 2  # 32: see `add_q4_0`
        for block in range(n_blocks):
            at, first = 34 * block, 32 * block
            scale = half_to_float(_U(_U(rows[at]) | _U(_U(rows[at + 1]) << _U(8))))
            of_block = _U(0)
            for i in range(n):
                weight = _F(np.int8(rows[at + 2 + i])) * scale
                value = np.float32(delta[first + i] + weight)
                values[i] = value
                of_block = max(of_block, magnitude_of(value))
            if of_block != 0 and of_block < _TINY:
                return _INFINITE
            largest = max(largest, of_block)
            highest = np.uint32(of_block)
            scale = _F(highest.view(np.float32) / _F(127))
            inverse = _F(0) if scale == _F(0) else _F(_F(1) / scale)
            half = float_to_half(scale)
            out[at], out[at + 1] = np.uint8(half & _U(0xFF)), np.uint8(half >> _U(8))
            for i in range(n):
                value = _F(values[i] * inverse)
                size = abs(value)
                whole = np.int32(size)
                whole += np.int32(_F(2) * _F(size - _F(whole)))  # halves away from zero
                out[at + 2 + i] = np.uint8(np.int32(-whole if value < _F(0) else whole) & np.int32(0xFF))
        return largest

    @jit
    def add_q4_0(rows: Any, delta: Any, out: Any) -> Any:
        values = np.empty(32, np.float32)
        largest = _U(0)
        n_blocks = len(delta) // 32
        n = len(out) // n_blocks - 2  # 16: loops of known length are unrolled instead of becoming vector code
        for block in range(n_blocks):
            at, first = 18 * block, 32 * block
            scale = half_to_float(_U(_U(rows[at]) | _U(_U(rows[at + 1]) << _U(8))))
            above, below = _LEAST, _LEAST  # the largest of the values, and of their negatives, as signed bits
            for i in range(n):
                both = np.int32(rows[at + 2 + i])
                low = np.float32(delta[first + i] + _F(_F((both & np.int32(15)) - np.int32(8)) * scale))
                high = np.float32(delta[first + 16 + i] + _F(_F((both >> np.int32(4)) - np.int32(8)) * scale))
                values[i], values[16 + i] = low, high
                above = max(above, max(low.view(np.int32), high.view(np.int32)))
                below = max(below, max(np.int32(low.view(np.int32) ^ _LEAST), np.int32(high.view(np.int32) ^ _LEAST)))
            of_block = _U(max(above, below))
            if of_block != 0 and of_block < _TINY:
                return _INFINITE
            largest = max(largest, of_block)
            positive, negative = above >= below, below >= above
            sign = _U(0) if positive else _SIGN
            if positive and negative:  # the first one's
                i = 0
                while magnitude_of(values[i]) != of_block:
                    i += 1
                first_one = np.float32(values[i])
                sign = _U(first_one.view(np.uint32) & _SIGN)
            extreme = np.uint32(of_block | sign)
            scale = _F(extreme.view(np.float32) / _F(-8))
            inverse = _F(0) if scale == _F(0) else _F(_F(1) / scale)
            half = float_to_half(scale)
            out[at], out[at + 1] = np.uint8(half & _U(0xFF)), np.uint8(half >> _U(8))
            for i in range(n):
                low_bits = min(np.int32(_F(_F(values[i] * inverse) + _F(8.5))), np.int32(15))
                high_bits = min(np.int32(_F(_F(values[16 + i] * inverse) + _F(8.5))), np.int32(15))
                out[at + 2 + i] = np.uint8(low_bits | (high_bits << np.int32(4)))
        return largest

    return {
        _Type.F32: add_f32, _Type.F16: add_f16, _Type.BF16: add_bf16, _Type.Q8_0: add_q8_0, _Type.Q4_0: add_q4_0,
    }  # fmt: skip


def on_bytes(kernel: Any, type: _Type) -> Kernel:
    """Return one of `kernels` for arrays of bytes: numba would take longer to compile these views than all the rest."""
    stored = _STORED[type]
    return lambda rows, delta, out: int(kernel(rows.view(stored), delta, out.view(stored)))


@functools.cache
def compiled(type: _Type) -> Kernel:
    """Return the kernel of `type` compiled by numba, without the GIL and for one signature; see `engine.compiled`."""
    return on_bytes(jitted(type), type)


@functools.cache
def jitted(type: _Type) -> Any:
    """Return what numba makes of one of `kernels`."""
    import numba

    types: Any = numba.types
    stored: Any = numba.from_dtype(np.dtype(_STORED[type]))
    rows, delta = (types.Array(one, 1, "C", readonly=True) for one in (stored, types.float32))
    made = kernels(numba.njit(nogil=True, error_model="numpy"), _processors_halves())[type]
    made.compile(types.uint32(rows, delta, stored[::1]))
    made.disable_compile()
    return made


def _processors_halves() -> tuple[Any, Any] | None:
    """Return the processor's own conversions of halves; None where it may have none, or numba was told of another."""
    import numba
    from llvmlite import binding, ir
    from numba.extending import intrinsic

    config: Any = numba.config
    told = config.CPU_NAME is not None or config.CPU_FEATURES is not None or not config.ENABLE_AVX
    if told or not binding.get_host_cpu_features().get("f16c"):
        return None
    types: Any = numba.types

    @intrinsic
    def half_to_float(_: Any, half: Any) -> Any:  # noqa: ARG001
        def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            bits = builder.trunc(arguments[0], ir.IntType(16))
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

        return types.float32(types.uint32), build

    @intrinsic
    def float_to_half(_: Any, value: Any) -> Any:  # noqa: ARG001
        def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            bits = builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
            return builder.zext(bits, ir.IntType(32))

        return types.uint32(types.float32), build

    return half_to_float, float_to_half
