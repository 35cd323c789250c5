"""GGUF and ggla files that are not what they claim: each with what is to be said about it.

Those of `HEADERS` are bad as any GGUF file, those of `HOSTILE_GGUF` besides are no sound finetune checkpoints.
"""

import copy
import struct
from collections.abc import Callable
from typing import Any, Final

from ggcl_fast import CheckpointError, NotACheckpointError, TruncatedError
from ggcl_fast.testing import Shape, checkpoint_bytes

from .gguf_parts import ARRAY, STRING, U32, U64, Parts, Record, converted, edited, ggla_bytes, ggla_records
from .gguf_parts import parse as parsed
from .hostile import LBFGS, Hostile, put

SHAPE: Final = Shape(n_layer=1, n_embd=8, n_vocab=5, n_head=2, n_mult=8)
PARTS: Final = parsed(converted(checkpoint_bytes(SHAPE)))
SOUND: Final = PARTS.build()
STATE: Final = parsed(converted(LBFGS))

_Edit = Callable[[Parts], object]


def _bad(message: str, *edits: _Edit, kind: type[CheckpointError] = CheckpointError, parts: Parts = PARTS) -> Hostile:
    return Hostile(lambda: edited(parts, *edits), kind, message)


def _raw(message: str, make: Callable[[], bytes], kind: type[CheckpointError] = CheckpointError) -> Hostile:
    return Hostile(make, kind, message)


def _set(name: str, /, **values: Any) -> _Edit:
    """Change what the info of a tensor says."""

    return lambda parts: vars(parts.tensors[name]).update(values)


def _value(name: str, kind: int, value: bytes) -> _Edit:
    def edit(parts: Parts) -> None:
        parts.keys[name.encode()] = kind, value

    return edit


def _alignment(value: int) -> _Edit:
    return lambda parts: parts.u32("general.alignment", value)


def _with(**values: Any) -> _Edit:
    return lambda parts: vars(parts).update(values)


def _u32(name: str, value: int) -> _Edit:
    return lambda parts: parts.u32(name, value)


def _text(name: str, value: str) -> _Edit:
    return lambda parts: parts.put(name, STRING, value)


def _without(*names: str) -> _Edit:
    return lambda parts: parts.without(*names)


def _other(name: str, dims: tuple[int, ...] = (8,)) -> _Edit:
    """Add a tensor."""

    def edit(parts: Parts) -> None:
        tensor = copy.copy(parts.tensors["output_norm.weight.lora_a"])
        tensor.name, tensor.dims = name.encode(), dims
        parts.tensors[name + " "] = tensor

    return edit


_SIZE: Final = len(SOUND)
_HUGE: Final = 2**64 - 1
_A: Final = "token_embd.weight.lora_a"
_B: Final = "token_embd.weight.lora_b"
_N: Final = len(PARTS.tensors)
_K: Final = len(PARTS.keys)
_FIRST: Final = SOUND.index(b"token_embd.weight.lora_a") - 8
_INFO: Final = f"at offset {_FIRST} ({_FIRST:#x})"


def _at(offset: int) -> str:
    return f"at offset {offset} ({offset:#x})"


def _info(name: str, part: int, data: bytes = SOUND) -> int:
    """Offset in the info of a tensor, counted from behind its name."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + part


def _val(name: str, data: bytes = SOUND) -> int:
    """Offset of a key's value."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4


