"""Base models and checkpoints of any shape, made in memory: what ggcl files cannot express is built by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

import ggcl_fast
from ggcl_fast.checkpoint import Adam, ModelParameters, Training
from ggcl_fast.formats.layout import TENSOR
from ggcl_fast.storage.sources import SourceBuffer

from .reference import DATA

Floats = npt.NDArray[np.float32]
Type: TypeAlias = gguf.GGMLQuantizationType
BASE = DATA / "base.gguf"


def finish(writer: gguf.GGUFWriter, path: Path | None = None) -> None:
    """Write the file that `writer` was given everything for, to `path` if it was not given one."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Model:
    """The shape of a base model."""

    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    n_ff: int = 96
    n_vocab: int = 288
    tied: bool = False
    kind: Type = Type.F32
    alignment: int = 32
    ranks: dict[str, int] = field(default_factory=dict)
    """LoRA ranks by the last part of the name; 2 where it is not there."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Numpy shapes of all weights, the output's too."""
        e, kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.n_vocab, e), "output_norm.weight": (e,), "output.weight": (self.n_vocab, e),
        }  # fmt: skip
        for i in range(self.n_layer):
            layer = {
                "attn_norm": (e,), "attn_q": (e, e), "attn_k": (kv, e), "attn_v": (kv, e), "attn_output": (e, e),
                "ffn_norm": (e,), "ffn_gate": (self.n_ff, e), "ffn_down": (e, self.n_ff), "ffn_up": (self.n_ff, e),
            }  # fmt: skip
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes

    def factors(self, seed: int = 0) -> dict[str, tuple[Floats, Floats]]:
        """Random A (n_in, rank) and B (n_out, rank) of every weight."""
        rng = np.random.default_rng(seed)
        found = {}
        for name, shape in self.shapes().items():
            rank = self.ranks.get(name.split(".")[-2], 2)
            n_out, n_in = shape if len(shape) == 2 else (1, shape[0])
            a, b = (rng.normal(0, 0.2, (n, rank)).astype(np.float32) for n in (n_in, n_out))
            found[name] = a, b
        return found

    def checkpoint(self, factors: dict[str, tuple[Floats, Floats]], scale: float = 1.0) -> ggcl_fast.Checkpoint:
        """A checkpoint that holds `factors`, open, and no optimizer tensors."""
        tensors = {f"{name}.lora_{end}": ab[end == "b"] for name, ab in factors.items() for end in "ab"}
        table = np.zeros(len(tensors), TENSOR)
        at = 0
        for row, values in zip(table, tensors.values()):
            row["offset"], row["nbytes"], row["gguf_offset"] = at + 4, values.nbytes, at
            row["ne1"], row["ne0"], row["n_dims"] = *values.shape, 2
            at += values.nbytes
        data = b"junk" + b"".join(values.tobytes() for values in tensors.values())
        return ggcl_fast.Checkpoint(
            SourceBuffer(data, "made.ggcl"),
            ModelParameters(
                self.n_vocab, self.n_head * self.head_dim, 32, self.n_head, self.n_layer, self.head_dim, self.n_ff,
                self.n_head_kv,
            ),
            {}, Training(1, 1, 1), Adam(0, 0, 1, False, 1.0, 1.0, 0), tuple(tensors), table, (), scale=scale,
        )  # fmt: skip

    def weights(self, seed: int = 1) -> dict[str, Floats]:
        """Random weights, norms near one; no output weight where the embeddings are tied."""
        rng = np.random.default_rng(seed)
        return {
            name: ((len(shape) == 1) + rng.normal(0, 0.1, shape)).astype(np.float32)
            for name, shape in self.shapes().items()
            if not (self.tied and name == "output.weight")
        }

    def write(
        self,
        path: Path,
        weights: dict[str, Floats] | None = None,
        *,
        tokenizer: bool = False,
        extra: Mapping[str, Floats] | None = None,
    ) -> dict[str, Floats]:
        """Write a base model, with the tokenizer of base.gguf where a program is to load it.

        Returns its weights as they can be read back.
        """
        writer = gguf.GGUFWriter(None, "llama")
        writer.add_custom_alignment(self.alignment)
        for name, value in (
            ("context_length", 128), ("embedding_length", self.n_head * self.head_dim), ("block_count", self.n_layer),
            ("feed_forward_length", self.n_ff), ("attention.head_count", self.n_head),
            ("attention.head_count_kv", self.n_head_kv), ("rope.dimension_count", self.head_dim),
        ):  # fmt: skip
            writer.add_uint32(f"llama.{name}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for name, reader_field in gguf.GGUFReader(BASE).fields.items() if tokenizer else ():
            if name.startswith("tokenizer."):
                kinds = reader_field.types
                writer.add_key_value(name, reader_field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
        stored = {}
        for name, values in (self.weights() if weights is None else weights).items():
            kind = Type.F32 if values.ndim == 1 else self.kind
            data = gguf.quants.quantize(values, kind)
            stored[name] = gguf.quants.dequantize(data, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        finish(writer, path)
        return stored


def is_norm(weight: str) -> bool:
    return weight.split(".")[-2] in ("attn_norm", "ffn_norm", "output_norm")


def delta(a: Floats, b: Floats, scale: float = 1.0) -> npt.NDArray[np.float64]:
    """What training added to a weight, in double precision: (n_out, n_in), or (n_in,) for a norm."""
    product = scale * (b.astype(np.float64) @ a.astype(np.float64).T)
    return product[0] if len(product) == 1 else product


def read_gguf(path: Path) -> dict[str, Floats]:
    """All tensors of a GGUF file, dequantized."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def kinds_of(path: Path) -> dict[str, Type]:
    """Types of all tensors of a GGUF file."""
    return {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}


def field_value(path: Path, name: str) -> Any:
    """The value of a key of a GGUF file."""
    return gguf.GGUFReader(path).fields[name].contents()
