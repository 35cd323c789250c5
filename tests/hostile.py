"""Files that are not what they claim: each with what is to be said about it.

Everything is made with plain struct from a real file, so that nothing here can share a mistake with the reader.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ggcl_fast import CheckpointError, NotACheckpointError, TruncatedError

from .reference import DATA

ADAM: Final = (DATA / "adam.ggcl").read_bytes()
LBFGS: Final = (DATA / "lbfgs.ggcl").read_bytes()

HEADER: Final = (
    "magic", "version", "train_its", "train_samples", "train_tokens", "n_vocab", "n_embd", "n_mult", "n_head",
    "n_layer", "n_rot", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "tok_embeddings",
    "norm", "output",
)  # fmt: skip
OPTIMIZER: Final = {
    "version": (0, "<I"), "past": (4, "<i"), "lbfgs_m": (8, "<i"), "nx": (12, "<q"), "iter": (20, "<i"),
    "just_initialized": (24, "<I"),
}  # fmt: skip


@dataclass
class Record:
    """Where one tensor record stands."""

    start: int
    dims: tuple[int, ...]
    name: bytes
    data: int
    nbytes: int

    @property
    def name_at(self) -> int:
        return self.start + 12 + 4 * len(self.dims)


@dataclass
class Places:
    """Where everything stands in a sound file."""

    records: list[Record] = field(default_factory=list)
    optimizer: int = 0
    end: int = 0
    """Where the closing record starts."""


def places(data: bytes) -> Places:
    """Find everything in `data`, which is sound."""
    found = Places()
    n_lora = 6 + 18 * struct.unpack_from("<I", data, 36)[0]
    at = 92

    def record() -> None:
        nonlocal at
        n_dims, name_len = struct.unpack_from("<2I", data, at)
        dims = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        name_at = at + 12 + 4 * n_dims
        start = -(-(name_at + name_len) // 32) * 32
        nbytes = 4 if dims else 0
        for dim in dims:
            nbytes *= dim
        found.records.append(Record(at, dims, data[name_at : name_at + name_len], start, nbytes))
        at = start + nbytes

    for _ in range(n_lora):
        record()
    found.optimizer = at
    for n_records, closing in ((3, 12), (10, 24)):
        at = found.optimizer + 28
        del found.records[n_lora:]
        for _ in range(n_records):
            record()
        if at + closing == len(data):
            break
    found.end = at
    return found


def put(data: bytes, offset: int, code: str, *values: float) -> bytes:
    """Return `data` with `values` packed into it at `offset`."""
    changed = bytearray(data)
    struct.pack_into(code, changed, offset, *values)
    return bytes(changed)


def with_header(name: str, value: int, data: bytes = ADAM) -> bytes:
    """Return `data` with another value in the header."""
    return put(data, 4 * HEADER.index(name), "<I", value)


def with_optimizer(name: str, value: int, data: bytes = ADAM) -> bytes:
    """Return `data` with another value in the optimizer's fixed part."""
    offset, code = OPTIMIZER[name]
    return put(data, places(data).optimizer + offset, code, value)


def with_word(index: int, word: int, value: int, data: bytes = ADAM) -> bytes:
    """Return `data` with another word in record `index`: 0 n_dims, 1 name_len, 2 dtype, 3 and 4 the dims."""
    return put(data, places(data).records[index].start + 4 * word, "<I", value)


def with_name(index: int, name: bytes, data: bytes = ADAM) -> bytes:
    """Return `data` with record `index` named otherwise, and everything behind it where it has to be then."""
    record = places(data).records[index]
    head = data[: record.name_at] + name
    head += b"\0" * (-len(head) % 32)
    head = put(head, record.start + 4, "<I", len(name))
    if (len(head) - record.data) % 32 == 0 and places(data).records[-1] is not record:
        return head + data[record.data :]
    raise ValueError("the padding of everything behind would change")


def with_values(index: int, values: list[float], data: bytes = ADAM) -> bytes:
    """Return `data` with other values at the start of the data of record `index`."""
    return put(data, places(data).records[index].data, f"<{len(values)}f", *values)


ODD: Final = with_values(3, [float("nan")], with_values(40, [1.0, float("inf"), float("-inf"), float("nan")]))
"""Sound, but with values in two tensors that are not finite."""


