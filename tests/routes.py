"""Every way from a checkpoint to an output, and what each must hold whatever the files are.

What is to be written is worked out here from the bytes of the checkpoint and of the base model, with plain struct and
numpy.  gguf's quants are asked what a block means, and safetensors' reader what is in its file; nothing is shared with
the package.
"""

import itertools
import json
import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import safetensors.numpy

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.testing import Shape, checkpoint_bytes

from .adapters import adapter_bytes, foreign_ggla, made
from .gguf_parts import (
    ARRAY,
    CODES,
    SIZES,
    STRING,
    Parts,
    Tensor,
    converted,
    ggla_bytes,
    ggla_records,
    string,
    version_1,
)  # fmt: skip
from .hostile import places
from .models import Floats, Model, Type, is_norm
from .mutations import CONSTANT, mutate, spoil, within_bounds
from .reference import OPTIMIZER_TENSORS, RANK_KEYS, gguf_name, read

Mask = npt.NDArray[np.bool_]


class Route(NamedTuple):
    """What is asked for."""

    to: str
    with_base: bool = False
    outtype: str = "f32"
    token_embd: bool = True

    @property
    def type(self) -> Type:
        """The type of A and B."""
        return {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16}[self.outtype]


ROUTES: Final = (
    Route("checkpoint"),
    Route("merged", True),
    *(Route("adapter", *rest) for rest in itertools.product((False, True), ("f32", "f16", "bf16"), (True, False))),
    *(Route("peft", *rest) for rest in itertools.product((False, True), ("f32", "f16"), (True, False))),
)
"""All that can be asked for."""


# --- sound files ----------------------------------------------------------------------------------------------------


def _model(model: Model) -> bytes:
    """Return a base model, with arrays among its keys and a tensor that no training changes."""
    parts = Parts(alignment=model.alignment).put("general.architecture", STRING, "llama")
    if model.alignment != 32:
        parts.u32("general.alignment", model.alignment)
    parts.keys[b"tokenizer.ggml.tokens"] = ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("\u2581b")
    parts.keys[b"tokenizer.ggml.token_type"] = ARRAY, struct.pack("<IQ2i", 5, 2, 1, 6)
    parts.u32("llama.attention.head_count", model.n_head).u32("llama.attention.head_count_kv", model.n_head_kv)
    for name, values in {**model.weights(), "rope_freqs.weight": np.ones(1, np.float32)}.items():
        kind = Type.F32 if values.ndim == 1 else model.kind
        data = gguf.quants.quantize(values, kind).tobytes()
        parts.tensors[name] = Tensor(name.encode(), values.shape[::-1], int(kind), data)
    return parts.build()


def _shape(model: Model, **rest: Any) -> Shape:
    """Return the shape of the checkpoints that were trained on `model`."""
    ranks = {"w1": 2, "wq": 2, "tok_embeddings": 3, "output": 2}
    return Shape(
        model.n_layer, model.n_head * model.head_dim, model.n_vocab, 1, model.n_head, model.head_dim, model.n_ff,
        {name: ranks.get(name, 1) for name in Shape().ranks}, **rest,
    )  # fmt: skip


_TINY: Final = Model(n_layer=1, n_head=2, n_head_kv=2, head_dim=2, n_ff=6, n_vocab=3)
_GROUPED: Final = Model(n_layer=1, n_head=2, n_head_kv=1, head_dim=2, n_ff=6, n_vocab=3)
_BLOCKS: Final = Model(n_layer=1, n_head=2, n_head_kv=2, head_dim=16, n_ff=32, n_vocab=3)


def _others(model: Model) -> tuple[bytes, bytes]:
    """Return adapters on `model` that finetune did not write: a ggla file of Hugging Face's, and one in GGUF form."""
    shapes = {name: values.shape for name, values in model.weights().items() if values.ndim == 2}
    blocks = Type.Q8_0 if model.head_dim % 16 == 0 else Type.BF16
    loras = [
        made(name.removesuffix(".weight"), shape[1], 2, shape[0], (Type.F16, Type.F32), seed=i)
        for i, (name, shape) in enumerate(shapes.items())
        if name.startswith("blk.") and ("attn" in name or "down" in name)
    ]
    pairs = [
        made(name.removesuffix(".weight"), shape[1], 1 + i % 2, shape[0], (blocks, Type.F16), seed=i)
        for i, (name, shape) in enumerate(shapes.items())
    ]
    return foreign_ggla(loras, r=2, alpha=3), adapter_bytes(pairs, alpha=3.0)