_Q_AND_K: Final = (b"training.lora.rank.attn_q", b"training.lora.rank.attn_k")
_END: Final = _val("optimizer.adam.no_improvement_count") + 4  # where a new key goes
_LAYERS: Final = "llama.block_count says how many layers there are"
_DATA: Final = -(-(_info("optimizer.adam.second_moments", 0) + 4 + 8 + 12) // 32) * 32


def _new(name: str) -> int:
    """Offset of the value of a key that was added at the end."""
    return _END + 8 + len(name) + 4


def _room(name: str, part: int, nbytes: int, *edits: _Edit) -> Hostile:
    """Want `nbytes` bytes that are not there, from `part` bytes into the value of a key at the end."""
    data = edited(PARTS, *edits)
    at = _new(name) + part
    return _raw(f"{name} {_at(at)}: expected {nbytes} bytes, found {len(data) - at}", lambda: data, TruncatedError)


HEADERS: Final[dict[str, Hostile]] = {
    # --- the fixed header
    "shorter than the header": _raw(
        "header at offset 0 (0x0): expected 24 bytes, found 23", lambda: SOUND[:23], TruncatedError
    ),
    "version 1": _bad(
        "version at offset 4 (0x4): expected 2 or 3, found 1 "
        "(of August 2023: llama.cpp of that autumn rewrites it, with its quantize IN OUT COPY)",
        _with(version=1),
    ),
    "version 4": _bad("version at offset 4 (0x4): expected 2 or 3, found 4", _with(version=4)),
    "big-endian": _bad(
        "version at offset 4 (0x4): expected 2 or 3, found 50331648 "
        "(from a big-endian machine: gguf's command turns it, gguf-convert-endian FILE little)",
        _with(version=3 << 24),
    ),
    "n_tensors of 2^64-1": _bad(
        f"header at offset 0 (0x0): the header announces more than the file holds, with {_K} keys and {_HUGE} tensors: "
        f"expected at least {24 + 13 * _K + 32 * _HUGE} bytes, found {_SIZE}",
        _with(n_tensors=_HUGE), kind=TruncatedError,
    ),
    "n_kv of 2^64-1": _bad(
        f"header at offset 0 (0x0): the header announces more than the file holds, with {_HUGE} keys and {_N} tensors: "
        f"expected at least {24 + 13 * _HUGE + 32 * _N} bytes, found {_SIZE}",
        _with(n_keys=_HUGE), kind=TruncatedError,
    ),
    "more keys than anybody needs": _raw(
        "n_kv at offset 16 (0x10): expected at most 16384, found 16385",
        lambda: struct.pack("<4sIQQ", b"GGUF", 3, 0, 16385) + bytes(300_000),
    ),
    # --- keys
    "a key past the end": _raw(
        f"key 0 at offset 32 (0x20): expected 60000 bytes, found {_SIZE - 32}",
        lambda: put(SOUND, 24, "<Q", 60000), TruncatedError,
    ),
    "a key of 2^64-1 bytes": _raw(
        f"key 0 at offset 24 (0x18): expected at most 65535 bytes, found {_HUGE}", lambda: put(SOUND, 24, "<Q", _HUGE)
    ),
    "a key that is no UTF-8": _raw(
        r"key 0 at offset 32 (0x20): expected UTF-8, found '\xffeneral.architecture'", lambda: put(SOUND, 32, "<B", 255)
    ),
    "a key twice": _raw(
        f"{_at(SOUND.index(_Q_AND_K[1]) - 8)}: key {list(PARTS.keys).index(_Q_AND_K[1])} "
        "'training.lora.rank.attn_q' is there twice",
        lambda: SOUND.replace(_Q_AND_K[1], _Q_AND_K[0]),
    ),
    "a value of type 13": _bad(
        f"x {_at(_new('x') - 4)}: expected a type of 0 to 12, found 13", _value("x", 13, bytes(8))
    ),
    "a string past the end": _room("x", 8, 2**63, _value("x", STRING, struct.pack("<Q", 2**63))),
    "control codes in a key": _bad(
        rf"\x1b[31m {_at(_new('12345') - 4)}: expected a type of 0 to 12, found 99",
        _value("\x1b[31m", 99, b""),
    ),
    # --- arrays
    "an array of type 13": _bad(
        f"x {_at(_new('x'))}: expected an element type that is no array, found 13",
        _value("x", ARRAY, struct.pack("<IQ", 13, 0)),
    ),
    "an array of arrays": _bad(
        f"x {_at(_new('x'))}: expected an element type that is no array, found an array",
        _value("x", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1)),
    ),
    "an array of 2^64-1 numbers": _room("x", 12, 4 * _HUGE, _value("x", ARRAY, struct.pack("<IQ", U32, _HUGE))),
    "an array of 2^64-1 strings": _room("x", 12, 8 * _HUGE, _value("x", ARRAY, struct.pack("<IQ", STRING, _HUGE))),
    "a string in an array past the end": _room(
        "x", 12 + 8 + 3 + 8, _HUGE, _value("x", ARRAY, struct.pack("<IQQ3sQ", STRING, 3, 3, b"abc", _HUGE))
    ),
    # --- the alignment
    **{
        f"an alignment of {n}": _bad(
            f"general.alignment {_at(_new('general.alignment'))}: expected a power of two (uint32), found {n}",
            _alignment(n),
        )
        for n in (0, 3, 48, 2**32 - 1)
    },
    "an alignment that is a string": _bad(
        f"general.alignment {_at(_new('general.alignment'))}: expected a power of two (uint32), found string",
        _text("general.alignment", "32"),
    ),
    # --- tensor infos
    **{
        f"n_dims of {n}": _raw(
            f"tensor 0 '{_A}': n_dims {_at(_info(_A, 0))}: expected 1 to 4, found {n}",
            lambda n=n: put(SOUND, _info(_A, 0), "<I", n),  # type: ignore[misc]
        )
        for n in (0, 5, 2**32 - 1)
    },
    "a dim of 0": _raw(
        f"tensor 0 '{_A}': dims {_at(_info(_A, 4))}: expected at least 1 each, found (4, 0)",
        lambda: put(SOUND, _info(_A, 12), "<Q", 0),
    ),
    "dims past 2^64": _raw(
        f"tensor 0 '{_A}': data offset {_at(_info(_A, 24))}: "
        f"expected room for {4 * _HUGE * _HUGE} bytes in a file of {_SIZE}, found 0",
        lambda: put(SOUND, _info(_A, 4), "<2Q", _HUGE, _HUGE), TruncatedError,
    ),
    "a type that nobody knows": _raw(
        f"tensor 0 '{_A}': type {_at(_info(_A, 20))}: expected a type that the installed gguf knows, found 4",
        lambda: put(SOUND, _info(_A, 20), "<I", 4),
    ),
    "rows that are no whole blocks": _raw(
        f"tensor 0 '{_A}': dims {_at(_info(_A, 4))}: expected rows of whole blocks of 32, found (4, 8)",
        lambda: put(SOUND, _info(_A, 20), "<I", 8),
    ),
    "an offset of 2^64-1": _raw(
        f"tensor 0 '{_A}': data offset {_at(_info(_A, 24))}: "
        f"expected room for 128 bytes in a file of {_SIZE}, found {_HUGE}",
        lambda: put(SOUND, _info(_A, 24), "<Q", _HUGE), TruncatedError,
    ),
    "an offset out of line": _raw(
        f"tensor 0 '{_A}': data {_at(_DATA + 4)}: "
        "expected an offset in the data section that is a multiple of 32, found 4",
        lambda: put(SOUND, _info(_A, 24), "<Q", 4),
    ),
    "data past the end": _raw(
        f"tensor 0 '{_A}': data {_at(_DATA + (_SIZE - _DATA) // 32 * 32 - 32)}: expected 128 bytes, found 32",
        lambda: put(SOUND, _info(_A, 24), "<Q", (_SIZE - _DATA) // 32 * 32 - 32), TruncatedError,
    ),
    "data inside other data": _raw(
        f"tensor 1 '{_B}': data {_at(_DATA + 96)}: "
        f"expected data from {_DATA + 128} on, behind tensor 0 '{_A}', found {_DATA + 96}",
        lambda: put(SOUND, _info(_B, 24), "<Q", 96),
    ),
    "a tensor twice": _bad(
        f"tensor 1 '{_A}': the name is there twice", _set(_B, name=_A.encode())
    ),
    "a tensor's name of 2^64-1 bytes": _raw(
        f"name of tensor 0 {_INFO}: expected at most 65535 bytes, found {_HUGE}",
        lambda: put(SOUND, _FIRST, "<Q", _HUGE),
    ),
}  # fmt: skip


def _key(name: str, message: str, *edits: _Edit, parts: Parts = PARTS) -> Hostile:
    """A key whose value stands where it stood."""
    return _bad(f"{name} {_at(_val(name, parts.build()))}: {message}", *edits, parts=parts)


def _no_checkpoint(found: str, hint: str, *edits: _Edit) -> Hostile:
    message = f"training.type: expected 'finetune_lora', found {found} ({hint})"
    return _bad(message, *edits, kind=NotACheckpointError)


def _base(parts: Parts) -> None:
    parts.without("training.type")
    _set(_A, name=b"token_embd.weight")(parts)


def _moved(name: str, message: str, dims: tuple[int, ...]) -> Hostile:
    """A tensor with other dims, in a file where everything else fits."""
    data = edited(PARTS, _set(name, dims=dims))
    at = _info(name, 4, data)
    return _raw(f"tensor {list(PARTS.tensors).index(name)} '{name}': dims {_at(at)}: {message}", lambda: data)


_MOMENTS: Final = "optimizer.adam.first_moments"
_NX: Final = sum(len(t.data) // 4 for name, t in PARTS.tensors.items() if ".lora_" in name)

HOSTILE_GGUF: Final[dict[str, Hostile]] = {
    **HEADERS,
    # --- what is no finetune checkpoint
    "a base model": _no_checkpoint(
        "none: a base model", "hand in the checkpoint that finetune wrote when it trained on it", _base
    ),
    "nothing known": _no_checkpoint(
        "none: no finetune checkpoint", "gguf-dump shows what it is", _without("training.type")
    ),
    "a whole model in training": _no_checkpoint(
        "'train_model': a train-text-from-scratch checkpoint, a model in itself",
        "there is no LoRA in it to convert", _text("training.type", "train_model"),
    ),
    "a type that is a number": _no_checkpoint(
        "7: no finetune checkpoint", "gguf-dump shows what it is", _u32("training.type", 7)
    ),
    "another architecture": _key(
        "general.architecture", "expected 'llama', found 'qwen2'", _text("general.architecture", "qwen2")
    ),
    "file_version 2": _key(
        "training.file_version", "expected 0 or 1, the only ones ever written, found 2",
        _u32("training.file_version", 2),
    ),
    # --- keys
    **{
        f"no {name.decode()}": _bad(
            f"{name.decode()}: the key is missing: expected {kind}, found none", _without(name.decode())
        )
        for name, kind in (
            (b"general.architecture", "string"), (b"training.iteration_count", "uint32"),
            (b"llama.embedding_length", "uint32"), (b"llama.block_count", "uint32"),
            (b"training.lora.rank.output", "uint32"), (b"optimizer.file_version", "uint32"),
            (b"optimizer.type", "string"), (b"optimizer.parameter_count", "uint64"),
            (b"optimizer.just_initialized", "bool"), (b"optimizer.adam.best_loss", "float32"),
        )
    },
    "64-bit counts in version 0": _key(
        "training.token_count", "expected uint32, found uint64",
        lambda parts: parts.put("training.token_count", U64, 1),
    ),
    "32-bit counts in version 1": _key(
        "training.iteration_count", "expected uint64, found uint32", _u32("training.file_version", 1)
    ),
    "a rank of 0": _key(
        "training.lora.rank.attn_q", "expected at least 1, found 0", _u32("training.lora.rank.attn_q", 0)
    ),
    "optimizer version 1": _key(
        "optimizer.file_version", "expected 0, the only one ever written, found 1", _u32("optimizer.file_version", 1)
    ),
    "another optimizer": _key(
        "optimizer.type", "expected 'adam' or 'lbfgs', found 'sgd'", _text("optimizer.type", "sgd")
    ),
    "another number of elements": _key(
        "optimizer.parameter_count", f"expected {_NX}, the number of LoRA elements, found {_NX + 1}",
        lambda parts: parts.put("optimizer.parameter_count", U64, _NX + 1),
    ),
    "no corrections": _key(
        "optimizer.lbfgs.approx_hessian_count", "expected at least 1, found 0",
        _u32("optimizer.lbfgs.approx_hessian_count", 0), parts=STATE,
    ),
    **{
        f"{n} heads of keys": _bad(
            f"llama.attention.head_count_kv {_at(_new('llama.attention.head_count_kv'))}: "
            f"expected a divisor of 2, the number of heads, which has to divide 8, found {n}",
            _u32("llama.attention.head_count_kv", n),
        )
        for n in (0, 3, 4, 2**32 - 1)
    },
    # --- tensors
    "a layer too few": _bad(
        "tensor 6 'blk.0.attn_norm.weight.lora_a': a finetune checkpoint of this shape has no tensor of this name",
        _u32("llama.block_count", 0),
        lambda parts: parts.without(*[name for name in parts.tensors if name.startswith("blk")][1:]),
    ),
    "2^32-1 layers": _bad(
        "tensor 'blk.1.attn_norm.weight.lora_a': the tensor is missing; a checkpoint of 4294967295 layers has it "
        f"({_LAYERS})",
        _u32("llama.block_count", 2**32 - 1),
    ),
    "half a pair": _bad(
        f"tensor 'blk.0.ffn_up.weight.lora_b': the tensor is missing; a checkpoint of 1 layers has it ({_LAYERS})",
        _without("blk.0.ffn_up.weight.lora_b"),
    ),
    "a tensor too many": _bad(
        f"tensor {_N} 'rope_freqs.weight': a finetune checkpoint of this shape has no tensor of this name",
        _other("rope_freqs.weight"),
    ),
    "no moments": _bad(
        f"tensor '{_MOMENTS}': the tensor is missing; a checkpoint with optimizer.type 'adam' has it",
        _without(_MOMENTS),
    ),
    "no past losses": _bad(
        "tensor 'optimizer.adam.past_loss_values': the tensor is missing; "
        "a checkpoint with optimizer.type 'adam' has it",
        _u32("optimizer.convergence_past_count", 3),
    ),
    "the other optimizer's tensors": _bad(
        "optimizer.lbfgs.approx_hessian_count: the key is missing: expected uint32, found none",
        _text("optimizer.type", "lbfgs"),
    ),
    "half precision": _raw(
        f"tensor {list(PARTS.tensors).index(_MOMENTS)} '{_MOMENTS}': type {_at(_info(_MOMENTS, 12))}: "
        "expected 0 (F32), found 1 (F16)",
        lambda: put(SOUND, _info(_MOMENTS, 12), "<I", 1),
    ),
    "another rank": _moved("output.weight.lora_a", "expected (4, 8), found (2, 8)", dims=(2, 8)),
    "another n_vocab": _moved("output.weight.lora_b", "expected (4, 5), found (4, 4)", dims=(4, 4)),
    "another n_embd": _moved("output_norm.weight.lora_a", "expected (1, 8), found (1, 7)", dims=(1, 7)),
    "another n_ff": _moved("blk.0.ffn_down.weight.lora_a", "expected (4, 24), found (4, 20)", dims=(4, 20)),
    "three dims": _moved("blk.0.attn_q.weight.lora_a", "expected (4, 8), found (4, 4, 2)", dims=(4, 4, 2)),
    "moments of another length": _moved(_MOMENTS, f"expected ({_NX}, 1), found ({_NX - 1}, 1)", dims=(_NX - 1,)),
}  # fmt: skip


RECORDS: Final = ggla_records(SHAPE)


def _ggla(message: str, change: Callable[[list[Record]], object]) -> Hostile:
    def make() -> bytes:
        records = copy.deepcopy(RECORDS)
        change(records)
        return ggla_bytes(records)

    return Hostile(make, CheckpointError, message)


def _field(index: int, **values: Any) -> Callable[[list[Record]], object]:
    return lambda records: vars(records[index]).update(values)


GGLA: Final = ggla_bytes(RECORDS)
_EXPECTED: Final = "expected the name of a LoRA tensor, such as 'blk.0.attn_q.weight.loraA'"
_CUT: Final = "finetune wrote all of them; the file may be cut short"


def _record(index: int) -> int:
    """Offset of a record."""
    return len(ggla_bytes(RECORDS[:index]))


HOSTILE_GGLA: Final[dict[str, Hostile]] = {
    "shorter than the header": _raw(
        "header at offset 0 (0x0): expected 16 bytes, found 15", lambda: GGLA[:15], TruncatedError
    ),
    "version 0": _raw(
        "version at offset 4 (0x4): expected 1, the only one ever written, found 0",
        lambda: ggla_bytes(RECORDS, version=0),
    ),
    "lora_r of 0": _raw("lora_r at offset 8 (0x8): expected at least 1, found 0", lambda: ggla_bytes(RECORDS, rank=0)),
    "lora_alpha of 0": _raw(
        "lora_alpha at offset 12 (0xc): expected at least 1, found 0", lambda: ggla_bytes(RECORDS, alpha=0)
    ),
    "no tensors": _raw(
        "at offset 16 (0x10): there is no tensor in it; the file may be cut short", lambda: GGLA[:16]
    ),
    **{
        f"n_dims of {n}": _raw(
            f"record 0 n_dims at offset 16 (0x10): expected 2, found {n}",
            lambda n=n: put(GGLA, 16, "<I", n),  # type: ignore[misc]
        )
        for n in (0, 3, 2**32 - 1)
    },
    "a type of blocks": _ggla(
        f"record 3 dtype {_at(_record(3) + 8)}: expected 0 (float32) or 1 (float16), found 2", _field(3, dtype=2)
    ),
    "a dim of 0": _raw(
        "record 0 dims at offset 28 (0x1c): expected at least 1 each, found (4, 0)", lambda: put(GGLA, 32, "<I", 0)
    ),
    "dims past the end": _raw(
        f"tensor 0 '{_A}': data at offset 64 (0x40): expected {4 * (2**32 - 1) ** 2} bytes, found {len(GGLA) - 64}",
        lambda: put(GGLA, 28, "<2I", 2**32 - 1, 2**32 - 1), TruncatedError,
    ),
    "a name of 2^32-1 bytes": _raw(
        "record 0 name length at offset 20 (0x14): expected at most 255, found 4294967295",
        lambda: put(GGLA, 20, "<I", 2**32 - 1),
    ),
    **{
        f"a tensor named {name!r}": _raw(
            f"record 0 name at offset 36 (0x24): {_EXPECTED}, found '{shown}'",
            lambda name=name: ggla_bytes([Record(name, (4, 8), bytes(128)), *RECORDS[1:]]),  # type: ignore[misc]
        )
        for name, shown in (
            (b"", ""), (b"tok_embeddings.weight", "tok_embeddings.weight"),
            (b"layers.0.attn_q.weight.loraA", "layers.0.attn_q.weight.loraA"),
            (b"blk.00.attn_q.weight.loraA", "blk.00.attn_q.weight.loraA"),
            (b"blk.9999999999.attn_q.weight.loraA", "blk.9999999999.attn_q.weight.loraA"),
            (b"attention.wq.weight.loraA", "attention.wq.weight.loraA"),
            (b"\x1b[31m\xff", r"\x1b[31m\xff"),
        )
    },
    "a tensor twice": _ggla(
        f"tensor {len(RECORDS)} '{_A}': at offset {len(GGLA)} ({len(GGLA):#x}): the tensor is there twice",
        lambda records: records.append(Record(b"token_embd.weight.loraA", (4, 8), bytes(128))),
    ),
    "half a pair": _ggla(
        f"tensor 'blk.0.ffn_up.weight.lora_b': the tensor is missing; a checkpoint of 1 layers has it ({_CUT})",
        lambda records: records.pop(),
    ),
    "a layer of its own": _ggla(
        "tensor 'blk.1.attn_norm.weight.lora_b': the tensor is missing; a checkpoint of 1000000000 layers has it "
        f"({_CUT})",
        lambda records: records.extend(
            Record(f"blk.{i}.attn_norm.weight.loraA".encode(), (1, 8), bytes(32)) for i in (1, 999_999_999)
        ),
    ),
    "ranks of a pair differ": _ggla(
        f"tensor 1 '{_B}': dims {_at(_record(1) + 12)}: expected (4, 4), found (5, 4)", _field(1, dims=(5, 4))
    ),
    "n_embd differs": _ggla(
        f"tensor 2 'output_norm.weight.lora_a': dims {_at(_record(2) + 12)}: expected (1, 8), found (1, 7)",
        _field(2, dims=(1, 7), data=bytes(28)),
    ),
    "n_vocab differs": _ggla(
        f"tensor 5 'output.weight.lora_b': dims {_at(_record(5) + 12)}: expected (4, 5), found (4, 6)",
        _field(5, dims=(4, 6), data=bytes(96)),
    ),
    "n_ff differs": _ggla(
        f"tensor 20 'blk.0.ffn_down.weight.lora_a': dims {_at(_record(20) + 12)}: expected (4, 24), found (4, 23)",
        _field(20, dims=(4, 23), data=bytes(4 * 92)),
    ),
    "bytes after the last tensor": _raw(
        f"record {len(RECORDS)} head {_at(len(GGLA))}: expected 12 bytes, found 7",
        lambda: GGLA + bytes(7), TruncatedError,
    ),
}  # fmt: skip
