"""The LoRA tensors of a checkpoint in file order: both names, ranks and dims, as arrays.

A model has three modules of its own and nine per layer.  Each carries two tensors, A with ne = (rank, n_in) and
B with ne = (rank, n_out).  Names on the GGUF side are gguf's own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

__all__ = [
    "LAYER_MODULES", "MODEL_MODULES", "MODULES", "N_FF", "OPTIMIZER_TENSORS", "OUTPUT", "TOKEN_EMBD", "Module",
    "Schema", "n_records", "schemas", "smallest_size",
]  # fmt: skip

N_FF: Final = -1
"""Among expected dims: one that the file decides; the first one found binds all others."""


class Module(NamedTuple):
    """One adapted weight of the model."""

    weight: str
    """Name in the ggcl file, without prefix and suffix."""
    tensor: gguf.MODEL_TENSOR
    """The same weight in gguf's terms."""
    rank: str
    """Field of `layout.HEADER` with its LoRA rank."""
    n_in: str
    """What its input dim is: a key of the dims given to `Schema.expected`."""
    n_out: str
    """What its output dim is."""

    @property
    def base_name(self) -> str:
        """Name of the weight in a GGUF file, ``blk.{bid}.`` included, without ``.weight``."""
        return gguf.TENSOR_NAMES[self.tensor]

    @property
    def name(self) -> str:
        """Last part of `base_name`, such as ``attn_q``."""
        return self.base_name.rpartition(".")[2]


_T = gguf.MODEL_TENSOR
MODEL_MODULES: Final = (
    Module("tok_embeddings", _T.TOKEN_EMBD, "tok_embeddings", "n_embd", "n_vocab"),
    Module("norm", _T.OUTPUT_NORM, "norm", "n_embd", "one"),
    Module("output", _T.OUTPUT, "output", "n_embd", "n_vocab"),
)
LAYER_MODULES: Final = (
    Module("attention_norm", _T.ATTN_NORM, "attention_norm", "n_embd", "one"),
    Module("attention.wq", _T.ATTN_Q, "wq", "n_embd", "n_embd"),
    Module("attention.wk", _T.ATTN_K, "wk", "n_embd", "n_embd_kv"),
    Module("attention.wv", _T.ATTN_V, "wv", "n_embd", "n_embd_kv"),
    Module("attention.wo", _T.ATTN_OUT, "wo", "n_embd", "n_embd"),
    Module("ffn_norm", _T.FFN_NORM, "ffn_norm", "n_embd", "one"),
    Module("feed_forward.w1", _T.FFN_GATE, "w1", "n_embd", "n_ff"),
    Module("feed_forward.w2", _T.FFN_DOWN, "w2", "n_ff", "n_embd"),
    Module("feed_forward.w3", _T.FFN_UP, "w3", "n_embd", "n_ff"),
)

MODULES: Final = MODEL_MODULES + LAYER_MODULES
"""All twelve, in the order of the file; the last nine recur with every layer."""
TOKEN_EMBD: Final = f"{gguf.TENSOR_NAMES[_T.TOKEN_EMBD]}.weight"
"""The weight that is looked up instead of multiplied by, for which llama.cpp and PEFT have rules of their own."""
OUTPUT: Final = f"{gguf.TENSOR_NAMES[_T.OUTPUT]}.weight"
"""The weight that a model with tied embeddings does not have: it uses `TOKEN_EMBD` in its place."""