@dataclass(frozen=True)
class Hostile:
    """One bad file."""

    data: Callable[[], bytes]
    kind: type[CheckpointError]
    message: str
    """What is to be said, without the name of the file."""


def _bad(message: str, make: Callable[[], bytes], kind: type[CheckpointError] = CheckpointError) -> Hostile:
    return Hostile(make, kind, message)


def _other(found: str, data: bytes, hint: str = "") -> Hostile:
    name = found.partition(", ")[2] or (found if found == "an empty file" else f"something that begins with {found}")
    message = f"this is neither a finetune checkpoint nor an adapter: it is {name}{f' ({hint})' if hint else ''}"
    return Hostile(lambda: data, NotACheckpointError, message)


_MODEL_HINT: Final = "convert the original model anew with llama.cpp's convert_hf_to_gguf.py"
_HUGE: Final = 2**32 - 1
_W1B: Final = 19  # records of the fixture's first layer
_W2A: Final = 20
_W3B: Final = 23


def _claims(needed: int, *names: str) -> Hostile:
    def make() -> bytes:
        data = ADAM
        for name in names:
            data = with_header(name, _HUGE, data)
        return data

    return _bad(
        "header at offset 0 (0x0): the header announces more than the file holds: "
        f"expected at least {needed} bytes, found 95308",
        make,
        TruncatedError,
    )


def _dims(index: int, word: int, value: int, message: str) -> Hostile:
    return _bad(message, lambda: with_word(index, word, value))


_FIRST: Final = "tensor 0 'token_embd.weight.lora_a': "
_ENDS: Final = "optimizer state at offset 33568 (0x8320): the file's end fits no optimizer: expected a file of "

