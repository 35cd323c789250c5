"""Adapters that finetune did not write, made with plain struct and with gguf: nothing here is shared with the readers.

What convert-lora-to-ggml.py made of Hugging Face's adapters, and GGUF adapters as today's converters write them.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from .gguf_parts import Record, ggla_bytes
from .models import finish

Floats = npt.NDArray[np.float32]
Type: TypeAlias = gguf.GGMLQuantizationType

OLD_NAMES = {
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip
"""What the first versions of convert-lora-to-ggml.py called the weights of LLaMA."""
DTYPES = {Type.F32: 0, Type.F16: 1}
TOKEN_EMBD = "token_embd"


@dataclass(frozen=True)
class Lora:
    """One pair: `b @ a` is added to a weight, alpha / rank times."""

    weight: str
    """As GGUF files have it, such as ``blk.0.attn_q``."""
    a: Floats
    """(rank, n_in), of values that its type can hold."""
    b: Floats
    """(n_out, rank)."""
    a_type: Type = Type.F32
    b_type: Type = Type.F32
    old_names: bool = False

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        return int(self.weight.split(".")[1]) if self.weight.startswith("blk.") else None

    @property
    def shown(self) -> dict[str, Floats]:
        """What a checkpoint is to have."""
        return {f"{self.weight}.weight.lora_a": self.a.T, f"{self.weight}.weight.lora_b": self.b}

    def delta(self, scale: float) -> npt.NDArray[np.float64]:
        return scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))

    def rounding(self, scale: float) -> npt.NDArray[np.float64]:
        """What a delta may be off, where B times the scale is rounded to float32."""
        largest: npt.NDArray[np.float64] = np.abs(self.b).astype(np.float64) @ np.abs(self.a).astype(np.float64)
        return abs(scale) * largest * 2.0**-23


def values(rng: np.random.Generator, shape: tuple[int, int], type: Type) -> Floats:
    """Return values that are the same after they were stored in rows of `type`."""
    if type in DTYPES:
        return rng.normal(0, 0.3, shape).astype(np.float16 if type == Type.F16 else np.float32).astype(np.float32)
    units = rng.integers(-127, 128, shape)
    if type == Type.Q8_0:
        units[:, ::32] = 127  # the largest of each block is its scale
    return (units / 128).astype(np.float32)


def made(
    weight: str,
    n_in: int,
    rank: int,
    n_out: int,
    types: tuple[Type, Type] = (Type.F32, Type.F32),
    *,
    seed: int = 0,
    old_names: bool = False,
) -> Lora:
    """Return a pair with random values; a type whose blocks do not fit becomes F16."""
    rng = np.random.default_rng((seed, *weight.encode()))
    shapes = ((n_in, rank) if weight == TOKEN_EMBD else (rank, n_in)), (n_out, rank)
    a_type, b_type = (
        Type.F16 if shape[1] % gguf.GGML_QUANT_SIZES[type][0] else type for shape, type in zip(shapes, types)
    )
    a = values(rng, shapes[0], a_type)
    b = values(rng, shapes[1], b_type)
    return Lora(weight, a.T if weight == TOKEN_EMBD else a, b, a_type, b_type, old_names)


def foreign_records(loras: Sequence[Lora]) -> list[Record]:
    """Return the records of a ggla file of these pairs, A transposed as convert-lora-to-ggml.py had it."""
    records = []
    for lora in loras:
        name = lora.weight
        if lora.old_names and lora.module in OLD_NAMES:
            name = f"layers.{lora.layer}.{OLD_NAMES[lora.module]}"
        for end, matrix, type in (("A", lora.a.T, lora.a_type), ("B", lora.b, lora.b_type)):
            data = np.ascontiguousarray(matrix, "<f2" if type == Type.F16 else "<f4").tobytes()
            records.append(Record(f"{name}.weight.lora{end}".encode(), matrix.shape[::-1], data, DTYPES[type]))
    return records


def foreign_ggla(loras: Sequence[Lora], *, r: int = 4, alpha: int = 8) -> bytes:
    """Return the ggla file that convert-lora-to-ggml.py would have made."""
    return ggla_bytes(foreign_records(loras), rank=r, alpha=alpha)


def write_adapter(
    path: Path, loras: Sequence[Lora], *, alpha: float | None = 8.0, arch: str = "llama", norms: Sequence[str] = ()
) -> bytes:
    """Write a GGUF adapter, with whole weights of `norms` between its pairs, and return its bytes."""
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(7, np.float32))
    for lora in loras:
        matrices = [(lora.a, lora.a_type), (lora.b, lora.b_type)]
        if lora.weight == TOKEN_EMBD:
            matrices = [(lora.b, lora.b_type), (lora.a.T, lora.a_type)]
        for end, (matrix, type) in zip("ab", matrices):
            data = gguf.quants.quantize(np.ascontiguousarray(matrix), type)
            writer.add_tensor(f"{lora.weight}.weight.lora_{end}", data, raw_dtype=type)
    finish(writer, path)
    return path.read_bytes()


def adapter_bytes(loras: Sequence[Lora], **how: Any) -> bytes:
    """Return what `write_adapter` writes."""
    with tempfile.TemporaryDirectory() as folder:
        return write_adapter(Path(folder, "adapter"), loras, **how)


def deltas(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Return what llama.cpp adds to each weight, by the name of the weight, of a GGUF adapter of any type."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    found = {}
    for name, a in tensors.items():
        weight, _, end = name.rpartition(".weight.lora_")
        if end == "a":
            b = tensors[f"{weight}.weight.lora_b"]
            rank = b.shape[1]
            scale = alpha / rank if alpha else 1.0
            # Embeddings are looked up by a token's row of A.
            found[weight] = scale * (a @ b.T if weight == TOKEN_EMBD else b @ a)
    return found


def reordered(rows: npt.NDArray[np.float64], n_head: int) -> npt.NDArray[np.float64]:
    """Return Hugging Face's rows of q or k as GGUF models have them: the halves of each head by turns."""
    n = len(rows) // n_head
    order = []
    for head in range(n_head):
        for i in range(n // 2):
            order += [head * n + i, head * n + n // 2 + i]
    return rows[order]