def _with(model: Model, **other: Any) -> bytes:
    return _model(Model(**{**vars(model), **other}))


_FAMILIES: Final[tuple[tuple[tuple[bytes, ...], tuple[bytes, ...]], ...]] = (
    (
        (
            checkpoint_bytes(_shape(_TINY)),
            checkpoint_bytes(_shape(_TINY, optimizer="lbfgs", lbfgs_m=1, past=2)),
            converted(checkpoint_bytes(_shape(_TINY))),
            version_1(_shape(_TINY)).build(),
            ggla_bytes(ggla_records(_shape(_TINY)), rank=3, alpha=8),
            *_others(_TINY),
        ),
        (_model(_TINY), _with(_TINY, kind=Type.F16, tied=True), _with(_TINY, kind=Type.BF16, alignment=64)),
    ),
    ((version_1(_shape(_GROUPED), n_head_kv=1, short_dims=True).build(), *_others(_GROUPED)), (_model(_GROUPED),)),
    (
        (
            checkpoint_bytes(_shape(_BLOCKS)),
            converted(checkpoint_bytes(_shape(_BLOCKS))),
            ggla_bytes(ggla_records(_shape(_BLOCKS), old_names=False)),
            *_others(_BLOCKS),
        ),
        (
            _with(_BLOCKS, kind=Type.Q8_0), _with(_BLOCKS, kind=Type.Q4_0, tied=True),
            _with(_BLOCKS, kind=Type.Q5_1, alignment=64), _with(_BLOCKS, kind=Type.F16),
        ),
    ),
)  # fmt: skip

PAIRS: Final = tuple(pair for checkpoints, bases in _FAMILIES for pair in itertools.product(checkpoints, bases))
"""Checkpoints, each with a base model that it could have been trained on."""
CHECKPOINTS: Final = tuple(data for checkpoints, _ in _FAMILIES for data in checkpoints)
MODELS: Final = tuple(base for _, bases in _FAMILIES for base in bases)