HOSTILE: Final[dict[str, Hostile]] = {
    # --- what is no checkpoint at all
    "empty": _other("an empty file", b""),
    "three bytes": _other("b'lcg'", ADAM[:3]),
    "unknown magic": _other("b'abcd'", b"abcd" + ADAM[4:]),
    "gguf": _bad("version at offset 4 (0x4): expected 2 or 3, found 0", lambda: b"GGUF" + ADAM[4:]),
    "ggla": _bad(
        "version at offset 4 (0x4): expected 1, the only one ever written, found 0", lambda: b"algg" + ADAM[4:]
    ),
    "ggcp": _other(
        "b'pcgg', a train-text-from-scratch checkpoint (ggcp)", b"pcgg" + ADAM[4:],
        "convert-train-checkpoint-to-gguf.py of llama.cpp's tag b1300 and its time reads it",
    ),
    "ggml": _other("b'lmgg', an old model (ggml)", b"lmgg" + ADAM[4:], _MODEL_HINT),
    "ggmf": _other("b'fmgg', an old model (ggmf)", b"fmgg" + ADAM[4:], _MODEL_HINT),
    "ggjt": _other("b'tjgg', an old model (ggjt)", b"tjgg" + ADAM[4:], _MODEL_HINT),
    "safetensors": _other(
        r"b'\x10\x00\x00\x00', a safetensors file", struct.pack("<Q", 16) + b'{"a":{}}        ',
        "load it with the safetensors library; llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py make GGUF "
        "files of such models and adapters",
    ),
    "pytorch zip": _other(
        r"b'PK\x03\x04', a zip archive, such as PyTorch's", b"PK\x03\x04" + ADAM[4:],
        "unpack it, or load it with torch.load",
    ),
    "byte-swapped": _other(
        "b'ggcl', a byte-swapped checkpoint (ggcl)", b"ggcl" + ADAM[4:],
        "from a big-endian machine; only little-endian ones can be read",
    ),
    # --- the header
    "shorter than the header": _bad(
        "header at offset 0 (0x0): expected 92 bytes, found 91", lambda: ADAM[:91], TruncatedError
    ),
    "version 1": _bad(
        "version at offset 4 (0x4): expected 0, the only one ever written, found 1", lambda: with_header("version", 1)
    ),
    "n_layer claims too much": _claims(27075473837688, "n_layer"),
    "n_embd claims too much": _claims(1735166796868, "n_embd"),
    "n_vocab claims too much": _claims(137438967416, "n_vocab"),
    "a rank claims too much": _claims(2199023275608, "wq"),
    "products past 2^63": _claims(
        4119864448601923244203763040092, "n_layer", "n_embd", "n_vocab", *HEADER[11:],
    ),
    "zero n_embd": _bad("n_embd at offset 24 (0x18): expected at least 1, found 0", lambda: with_header("n_embd", 0)),
    "zero n_vocab": _bad(
        "n_vocab at offset 20 (0x14): expected at least 1, found 0", lambda: with_header("n_vocab", 0)
    ),
    **{
        f"zero rank {name}": _bad(
            f"{name} at offset {44 + 4 * i} ({44 + 4 * i:#x}): expected at least 1, found 0",
            lambda name=name: with_header(name, 0),  # type: ignore[misc]
        )
        for i, name in enumerate(HEADER[11:])
    },
    "one layer too few": _bad(
        "optimizer version at offset 21920 (0x55a0): expected 1, found 2", lambda: with_header("n_layer", 1)
    ),
    "one layer too many": _bad(
        "tensor 42 'blk.2.attn_norm.weight.lora_a': n_dims at offset 33568 (0x8320): expected 2, found 1",
        lambda: with_header("n_layer", 3),
    ),
    "another n_embd": _bad(
        f"{_FIRST}dims at offset 104 (0x68): expected (4, 31), found (4, 32)", lambda: with_header("n_embd", 31)
    ),
    "another n_vocab": _bad(
        "tensor 1 'token_embd.weight.lora_b': dims at offset 684 (0x2ac): expected (4, 63), found (4, 270)",
        lambda: with_header("n_vocab", 63),
    ),
    "another rank": _bad(
        "tensor 8 'blk.0.attn_q.weight.lora_a': dims at offset 10544 (0x2930): expected (5, 32), found (4, 32)",
        lambda: with_header("wq", 5),
    ),
    # --- the records
    **{
        f"n_dims {n}": _bad(
            f"{_FIRST}n_dims at offset 92 (0x5c): expected 2, found {n}",
            lambda n=n: with_word(0, 0, n),  # type: ignore[misc]
        )
        for n in (0, 1, 3, _HUGE)
    },
    "dtype 1": _bad(
        "tensor 7 'blk.0.attn_norm.weight.lora_b': dtype at offset 10472 (0x28e8): expected 0 (float32), found 1",
        lambda: with_word(7, 2, 1),
    ),
    "ne0 of 0": _dims(0, 3, 0, f"{_FIRST}dims at offset 104 (0x68): expected (4, 32), found (0, 32)"),
    "ne1 of 0": _dims(0, 4, 0, f"{_FIRST}dims at offset 104 (0x68): expected (4, 32), found (4, 0)"),
    "ne1 of 2^32-1": _dims(
        0, 4, _HUGE, f"{_FIRST}dims at offset 104 (0x68): expected (4, 32), found (4, 4294967295)"
    ),
    "n_ff of 0": _dims(
        _W1B, 4, 0,
        "tensor 19 'blk.0.ffn_gate.weight.lora_b': dims at offset 15980 (0x3e6c): expected (4, n_ff), found (4, 0)",
    ),
    "n_ff past the end": _bad(
        "tensor 19 'blk.0.ffn_gate.weight.lora_b': data at offset 16032 (0x3ea0): "
        "expected 68719476720 bytes, found 79276",
        lambda: with_word(_W1B, 4, _HUGE), TruncatedError,
    ),
    "w2 contradicts w1": _dims(
        _W2A, 4, 95,
        "tensor 20 'blk.0.ffn_down.weight.lora_a': dims at offset 17580 (0x44ac): expected (4, 96), found (4, 95)",
    ),
    "w3 contradicts w1": _dims(
        _W3B, 4, 97,
        "tensor 23 'blk.0.ffn_up.weight.lora_b': dims at offset 20332 (0x4f6c): expected (4, 96), found (4, 97)",
    ),
    "w1 of the next layer contradicts": _dims(
        _W1B + 18, 4, 64,
        "tensor 37 'blk.1.ffn_gate.weight.lora_b': dims at offset 27628 (0x6bec): expected (4, 96), found (4, 64)",
    ),
    "name_len 0": _bad(
        "tensor 1 'token_embd.weight.lora_b': n_dims at offset 640 (0x280): expected 2, found 1030711572",
        lambda: with_word(0, 1, 0),
    ),
    "name_len past the end": _bad(
        f"{_FIRST}name at offset 112 (0x70): expected 95197 bytes, found 95196",
        lambda: with_word(0, 1, 95197), TruncatedError,
    ),
    "name_len up to the end": _bad(
        f"{_FIRST}padding at offset 95308 (0x1744c): expected 20 bytes, found 0",
        lambda: with_word(0, 1, 95196), TruncatedError,
    ),
    "name_len 2^32-1": _bad(
        f"{_FIRST}name at offset 112 (0x70): expected 4294967295 bytes, found 95196",
        lambda: with_word(0, 1, _HUGE), TruncatedError,
    ),
    # --- the optimizer
    "optimizer version 2": _bad(
        "optimizer version at offset 33568 (0x8320): expected 1, found 2", lambda: with_optimizer("version", 2)
    ),
    **{
        f"nx {nx}": _bad(
            f"optimizer nx at offset 33580 (0x832c): expected 7701, the number of LoRA elements, found {nx}",
            lambda nx=nx: with_optimizer("nx", nx),  # type: ignore[misc]
        )
        for nx in (-1, 0, 7700, 2**63 - 1)
    },
    "negative past": _bad(
        "optimizer past at offset 33572 (0x8324): expected at least 0, found -1", lambda: with_optimizer("past", -1)
    ),
    "absurd past": _bad(
        f"{_ENDS}8590029928 bytes (Adam), found 95308", lambda: with_optimizer("past", 2**31 - 1), TruncatedError
    ),
    "negative lbfgs_m": _bad(
        "optimizer lbfgs_m at offset 33576 (0x8328): expected at least 0, found -1",
        lambda: with_optimizer("lbfgs_m", -1),
    ),
    "absurd lbfgs_m": _bad(
        f"{_ENDS}95308 bytes (Adam) or 132319352581540 bytes (L-BFGS), found 557712",
        lambda: with_optimizer("lbfgs_m", 2**31 - 1, LBFGS),
    ),
    "negative iteration": _bad(
        "optimizer iter at offset 33588 (0x8334): expected at least 0, found -1", lambda: with_optimizer("iter", -1)
    ),
    "negative no_improvement of Adam": _bad(
        "adam n_no_improvement at offset 95304 (0x17448): expected at least 0, found -1",
        lambda: put(ADAM, len(ADAM) - 4, "<i", -1),
    ),
    "negative no_improvement of L-BFGS": _bad(
        "lbfgs n_no_improvement at offset 557708 (0x8828c): expected at least 0, found -2147483648",
        lambda: put(LBFGS, len(LBFGS) - 4, "<i", -(2**31)),
    ),
    "moments of another length": _bad(
        "tensor 42 'optimizer.adam.first_moments': dims at offset 33608 (0x8348): expected (7701,), found (7700,)",
        lambda: with_word(42, 3, 7700),
    ),
    "past loss values where there are none": _bad(
        "tensor 44 'optimizer.adam.past_loss_values': n_dims at offset 95284 (0x17434): expected 0, found 1",
        lambda: with_word(44, 0, 1),
    ),
    "memory of another length": _bad(
        "tensor 49 'optimizer.lbfgs.memory_ys': dims at offset 187908 (0x2de04): expected (6,), found (5,)",
        lambda: with_word(49, 3, 5, LBFGS),
    ),
    "a name among the optimizer's": _bad(
        "tensor 43 'optimizer.adam.second_moments': n_dims at offset 64468 (0xfbd4): expected 1, found 0",
        lambda: with_word(42, 1, 21),
    ),
    "a name at the optimizer's end": _bad(
        "tensor 44 'optimizer.adam.past_loss_values': padding at offset 95297 (0x17441): expected 31 bytes, found 11",
        lambda: with_word(44, 1, 1), TruncatedError,
    ),
    # --- the end
    "one byte too many": _bad(f"{_ENDS}95308 bytes (Adam), found 95309", lambda: ADAM + b"\0"),
    "many bytes too many": _bad(f"{_ENDS}95308 bytes (Adam), found 595308", lambda: ADAM + bytes(500_000)),
    "one byte too few": _bad(f"{_ENDS}95308 bytes (Adam), found 95307", lambda: ADAM[:-1], TruncatedError),
    "between Adam and L-BFGS": _bad(
        f"{_ENDS}95308 bytes (Adam) or 557712 bytes (L-BFGS), found 557711", lambda: LBFGS[:-1]
    ),
}  # fmt: skip
"""By what is wrong with them."""
