"""Sound files made unsound, and what must hold for whatever comes out."""

import contextlib
import ctypes
import mmap
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from typing import Final
from unittest import mock

import numpy as np

from ggcl_fast import CheckpointError, open_checkpoint
from ggcl_fast.inspection.summarise import summarise
from ggcl_fast.readers import ggcl
from ggcl_fast.readers.engine import Engine
from ggcl_fast.storage.outputs import Nowhere
from ggcl_fast.targets import checkpoint as finetune_gguf
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from .adapters import Type, adapter_bytes, foreign_ggla, made
from .engines import COMPILED_OR_NOT, warm
from .gguf_parts import converted, ggla_bytes, ggla_marks, ggla_records, marks, version_1

ONES: Final = dict.fromkeys(RANKS, 1)
TINY: Final = Shape(n_layer=1, n_embd=2, n_vocab=3, n_mult=1, past=1, ranks=ONES)
GGCL: Final = (
    checkpoint_bytes(Shape()),
    checkpoint_bytes(Shape(optimizer="lbfgs", lbfgs_m=2, past=3, ranks=ONES)),
    checkpoint_bytes(Shape(n_layer=0, n_embd=1, n_vocab=1, n_mult=1, ranks=ONES)),
    checkpoint_bytes(TINY),
)
"""Sound ggcl files small enough to be tried by the thousand."""
HALVES: Final = (Type.F16, Type.F16)
BASES: Final = (
    *GGCL,
    converted(checkpoint_bytes(TINY)),
    converted(checkpoint_bytes(Shape(optimizer="lbfgs", lbfgs_m=1, past=3, n_layer=1, n_embd=4, ranks=ONES))),
    version_1(Shape(n_layer=1, n_embd=4, n_vocab=3, ranks=ONES), n_head_kv=1, short_dims=True).build(),
    ggla_bytes(ggla_records(TINY), alpha=8),
    ggla_bytes(ggla_records(Shape(), old_names=False)),
    foreign_ggla([made("blk.1.attn_q", 5, 3, 4, HALVES, old_names=True), made("blk.0.ffn_up", 3, 1, 7, HALVES)]),
    adapter_bytes(
        [made("blk.0.attn_v", 32, 2, 3, (Type.Q8_0, Type.BF16)), made("token_embd", 3, 1, 5, HALVES)],
        norms=["blk.0.attn_norm"],
    ),
)  # fmt: skip
"""Sound files small enough to be tried by the thousand."""