# --- what is in a file ----------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a GGUF file."""

    dims: tuple[int, ...]
    type: Type
    start: int
    """Where its data is."""
    data: bytes

    @property
    def values(self) -> Floats:
        """What it means, rows of the first dim."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        rows = np.frombuffer(self.data, np.uint8).reshape(-1, self.dims[0] // block * block_bytes)
        return np.asarray(gguf.quants.dequantize(rows, self.type), np.float32).reshape(-1, self.dims[0])


class Contents(NamedTuple):
    """What is in a GGUF file."""

    keys: dict[bytes, tuple[int, bytes]]
    """Type and bytes of each value."""
    tensors: dict[str, Stored]

    def number(self, key: str) -> int:
        """Return an integer, 0 where there is none."""
        kind, value = self.keys.get(key.encode(), (10, bytes(8)))
        return int(struct.unpack("<" + CODES[kind], value)[0])


def contents(data: bytes) -> Contents:
    """Take a sound GGUF file of any kind apart."""
    _, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    at = 24

    def take(nbytes: int) -> bytes:
        nonlocal at
        at += nbytes
        assert at <= len(data)
        return data[at - nbytes : at]

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize("<" + code)))[0])

    def value(kind: int) -> bytes:
        start = at
        if kind == ARRAY:
            kind, n = number("I"), number("Q")
            for _ in range(n if kind == STRING else 0):
                take(number("Q"))
            take(n * SIZES.get(kind, 0))
        else:
            take(number("Q") if kind == STRING else SIZES[kind])
        return data[start:at]

    keys = {}
    for _ in range(n_keys):
        name, kind = take(number("Q")), number("I")
        keys[name] = kind, value(kind)
    infos = []
    for _ in range(n_tensors):
        text = take(number("Q")).decode("utf-8", "surrogateescape")
        dims = tuple(number("Q") for _ in range(number("I")))
        infos.append((text, dims, Type(number("I")), number("Q")))
    alignment = struct.unpack("<I", keys[b"general.alignment"][1])[0] if b"general.alignment" in keys else 32
    tensors = {}
    for text, dims, type, offset in infos:
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        start = -(-at // alignment) * alignment + offset
        nbytes = int(np.prod(dims, dtype=object)) // block * block_bytes
        tensors[text] = Stored(dims, type, start, data[start : start + nbytes])
        assert len(tensors[text].data) == nbytes
    assert len(tensors) == n_tensors
    return Contents(keys, tensors)


class Trained(NamedTuple):
    """What is in a checkpoint."""

    tensors: dict[str, tuple[tuple[int, ...], bytes]]
    """Dims and bytes by GGUF name."""
    scale: float = 1.0
    n_head: int = 0
    n_head_kv: int = 0
    alpha: float = 0.0
    """Of a GGUF adapter, where each pair's scale is alpha by its rank."""
    is_hf: bool = False
    """Whether rows of B for q and k are in Hugging Face's order."""

    def pairs(self, base: "Contents | None" = None, *, reorder: bool = True) -> "Iterator[Pair]":
        """Yield the pairs as they fit a base model: in GGUF's order, with rows of zeros for tokens that came later."""
        heads = _n_heads(self, base) if reorder else {}
        for name in self.tensors:
            if not name.endswith(".lora_a"):
                continue
            a, b = (
                np.frombuffer(data, "<f4").reshape(-1, dims[0])
                for dims, data in (self.tensors[name[:-1] + end] for end in "ab")
            )
            weight = name.removesuffix(".lora_a")
            n_head = heads.get(weight.split(".")[-2], 0)
            if self.is_hf and n_head:
                b = b[np.argsort(_halves(len(b), n_head))]
            origin = base.tensors.get(weight, base.tensors.get("token_embd.weight")) if base is not None else None
            if origin is not None and weight in ("token_embd.weight", "output.weight"):
                n_tokens = origin.dims[1]
                b = np.concatenate([b, np.zeros((max(0, n_tokens - len(b)), b.shape[1]), np.float32)])
            yield Pair(weight, a, b, self.alpha / a.shape[1] if self.alpha else self.scale)


class Pair(NamedTuple):
    """What was trained of a weight."""

    weight: str
    a: Floats
    unscaled: Floats
    scale: float

    @property
    def b(self) -> Floats:
        """B with the scale in it, rounded once."""
        return self.unscaled if self.scale == 1 else (self.unscaled.astype(np.float64) * self.scale).astype(np.float32)


def trained(data: bytes) -> Trained:
    """Take a sound checkpoint of any format apart."""
    return {b"lcgg": _ggcl, b"GGUF": _gguf, b"algg": _ggla}[data[:4]](data)


def _lora_names(n_layer: int) -> list[str]:
    layers = (f"blk.{i}.{module}" for i in range(n_layer) for module in RANK_KEYS[:-3])
    return [f"{name}.weight.lora_{end}" for name in ("token_embd", "output_norm", "output", *layers) for end in "ab"]


def _ggcl(data: bytes) -> Trained:
    n_head, n_layer = struct.unpack_from("<2I", data, 32)
    found, names = places(data), _lora_names(n_layer)
    optimizer = "adam" if len(found.records) == len(names) + 3 else "lbfgs"
    names += [f"optimizer.{optimizer}.{name}" for name in OPTIMIZER_TENSORS[optimizer]]
    assert len(names) == len(found.records)
    tensors = {
        name: (record.dims, data[record.data : record.data + record.nbytes])
        for name, record in zip(names, found.records)
        if record.dims
    }
    return Trained(tensors, 1.0, n_head, n_head)