OPTIMIZER_TENSORS: Final[dict[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "adam": (
        ("first_moments", ("nx",)),
        ("second_moments", ("nx",)),
        ("past_loss_values", ("past",)),
    ),
    "lbfgs": (
        ("current_parameters", ("nx",)),
        ("previous_parameters", ("nx",)),
        ("current_gradients", ("nx",)),
        ("previous_gradients", ("nx",)),
        ("search_direction", ("nx",)),
        ("past_loss_values", ("past",)),
        ("memory_alpha", ("lbfgs_m",)),
        ("memory_ys", ("lbfgs_m",)),
        ("memory_s", ("nx", "lbfgs_m")),
        ("memory_y", ("nx", "lbfgs_m")),
    ),
}
"""Optimizer tensors in file order: the last part of the GGUF name, and the dims (innermost first) as fields of
`layout.OPTIMIZER`.  past_loss_values is absent where past is 0."""

_DIMS: Final = ("one", "n_embd", "n_vocab", "n_ff", "n_embd_kv")
_NUMBER: Final = "#"  # stands for a digit of a layer's number
_LAYERS: Final = 128  # of one schema, 0.7 MB: what a file that lies about its layers can cost, and a cache hold


def n_records(n_layer: int) -> int:
    """Return the number of LoRA tensor records of a checkpoint with `n_layer` layers."""
    return 2 * (len(MODEL_MODULES) + n_layer * len(LAYER_MODULES))


def smallest_size(n_layer: int, ranks: Mapping[str, int], dims: Mapping[str, int]) -> int:
    """Return the bytes that the LoRA tensors take at the very least, whatever their names and n_ff are.

    Exact in Python integers, and computed without allocating anything by the numbers given, which no one has
    checked yet.  `ranks` has a value for every `Module.rank`, `dims` as in `Schema.expected`.
    """
    known = {"n_ff": 1, "n_embd_kv": dims["n_embd"], **dims, "one": 1}

    def bytes_of(modules: tuple[Module, ...]) -> int:
        return sum(2 * 20 + 4 * ranks[m.rank] * (known[m.n_in] + known[m.n_out]) for m in modules)

    return bytes_of(MODEL_MODULES) + n_layer * bytes_of(LAYER_MODULES)


@dataclass(frozen=True, eq=False)
class Schema:
    """Records of a checkpoint, one array entry a record.  Equal to itself alone, so that it can be a key of a cache."""

    names: tuple[str, ...]
    """GGUF names, such as ``blk.0.attn_q.weight.lora_a``."""
    name_words: npt.NDArray[np.uint32]
    """Names in the ggcl file, see `source_name`, as `sweep.sweep` compares them: zero-padded to whole words."""
    fixed: npt.NDArray[np.int64]
    """What is expected, without the dims."""
    rank: npt.NDArray[np.intp]
    """Which module each record belongs to: an index into the modules of the model, then of a layer."""
    dim: npt.NDArray[np.intp]
    """What the outer dim of each record is."""

    def source_name(self, row: int) -> str:
        """Return the name of a record in the ggcl file, such as ``layers.0.attention.wq.weight.loraA``."""
        first, length = self.fixed[row, 3:5].tolist()
        return self.name_words[first:].astype("<u4").tobytes()[:length].decode()

    def expected(self, ranks: Mapping[str, int], dims: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """Return what `sweep.sweep` expects of a file, (n, 5) int64.

        `ranks` has a value for every `Module.rank`, `dims` for n_embd and n_vocab.  Without n_ff in `dims` that is left
        to the file, without n_embd_kv (the length of keys and values) there is no grouped-query attention.
        """
        expected = self.fixed.copy()
        expected[:, 1] = np.array([ranks[m.rank] for m in MODULES], np.int64)[self.rank]
        values = {"n_ff": N_FF, "n_embd_kv": dims["n_embd"], **dims, "one": 1}
        expected[:, 2] = np.array([values[dim] for dim in _DIMS], np.int64)[self.dim]
        return expected


def schemas(n_layer: int) -> Iterator[Schema]:
    """Yield the records of a checkpoint with `n_layer` layers, piece by piece.

    The first piece has the records of the model itself too.  Any real model is one piece.  A file that claims more
    layers than it has is found out before the next piece is made.
    """
    for first in range(0, max(1, n_layer), _LAYERS):
        yield _schema(first, min(n_layer, first + _LAYERS))


@functools.lru_cache(maxsize=4)  # the next file is often of the same shape
def _schema(first: int, stop: int) -> Schema:
    """Return the records of the layers from `first` to before `stop`, after those of the model if `first` is 0."""
    of_model = MODEL_MODULES if first == 0 else ()
    numbers = list(map(str, range(first, stop)))
    # Written once for all layers, or for all whose numbers are as wide, and then filled in.
    block = "\n".join(f"{m.base_name.format(bid=_NUMBER)}.weight.lora_{end}" for m in LAYER_MODULES for end in "ab")
    names = [f"{m.base_name}.weight.lora_{end}" for m in of_model for end in "ab"]
    names += [name for number in numbers for name in block.replace(_NUMBER, number).split("\n")]

    padded, lengths = _padded([f"{m.weight}.weight.lora{end}" for m in of_model for end in "AB"])
    for width, some in itertools.groupby(numbers, len):
        number = _NUMBER * width
        ends = [f"layers.{number}.{m.weight}.weight.lora{end}" for m in LAYER_MODULES for end in "AB"]
        block, of_block = _padded(ends)
        for n in some:
            padded += block.replace(number, n)
            lengths += of_block
    name_words = np.frombuffer(padded.encode(), "<u4").astype(np.uint32)
    name_words.flags.writeable = False
    n_words = np.array(lengths, np.int64) // 4 + 1

    fixed = np.zeros((len(names), 5), np.int64)
    fixed[:, 0] = 2
    fixed[:, 3] = np.cumsum(n_words) - n_words
    fixed[:, 4] = lengths
    modules = list(range(len(of_model))) + list(range(len(MODEL_MODULES), len(MODULES))) * len(numbers)
    module = np.array(modules, np.intp)
    in_out = np.array([[_DIMS.index(m.n_in), _DIMS.index(m.n_out)] for m in MODULES], np.intp)
    return Schema(tuple(names), name_words, fixed, np.repeat(module, 2), in_out[module].ravel())


def _padded(names: Sequence[str]) -> tuple[str, list[int]]:
    """Return names, each with zeros up to whole words, one at least, so that a last, partial word always exists."""
    return "".join(name.ljust(len(name) // 4 * 4 + 4, "\0") for name in names), list(map(len, names))
