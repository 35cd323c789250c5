"""GGUF and ggla files taken apart and put together, with plain struct: nothing here is shared with the readers."""

import copy
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ggcl_fast import open_checkpoint
from ggcl_fast.targets import checkpoint as finetune_gguf
from ggcl_fast.testing import Shape, checkpoint_bytes

from .reference import gguf_name

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


class Collected(bytearray):
    """An output in memory."""

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        for piece in pieces:
            self += piece


def converted(data: bytes) -> bytes:
    """Return the GGUF checkpoint that a checkpoint is converted to."""
    out = Collected()
    with open_checkpoint(data) as checkpoint:
        finetune_gguf.write(checkpoint, out)
    return bytes(out)


def string(text: bytes | str) -> bytes:
    """Return a string as it stands in a file."""
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


@dataclass
class Tensor:
    """One tensor: what its info says, and its data."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None
    """Other than where it is."""


@dataclass
class Parts:
    """A GGUF file in parts."""

    version: int = 3
    keys: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    """Type and bytes of each value."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alignment: int = 32
    n_keys: int | None = None
    n_tensors: int | None = None

    def put(self, name: str, kind: int, value: object) -> "Parts":
        """Set a key, at the end if it is new."""
        packed = string(str(value)) if kind == STRING else struct.pack("<" + CODES[kind], value)
        self.keys[name.encode()] = kind, packed
        return self

    def u32(self, name: str, value: int) -> "Parts":
        return self.put(name, U32, value)

    def without(self, *names: str) -> "Parts":
        for name in names:
            if self.keys.pop(name.encode(), None) is None:
                del self.tensors[name]
        return self

    def build(self) -> bytes:
        """Return the file."""
        head = struct.pack(
            "<4sIQQ", b"GGUF", self.version, len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(self.keys) if self.n_keys is None else self.n_keys,
        )  # fmt: skip
        head += b"".join(string(name) + struct.pack("<I", kind) + value for name, (kind, value) in self.keys.items())
        data = b""
        for tensor in self.tensors.values():
            head += string(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            head += struct.pack("<IQ", tensor.type, len(data) if tensor.offset is None else tensor.offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data


def marks(data: bytes) -> list[int]:
    """Return the offsets of all numbers in the header of a GGUF file, as far as it can be followed."""
    found = [0, 4, 8, 12, 16, 20]
    try:
        _, _, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        at = 24

        def text() -> None:
            nonlocal at
            found.extend((at, at + 4, at + 8))
            at += 8 + struct.unpack_from("<Q", data, at)[0]

        for _ in range(min(n_keys, 200)):
            text()
            found.extend((at, at + 4))
            (kind,) = struct.unpack_from("<I", data, at)
            at += 4
            if kind == ARRAY:
                kind, n = struct.unpack_from("<IQ", data, at)
                found.extend((at, at + 4, at + 8))
                at += 12 + n * SIZES.get(kind, 0)
                for _ in range(min(n, 50) if kind == STRING else 0):
                    text()
            elif kind == STRING:
                text()
            else:
                at += SIZES[kind]
        for _ in range(min(n_tensors, 200)):
            text()
            (n_dims,) = struct.unpack_from("<I", data, at)
            found.extend(range(at, at + 4 + 8 * min(n_dims, 5) + 12, 4))
            at += 4 + 8 * n_dims + 12
    except (struct.error, KeyError, OverflowError):
        pass
    return [at for at in found if at + 4 <= len(data)]


def parse(data: bytes) -> Parts:
    """Take a sound file apart that has no arrays of strings."""
    parts = Parts()
    _, parts.version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    at = 24

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return data[at - n : at]

    def text() -> bytes:
        return take(struct.unpack("<Q", take(8))[0])

    for _ in range(n_keys):
        name = text()
        (kind,) = struct.unpack("<I", take(4))
        parts.keys[name] = kind, string(text()) if kind == STRING else take(SIZES[kind])
    infos = []
    for _ in range(n_tensors):
        name = text()
        (n_dims,) = struct.unpack("<I", take(4))
        dims = struct.unpack(f"<{n_dims}Q", take(8 * n_dims))
        infos.append((name, dims, *struct.unpack("<IQ", take(12))))
    start = -(-at // 32) * 32
    for name, dims, kind, offset in infos:
        nbytes = 4 * int(np.prod(dims))
        parts.tensors[name.decode()] = Tensor(name, dims, kind, data[start + offset :][:nbytes])
    return parts


def edited(parts: Parts, *edits: Callable[[Parts], object]) -> bytes:
    """Return the file that `parts` makes after `edits`; `parts` stays as it is."""
    changed = copy.deepcopy(parts)
    for edit in edits:
        edit(changed)
    return changed.build()


def version_1(shape: Shape, *, n_head_kv: int | None = None, short_dims: bool = False, seed: int = 0) -> Parts:
    """Return a checkpoint as finetune builds up to 2024 wrote it; `short_dims` without dims of 1 at the end."""
    parts = parse(converted(checkpoint_bytes(shape, seed=seed)))
    for what, count in (("iteration", 17), ("sample", 34), ("token", 2**33)):
        parts.put(f"training.{what}_count", U64, count)
    parts.put("training.file_version", U32, 1)
    parts.put("training.epoch_count", U64, 2).put("training.shuffle.samples_hash", U64, 2**64 - 1)
    parts.put("training.shuffle.rng_state", STRING, "1 2 3").put("llama.context_length", U32, 64)
    parts.put("llama.rope.freq_base", F32, 10000.0)
    if n_head_kv is not None:
        parts.u32("llama.attention.head_count_kv", n_head_kv)
        n_kv = shape.n_embd // shape.n_head * n_head_kv
        for name, tensor in parts.tensors.items():
            if name.endswith(("attn_k.weight.lora_b", "attn_v.weight.lora_b")):
                tensor.dims = tensor.dims[0], n_kv
                tensor.data = tensor.data[: 4 * tensor.dims[0] * n_kv]
        nx = sum(len(t.data) // 4 for name, t in parts.tensors.items() if ".lora_" in name)
        parts.put("optimizer.parameter_count", U64, nx)
        for moment in ("first_moments", "second_moments"):
            tensor = parts.tensors[f"optimizer.adam.{moment}"]
            tensor.dims, tensor.data = (nx,), tensor.data[: 4 * nx]
    for tensor in parts.tensors.values() if short_dims else ():
        while len(tensor.dims) > 1 and tensor.dims[-1] == 1:
            tensor.dims = tensor.dims[:-1]
    return parts


@dataclass
class Record:
    """One record of a ggla file."""

    name: bytes
    dims: tuple[int, ...]
    data: bytes
    dtype: int = 0


def ggla_bytes(records: Sequence[Record], *, rank: int = 4, alpha: int = 4, version: int = 1) -> bytes:
    """Return a ggla file."""
    out = struct.pack("<4I", 0x67676C61, version, rank, alpha)
    for record in records:
        out += struct.pack(f"<3I{len(record.dims)}I", len(record.dims), len(record.name), record.dtype, *record.dims)
        out += record.name
        out += bytes(-len(out) % 32) + record.data
    return out


def ggla_records(shape: Shape, *, old_names: bool = True, seed: int = 0) -> list[Record]:
    """Return the records of the adapter that belongs to ``checkpoint_bytes(shape, seed=seed)``."""
    with open_checkpoint(checkpoint_bytes(shape, seed=seed)) as checkpoint:
        records = []
        for old, ne0, ne1 in shape.lora_tensors():
            name = gguf_name(old)
            shown = old if old_names else name.replace("lora_a", "loraA").replace("lora_b", "loraB")
            records.append(Record(shown.encode(), (ne0, ne1), checkpoint.tensors[name].tobytes()))
        return records


def ggla_marks(data: bytes) -> list[int]:
    """Return the offsets of all numbers in a ggla file, as far as it can be followed."""
    found = [0, 4, 8, 12]
    at = 16
    while at + 20 <= len(data) and len(found) < 2000:
        n_dims, name_len, _, ne0, ne1 = struct.unpack_from("<5I", data, at)
        if n_dims != 2 or name_len > 200:
            break
        found += [*range(at, at + 24, 4), at + 20 + name_len - 4]
        at = -(-(at + 20 + name_len) // 32) * 32 + 4 * ne0 * ne1
    return [mark for mark in found if 0 <= mark <= len(data) - 4]