def _adapter(found: Contents) -> Trained:
    """Take a GGUF adapter apart."""
    tensors = {}
    for name, tensor in found.tensors.items():
        weight, _, end = name.rpartition(".lora_")
        if not weight:  # a norm's weight
            continue
        is_looked_up = weight == "token_embd.weight"
        values = tensor.values.T if end == "a" and not is_looked_up else tensor.values
        end = end if not is_looked_up else "ba"["ab".index(end)]
        tensors[f"{weight}.lora_{end}"] = values.shape[::-1], np.ascontiguousarray(values, "<f4").tobytes()
    alpha = found.keys.get(b"adapter.lora.alpha", (6, bytes(4)))[1]
    return Trained(tensors, alpha=float(struct.unpack("<f", alpha)[0]))


def _gguf(data: bytes) -> Trained:
    found = contents(data)
    if found.keys.get(b"general.type") == (STRING, string("adapter")):
        return _adapter(found)
    n_head = found.number("llama.attention.head_count")
    has_kv = b"llama.attention.head_count_kv" in found.keys
    n_head_kv = found.number("llama.attention.head_count_kv") if has_kv else n_head
    return Trained({name: (t.dims, t.data) for name, t in found.tensors.items()}, 1.0, n_head, n_head_kv)


def _ggla(data: bytes) -> Trained:
    _, _, rank, alpha = struct.unpack_from("<4I", data)
    at, tensors = 16, {}
    while at < len(data):
        n_dims, name_len, type = struct.unpack_from("<3I", data, at)
        dims = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        at += 12 + 4 * n_dims
        name = data[at : at + name_len].decode()
        is_new = name.startswith(("blk.", "token_embd.", "output_norm."))
        at = -(-(at + name_len) // 32) * 32
        nbytes = (4, 2)[type] * int(np.prod(dims, dtype=object))
        values = data[at : at + nbytes]
        if type == 1:
            values = np.frombuffer(values, "<f2").astype("<f4").tobytes()
        tensors[name[:-1] + "_" + name[-1].lower() if is_new else gguf_name(name)] = dims, values
        at += nbytes
    is_hf = not any("norm." in name or name.startswith("token_embd.") for name in tensors)
    return Trained(tensors, alpha / rank, is_hf=is_hf)


# --- what numbers become --------------------------------------------------------------------------------------------


def rounded(values: npt.NDArray[Any], type: Type) -> Floats:
    """Return what `values` become in a type of floats: to the nearest, ties to even."""
    single = values.astype(np.float32)
    if type == Type.F16:
        return single.astype(np.float16).astype(np.float32)
    if type == Type.BF16:
        bits = single.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) & np.uint64(0xFFFF0000)
        return np.where(np.isnan(single), single, bits.astype(np.uint32).view(np.float32))
    assert type == Type.F32
    return single


def hold_same(found: Floats, expected: Floats, origin: Floats) -> None:
    """Hold that all bits are as expected, those of NaN aside, and that what was finite in `origin` is so still."""
    assert found.shape == expected.shape
    bits = [np.ascontiguousarray(values).view(np.uint32) for values in (found, expected)]
    assert ((bits[0] == bits[1]) | np.isnan(found) & np.isnan(expected)).all()
    assert np.isfinite(found[np.isfinite(origin)]).all()


STEPS: Final = {Type.Q4_0: 1 / 8, Type.Q4_1: 2 / 15, Type.Q5_0: 1 / 16, Type.Q5_1: 2 / 31, Type.Q8_0: 1 / 127}
"""The step of a block at most, by its largest value."""


