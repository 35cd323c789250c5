"""Checkpoints made to measure, for tests and benchmarks.

A writer of ggcl files in plain `struct`, of any shape and size.  It shares no code with the reader, so that each can
be held against the other, and it can be told to lie, so that the reader can be held against lies.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Literal

import numpy as np

__all__ = ["RANKS", "SHAPE_7B", "SHAPE_13B", "Shape", "checkpoint_bytes", "write_checkpoint"]

RANKS: Final = (
    "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "tok_embeddings", "norm", "output",
)  # fmt: skip
"""The LoRA ranks in the order of the header."""

_DEFAULT_RANKS: Final = {name: 1 if "norm" in name else 4 for name in RANKS}
_CHUNK: Final = 1 << 20  # elements made and written at a time


@dataclass(frozen=True)
class Shape:
    """Everything that decides the size of a checkpoint, with finetune's defaults on a tiny model."""

    n_layer: int = 2
    n_embd: int = 32
    n_vocab: int = 270
    n_mult: int = 32
    n_head: int = 2
    n_rot: int = 16
    n_ff: int | None = None
    """Feed-forward length; None is what the formula of the time gives."""
    ranks: Mapping[str, int] = field(default_factory=lambda: _DEFAULT_RANKS)
    """LoRA ranks by the names in `RANKS`."""
    optimizer: Literal["adam", "lbfgs"] = "adam"
    past: int = 0
    """Past loss values kept."""
    lbfgs_m: int = 6
    """L-BFGS corrections kept."""

    @property
    def feed_forward_length(self) -> int:
        """The feed-forward length that the tensors have."""
        if self.n_ff is not None:
            return self.n_ff
        return -(-(2 * (4 * self.n_embd) // 3) // self.n_mult) * self.n_mult

    def lora_tensors(self) -> list[tuple[str, int, int]]:
        """Name, ne[0] and ne[1] of every LoRA tensor, in file order."""
        e, v, f = self.n_embd, self.n_vocab, self.feed_forward_length
        modules = [("tok_embeddings", "tok_embeddings", e, v), ("norm", "norm", e, 1), ("output", "output", e, v)]
        for i in range(self.n_layer):
            modules += [
                (f"layers.{i}.attention_norm", "attention_norm", e, 1),
                *((f"layers.{i}.attention.{w}", w, e, e) for w in ("wq", "wk", "wv", "wo")),
                (f"layers.{i}.ffn_norm", "ffn_norm", e, 1),
                (f"layers.{i}.feed_forward.w1", "w1", e, f),
                (f"layers.{i}.feed_forward.w2", "w2", f, e),
                (f"layers.{i}.feed_forward.w3", "w3", e, f),
            ]
        return [
            (f"{name}.weight.lora{end}", self.ranks[rank], n)
            for name, rank, n_in, n_out in modules
            for end, n in (("A", n_in), ("B", n_out))
        ]


SHAPE_7B: Final = Shape(n_layer=32, n_embd=4096, n_vocab=32000, n_mult=256, n_head=32, n_rot=128)
"""LLaMA 7B at finetune's default ranks: 582 LoRA tensors, 126.6 MB with Adam."""
SHAPE_13B: Final = Shape(n_layer=40, n_embd=5120, n_vocab=32000, n_mult=256, n_head=40, n_rot=128)
"""LLaMA 13B at finetune's default ranks: 726 LoRA tensors, 196.3 MB with Adam."""


def checkpoint_bytes(shape: Shape = Shape(), *, seed: int = 0) -> bytes:
    """Return a sound checkpoint of this shape; see `write_checkpoint`."""
    file = io.BytesIO()
    write_checkpoint(file, shape, seed=seed)
    return file.getvalue()


def write_checkpoint(file: BinaryIO, shape: Shape = Shape(), *, seed: int = 0) -> None:
    """Write a sound checkpoint of this shape to `file`, from its current position 0 on.

    Data are uniform random numbers in [-0.5, 0.5), the same for the same `seed`.  Memory stays small at any size.
    """
    rng = np.random.default_rng(seed)
    file.write(
        struct.pack(
            "<23I", 0x6767636C, 0, 17, 34, 4352,
            shape.n_vocab, shape.n_embd, shape.n_mult, shape.n_head, shape.n_layer, shape.n_rot,
            *(shape.ranks[name] for name in RANKS),
        )
    )  # fmt: skip

    def record(name: str, *ne: int) -> None:
        encoded = name.encode()
        file.write(struct.pack(f"<3I{len(ne)}I", len(ne), len(encoded), 0, *ne) + encoded)
        file.write(b"\0" * (-file.tell() % 32))
        left = math.prod(ne) if ne else 0
        while left:
            n = min(left, _CHUNK)
            file.write((rng.random(n, np.float32) - np.float32(0.5)).astype("<f4").tobytes())
            left -= n

    tensors = shape.lora_tensors()
    for name, ne0, ne1 in tensors:
        record(name, ne0, ne1)
    nx = sum(ne0 * ne1 for _, ne0, ne1 in tensors)
    past = (shape.past,) if shape.past else ()
    if shape.optimizer == "adam":
        file.write(struct.pack("<IiiqiI", 1, shape.past, 0, nx, 17, 0))
        for vector in ((nx,), (nx,), past):
            record("", *vector)
        file.write(struct.pack("<ffi", 5.5, 5.625, 2))
    else:
        m = shape.lbfgs_m
        file.write(struct.pack("<IiiqiI", 1, shape.past, m, nx, 17, 0))
        for ne in (*[(nx,)] * 5, past, (m,), (m,), (nx, m), (nx, m)):
            record("", *ne)
        file.write(struct.pack("<ffiiii", 5.5, 0.5, 4, 5, 4, 2))