LONGEST: Final = 1.0  # seconds that opening may take
MEMORY: Final = 8  # times the file that opening may allocate at most, and
CONSTANT: Final = 4 << 20  # bytes besides: the kept names and plan of up to 512 layers
SPECIAL: Final = (
    0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x007FFFFF, 0x7F7FFFFF, 0xFF61B1E6,
    0x60AD78EC, 0x477FE000, 0x477FEFFF, 0x477FF000, 0xC77FE100, 0x7BFF7BFF, 0x7C00FC00, 0x00010001,
)  # fmt: skip
"""Words that are floats of every kind, or pairs of F16: NaN, infinite, denormal, zero, at the end of a type's range."""
NUMBERS: Final = (0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def landmarks(data: bytes) -> list[int]:
    """Offsets of the words of `data` that mean something, as far as it can be followed."""
    if data.startswith(b"GGUF"):
        return marks(data)
    if data.startswith(b"algg"):
        return ggla_marks(data)
    found = list(range(0, min(92, len(data) - 3), 4))
    at = 92
    for _ in range(100):
        if at + 20 > len(data):
            break
        n_dims, name_len = struct.unpack_from("<2I", data, at)
        if n_dims > 2 or name_len > 200:
            found += range(at, at + 20, 4)  # the optimizer's fixed part, or something mutated
            at += 28
            continue
        dims = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        found += range(at, at + 12 + 4 * n_dims, 4)
        at = -(-(at + 12 + 4 * n_dims + name_len) // 32) * 32
        at += 4 * dims[0] * (dims[1] if n_dims == 2 else 1) if dims else 0
    return found + list(range(max(0, len(data) - 24) & ~3, len(data) - 3, 4))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one thing changed: a field, a cut, a swap, an insertion, a byte."""
    places = landmarks(data) or [0]
    changed = bytearray(data)
    at = rng.choice(places)
    other = rng.choice(places)
    what = rng.randrange(10)
    if what < 5 and len(data) >= at + 4:
        old = int.from_bytes(data[at : at + 4], "little")
        values = (rng.choice(NUMBERS), rng.getrandbits(32), old + 1, old - 1, 2 * old, old ^ 1 << rng.randrange(32))
        struct.pack_into("<I", changed, at, rng.choice(values) & 0xFFFFFFFF)
    elif what == 5:
        del changed[rng.choice((at, rng.randrange(len(data) + 1), len(data) - rng.randrange(64))) :]
    elif what == 6:
        changed[at : at + 4], changed[other : other + 4] = changed[other : other + 4], changed[at : at + 4]
    elif what == 7:
        changed[at:at] = rng.choice((data[other : other + rng.randrange(600)], bytes(rng.randrange(70)), b"\xff" * 4))
    elif what == 8:
        del changed[at : at + rng.randrange(1, 70)]
    elif changed:
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a word, of a value most likely, changed to one of `SPECIAL`, or some in a row."""
    n = min(rng.choice((1, 1, 1, 64)), len(data) // 4)
    at = 4 * rng.randrange(len(data) // 4 - n + 1)
    return data[:at] + struct.pack("<I", rng.choice(SPECIAL)) * n + data[at + 4 * n :]


class Guarded:
    """Memory that ends where the next page cannot be read: reading past a buffer in it kills the process."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._map = mmap.mmap(-1, capacity + mmap.PAGESIZE)
        self._capacity = capacity
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + capacity), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def holding(self, data: bytes) -> memoryview:
        """Return a view of `data` at the end, up to the padding to whole words that the sweep wants."""
        start = self._capacity - len(data) - (-len(data) % 4)
        self._map[start : start + len(data)] = data
        return memoryview(self._map)[start : start + len(data)]


GUARDED: Final = Guarded()


@contextlib.contextmanager
def within_bounds(nbytes: int, *, traced: bool, constant: int = CONSTANT) -> Iterator[None]:
    """Hold that the block takes neither too long nor too much memory for files of `nbytes`."""
    if traced:
        tracemalloc.start()
    begin = time.thread_time()
    try:
        yield
    finally:
        seconds = time.thread_time() - begin
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        tracemalloc.stop()
    assert seconds < LONGEST, f"{seconds} s"
    assert peak < MEMORY * nbytes + constant, f"{peak} bytes for a file of {nbytes}"


def verdict(data: bytes, engine: Engine, *, traced: bool = False) -> tuple[str, bytes]:
    """Open and convert `data`; return what was said and the table, or raise because a promise was broken."""
    checkpoint, said = None, ""
    try:
        with within_bounds(len(data), traced=traced):
            checkpoint = open_checkpoint(GUARDED.holding(data), engine=engine)
    except CheckpointError as error:
        said = f"{type(error).__name__}: {error}"
    if checkpoint is None:
        assert said.isprintable()
        return said, b""
    with checkpoint:
        table = checkpoint.table
        assert all(warning.isprintable() for warning in checkpoint.warnings)
        assert (table["offset"] + table["nbytes"] <= checkpoint.source.size).all()
        assert (np.diff(table["gguf_offset"]) > 0).all()
        assert len(checkpoint.names) == len(set(checkpoint.names)) == len(table)
        assert (checkpoint.optimizer is None) == (checkpoint.format in ("ggla", "lora"))
        nowhere = Nowhere()
        refused = ""
        try:
            finetune_gguf.write(checkpoint, nowhere)
        except CheckpointError as error:
            refused = str(error)
        assert bool(refused) == (len(checkpoint.extra) > 0 or checkpoint.optimizer is None)
        assert refused.isprintable()
        assert (nowhere.nbytes > int(table["nbytes"].sum())) != bool(refused)
        return " ".join(checkpoint.warnings), table.tobytes()


def examine(data: bytes, *, traced: bool = False) -> None:
    """Hold that the three ways through the records say the same of `data`, and that nothing else goes wrong."""
    warm()
    said = verdict(data, COMPILED_OR_NOT[0], traced=traced)
    assert said == verdict(data, "python", traced=traced)
    if data.startswith(b"lcgg"):
        with mock.patch.object(ggcl, "prove", return_value=False):  # so that the sweep is interpreted
            assert said == verdict(data, "python", traced=traced)


def is_refused_or_can_be_read(data: bytes) -> None:
    """Hold that an adapter is refused in words that can be shown, or all of it read, in two ways that agree."""
    said = ""
    try:
        checkpoint = open_checkpoint(GUARDED.holding(data))
    except CheckpointError as error:
        said = str(error)
    else:
        with checkpoint, open_checkpoint(data) as other:
            for name, matrix in checkpoint.tensors.items():
                assert matrix.dtype == np.float32
                np.testing.assert_array_equal(other.tensors[name], matrix)
            assert len(checkpoint.pairs) * 2 == len(checkpoint.names)
            assert len(summarise(other).tensors) == len(checkpoint.names)
    assert said.isprintable()