def hold_sum(found: Floats, weights: Floats, pair: Pair, type: Type) -> None:
    """Hold that `found` are `weights` with the delta of `pair` added in float32 and then rounded to `type`."""
    assert found.shape == weights.shape == (len(pair.b), len(pair.a))
    w, b, a = weights.astype(np.float64), pair.b.astype(np.float64), pair.a.astype(np.float64)
    rows, columns = (np.isfinite(values).all(axis=1, keepdims=True) for values in (pair.unscaled, a))
    is_finite: Mask = np.isfinite(w) & rows & columns.T
    w_size, b_size, a_size = (np.where(np.isfinite(values), np.abs(values), 0) for values in (w, b, a))
    exact, size = w + b @ a.T, w_size + b_size @ a_size.T
    rank = a.shape[1]
    bound = (rank + 2) * 2.0**-23 * size + (rank + 1) * 2.0**-149
    if type in (Type.F32, Type.F16, Type.BF16):
        low, high = rounded(exact - bound, type), rounded(exact + bound, type)
        is_near: Mask = (low <= found) & (found <= high) & np.isfinite(found)
        assert is_near[is_finite].all()
        # The kind of what is not finite depends on the order where sums overflow on the way.
        is_kept: Mask = ~np.isfinite(found) & ((size >= 1e38) | (found == exact) | np.isnan(found) & np.isnan(exact))
        assert is_kept[~is_finite].all()
        return
    block, _ = gguf.GGML_QUANT_SIZES[type]
    again = gguf.quants.dequantize(gguf.quants.quantize(exact.astype(np.float32), type), type)
    of_block = [values.reshape(-1, block) for values in (found, again, exact, bound, is_finite)]
    sound = of_block[4].all(axis=1)
    assert np.isfinite(of_block[0][sound]).all()
    assert not np.isfinite(of_block[0][~sound]).all(axis=1).any()
    largest = np.abs(of_block[2]).max(axis=1, keepdims=True)
    step = (1.01 * STEPS.get(type, 1.0) + 2.0**-8) * largest + of_block[3].max(axis=1, keepdims=True) + 128 * 2.0**-24
    assert (np.abs(of_block[0] - of_block[1]) <= step)[sound].all()


# --- what is in an output -------------------------------------------------------------------------------------------


def _hold_checkpoint(data: bytes, base: Contents | None, route: Route, outputs: dict[str, bytes]) -> None:  # noqa: ARG001
    found, source = contents(outputs.pop("out")), trained(data)

    def plain(dims: tuple[int, ...]) -> tuple[int, ...]:
        return dims[:1] + tuple(dim for dim in dims[1:] if dim > 1)

    assert {name: (plain(t.dims), t.data) for name, t in found.tensors.items()} == {
        name: (plain(dims), values) for name, (dims, values) in source.tensors.items()
    }
    assert {t.type for t in found.tensors.values()} == {Type.F32}
    if data[:4] == b"GGUF":
        for key, (kind, value) in contents(data).keys.items():
            is_nan = kind == 6 and np.isnan(np.frombuffer(value, "<f4"))[0]
            assert key == b"general.alignment" or is_nan or found.keys[key] == (kind, value)
    elif [record.name for record in places(data).records if b"lora" in record.name] == _old_names(data):
        for name, expected in read(data)[0].items():
            kind, value = found.keys[name.encode()]
            if kind == STRING:
                assert value == string(expected)
            else:
                (number,) = struct.unpack("<" + CODES[kind], value)
                assert number == expected or (number != number and expected != expected)


def _old_names(data: bytes) -> list[bytes]:
    """Return the names that the tensors of a ggcl file have if nothing is strange about them."""
    shape = Shape(n_layer=struct.unpack_from("<I", data, 36)[0])
    return [name.encode() for name, _, _ in shape.lora_tensors()]


def _hold_about(found: Contents, base: Contents | None, holds: str | None, left: str = "") -> None:
    """Hold that an output says what it is, and take these keys away."""
    name = ("base + in" if base is not None else "in") + (" (norms)" if holds == "deltas of norms" else "")
    expected = {"general.name": name, "ggcl_fast.version": ggcl_fast.__version__}
    if base is not None:
        expected["general.base_model.0.name"] = "base"
        assert found.keys.pop(b"general.base_model.count") == (4, struct.pack("<I", 1))
    if holds is not None:
        expected["ggcl_fast.holds"] = holds
    if left:
        expected["ggcl_fast.left_out"] = left
    for key, text in expected.items():
        assert found.keys.pop(key.encode()) == (STRING, string(text))
    kind, value = found.keys.pop(b"ggcl_fast.training")
    assert (kind, len(value)) == (STRING, 8 + 32)


def _hold_model(base: Contents, found: Contents, pairs: dict[str, Pair], holds: str) -> None:
    """Hold that `found` is the base model, but for the deltas of `pairs`, and for what it says of itself."""
    _hold_about(found, base, holds)
    origins = {**base.tensors}
    if {"token_embd.weight", "output.weight"} & pairs.keys() and "token_embd.weight" in base.tensors:
        origins.setdefault("output.weight", base.tensors["token_embd.weight"])
    assert list(found.tensors) == list(origins)
    is_other = False
    for name, origin in origins.items():
        tensor = found.tensors[name]
        assert tensor.dims == origin.dims
        if name in pairs:
            kept = Type.F32 if is_norm(name) else origin.type if _can_quantize(origin.type) else Type.F16
            assert tensor.type == kept
            is_other |= kept != origin.type and len(origin.dims) > 1
            weights = origin.values.reshape(1, -1) if is_norm(name) else origin.values
            hold_sum(tensor.values.reshape(weights.shape), weights, pairs[name], tensor.type)
        else:
            assert (tensor.type, tensor.data) == (origin.type, origin.data)
    if is_other:
        assert found.keys.pop(b"general.file_type")[0] == 4
    kept_keys = [key for key in base.keys if not (is_other and key == b"general.file_type")]
    assert sorted(found.keys) == sorted(kept_keys)
    assert all(found.keys[key] == base.keys[key] for key in kept_keys)


def _trains_norms(pairs: list[Pair]) -> bool:
    return any(is_norm(pair.weight) and pair.a.any() and pair.b.any() for pair in pairs)


def _hold_adapter(data: bytes, base: Contents | None, route: Route, outputs: dict[str, bytes]) -> None:
    found, source = contents(outputs.pop("out")), trained(data)
    pairs, type = list(source.pairs(base)), route.type
    is_tied = base is not None and "output.weight" not in base.tensors
    left_out = ("token_embd.weight", "output.weight")[: 0 if route.token_embd else 2 if is_tied else 1]
    assert not (is_tied and route.token_embd and {"token_embd.weight", "output.weight"} & {p.weight for p in pairs})
    ranks = {pair.a.shape[1] for pair in pairs if not is_norm(pair.weight) and pair.weight not in left_out}
    alpha = ranks.pop() if len(ranks) == 1 else 0
    left = ["norms"] * any(is_norm(pair.weight) for pair in pairs)
    left += [pair.weight for pair in pairs if pair.weight in left_out]
    _hold_about(found, base, None, " and ".join(left))
    assert found.keys == {
        b"general.architecture": _architecture(data), b"general.type": (STRING, string("adapter")),
        b"adapter.type": (STRING, string("lora")), b"adapter.lora.alpha": (6, struct.pack("<f", alpha)),
    }  # fmt: skip
    for pair in pairs:
        if is_norm(pair.weight) or pair.weight in left_out:
            continue
        sides = {"a": (pair.a, pair.a), "b": (pair.b, pair.unscaled)}
        is_looked_up = pair.weight == "token_embd.weight"  # rows of it: A and B change places
        for end, side in zip("ab", "ba" if is_looked_up else "ab"):
            values, origin = sides[side]
            if side == "a" and not is_looked_up:
                values, origin = values.T, origin.T
            tensor = found.tensors.pop(f"{pair.weight}.lora_{end}")
            assert (tensor.type, tensor.dims) == (type, values.shape[::-1])
            hold_same(tensor.values, rounded(values, type), origin)
    assert not found.tensors
    if base is not None and _trains_norms(pairs):
        norms = {pair.weight: pair for pair in pairs if is_norm(pair.weight)}
        _hold_model(base, contents(outputs.pop("base-out.gguf")), norms, "deltas of norms")


def _architecture(data: bytes) -> tuple[int, bytes]:
    """Return the architecture that a file names, LLaMA where it names none."""
    named = contents(data).keys if data.startswith(b"GGUF") else {}
    return named.get(b"general.architecture", (STRING, string("llama")))


def _can_quantize(type: Type) -> bool:
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[type][0]), np.float32), type)
    except NotImplementedError:
        return False
    return True


def _hold_merged(data: bytes, base: Contents | None, route: Route, outputs: dict[str, bytes]) -> None:  # noqa: ARG001
    assert base is not None
    source = trained(data)
    pairs = {pair.weight: pair for pair in source.pairs(base)}
    _hold_model(base, contents(outputs.pop("out")), pairs, "every delta")


MODULES: Final = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}  # fmt: skip
"""What transformers calls the modules of a model and those of its layers."""


def _module(weight: str) -> str:
    *layer, last, _ = weight.split(".")
    return f"model.layers.{layer[1]}.{MODULES[last]}" if layer else MODULES[last]


def _halves(n_rows: int, n_head: int) -> list[int]:
    """Return which of GGUF's rows of q and k stand where transformers has them."""
    size = n_rows // n_head
    return [head * size + 2 * i + j for head in range(n_head) for j in range(2) for i in range(size // 2)]


def _n_heads(source: Trained, base: Contents | None) -> dict[str, int]:
    """Return the heads of q and k: the base model's word counts for more."""
    told = [base.number(f"llama.attention.{key}") if base else 0 for key in ("head_count", "head_count_kv")]
    return {"attn_q": told[0] or source.n_head, "attn_k": told[1] or source.n_head_kv or told[0]}


def _hold_peft(data: bytes, base: Contents | None, route: Route, outputs: dict[str, bytes]) -> None:
    found = safetensors.numpy.load(outputs.pop("out/adapter_model.safetensors"))
    config = json.loads(outputs.pop("out/adapter_config.json"))
    assert outputs.pop("out/README.md").startswith(b"---\nlibrary_name: peft\n---\n")
    source, type = trained(data), route.type
    saved, adapted, heads = set(), set(), _n_heads(source, base)
    for pair in source.pairs(base, reorder=False):
        module, last = _module(pair.weight), pair.weight.split(".")[-2]
        prefix, leaf = f"base_model.model.{module}", module.rpartition(".")[2]
        if is_norm(pair.weight):
            if base is not None:
                norm, old = found.pop(f"{prefix}.weight"), base.tensors[pair.weight].values
                assert norm.dtype == np.float32
                hold_sum(norm.reshape(1, -1), old.reshape(1, -1), pair, Type.F32)
                saved.add(leaf)
            continue
        if last == "token_embd" and not route.token_embd:
            continue
        adapted.add(leaf)
        is_other = last in heads and not source.is_hf
        order = _halves(len(pair.b), heads[last]) if is_other else list(range(len(pair.b)))
        if last == "token_embd":
            ends = (found.pop(f"{prefix}.lora_embedding_B"), found.pop(f"{prefix}.lora_embedding_A").T)
        else:
            ends = (found.pop(f"{prefix}.lora_A.weight").T, found.pop(f"{prefix}.lora_B.weight"))
        told: dict[str, Any] = {}
        for pattern, usual in ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"):
            own = (value for key, value in config[pattern].items() if f".{module}".endswith(f".{key}"))
            told[usual] = next(own, config[usual])
        assert told["r"] == pair.a.shape[1]
        b = pair._replace(scale=pair.scale * told["r"] / told["lora_alpha"]).b[order]
        for end, values, origin in zip(ends, (pair.a, b), (pair.a, pair.unscaled[order])):
            assert end.dtype == {Type.F32: np.float32, Type.F16: np.float16}[type]
            hold_same(end.astype(np.float32), rounded(values, type), origin)
    assert not found
    assert set(config["target_modules"]) == adapted
    assert set(config["modules_to_save"] or ()) == saved


_HOLD: Final[dict[str, Callable[[bytes, Contents | None, Route, dict[str, bytes]], None]]] = {
    "checkpoint": _hold_checkpoint,
    "adapter": _hold_adapter,
    "merged": _hold_merged,
    "peft": _hold_peft,
}


def _hold_too_large(type: str, data: bytes, base: Contents | None) -> None:
    """Hold that something about the pairs of `data` comes near to more than `type` can have."""
    limit = {"F32": 3.4e38, "BF16": 3.38e38}.get(type, 65504)
    largest = 0.0
    pairs = list(trained(data).pairs())
    ranks = [pair.a.shape[1] for pair in pairs]
    widest = max(ranks) / min(ranks)  # what B may be multiplied by for PEFT
    for pair in pairs:
        a, b = (
            np.abs(np.where(np.isfinite(values), values, 0), dtype=np.float64)
            for values in (pair.a, widest * abs(pair.scale) * pair.unscaled.astype(np.float64))
        )
        origin = 0.0
        if base is not None:
            stored = base.tensors.get(pair.weight, base.tensors.get("token_embd.weight"))
            weight = stored.values if stored is not None else np.zeros(1, np.float32)  # of what was left out
            origin = float(np.abs(weight[np.isfinite(weight)]).max(initial=0.0))
        largest = max(largest, a.max(), b.max(), origin + (b @ a.T).max())
    assert largest >= limit


# --- the promise as a whole -----------------------------------------------------------------------------------------

_BLOCKS_IN_FLIGHT: Final = 4 << 20  # bytes: what a copy of a file of any size takes
_TOO_LARGE: Final = "a value is too large for "
_MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None


def hold(data: bytes, base: bytes | None, route: Route, *, traced: bool = False) -> str:
    """Convert `data` by `route` and hold that what is written is right, or that nothing is; return what was said.

    `base` is used where the route has one.  Nothing is wrong with where the files are, so that `CheckpointError` alone
    may be raised.
    """
    given = {"in": data} if base is None or not route.with_base else {"in": data, "base.gguf": base}
    said, problem, report = "", "", None
    with tempfile.TemporaryDirectory(dir=_MEMORY) as name:
        folder = Path(name)
        for part, content in given.items():
            (folder / part).write_bytes(content)
        try:
            bounds = within_bounds(sum(map(len, given.values())), traced=traced, constant=CONSTANT + _BLOCKS_IN_FLIGHT)
            with bounds, warnings.catch_warnings():
                warnings.simplefilter("error")
                report = ggcl_fast.convert(
                    folder / "in", folder / "out", to=route.to, outtype=route.outtype, token_embd=route.token_embd,
                    base=folder / "base.gguf" if route.with_base else None,
                )  # fmt: skip
        except CheckpointError as error:
            said, problem = str(error), error.problem or ""
            assert set(os.listdir(folder)) == given.keys()
        outputs = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {part: outputs.pop(part) for part in given} == given
    assert said.isprintable()
    with np.errstate(all="ignore"):
        if problem.startswith(_TOO_LARGE):
            _hold_too_large(problem.removeprefix(_TOO_LARGE), data, _base(given))
        if report is not None:
            assert all(text.isprintable() for text in (*report.warnings, *report.notes))
            assert report.target_bytes == sum(map(len, outputs.values()))
            _HOLD[route.to](data, _base(given), route, outputs)
    assert not outputs
    return said


def _base(given: dict[str, bytes]) -> Contents | None:
    return contents(given["base.gguf"]) if "base.gguf" in given else None


def altered(pair: tuple[bytes, bytes], route: Route, rng: random.Random) -> tuple[bytes, bytes]:
    """Return `pair` with one to three things changed in the files that `route` reads."""
    files = list(pair)
    for _ in range(rng.randrange(1, 4)):
        which = rng.randrange(1 + route.with_base)
        files[which] = rng.choice((mutate, spoil, spoil))(files[which], rng)
    return files[0], files[1]


def hold_any(data: bytes, rng: random.Random, *, traced: bool = False) -> None:
    """Hold what a route makes of `data`, as the checkpoint or as the base model; `rng` chooses what is open.

    Few files that a fuzzer comes by are sound, and of those few fit together: now and then it is only the seed of
    what becomes of a pair that does.
    """
    route, pair = rng.choice(ROUTES), rng.choice(PAIRS)
    what = rng.randrange(3)
    if what == 0:
        pair = altered(pair, route, rng)
    elif route.with_base and data.startswith(b"GGUF") and (what == 1 or b"training.type" not in data):
        pair = pair[0], data
    else:
        pair = data, pair[1]
    hold(*pair, route, traced=traced)
