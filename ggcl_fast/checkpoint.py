"""What stands in the middle: a checkpoint, whatever it was read from and whatever it becomes.

Readers make a `Checkpoint`, targets and inspection take one.  It never changes; this module knows neither files nor
formats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError
from .storage.sources import Source

__all__ = [
    "ALONE",
    "Adam",
    "Checkpoint",
    "Format",
    "Lbfgs",
    "ModelParameters",
    "Optimizer",
    "Pair",
    "Rows",
    "Training",
    "layer_of",
]


class ModelParameters(NamedTuple):
    """Shape of the base model, as the file gives it; 0 for what its format does not tell.

    A GGUF file tells all but n_mult; a ggla file n_vocab, n_embd, n_layer and n_ff, by its tensors.
    """

    n_vocab: int
    """Tokens in the vocabulary."""
    n_embd: int
    """Embedding length."""
    n_mult: int
    """What n_ff was rounded up to a multiple of."""
    n_head: int
    """Attention heads."""
    n_layer: int
    """Layers."""
    n_rot: int
    """Rotary dimensions per head."""
    n_ff: int
    """Feed-forward length: of ggcl and ggla files from the shapes of w1, w2 and w3, which no field stores."""
    n_head_kv: int
    """Heads of keys and values: fewer than n_head with grouped-query attention, which ggcl files never have."""


class Training(NamedTuple):
    """How far the training went; all 0 for a ggla file."""

    iterations: int
    samples: int
    tokens: int


class Adam(NamedTuple):
    """State of the Adam optimizer; its moments are among the checkpoint's tensors."""

    past: int
    """Number of past loss values kept."""
    n_parameters: int
    """Number of LoRA elements trained."""
    iteration: int
    """Optimizer iterations so far."""
    just_initialized: bool
    best_loss: float
    previous_loss: float
    no_improvement_count: int
    name: Literal["adam"] = "adam"


class Lbfgs(NamedTuple):
    """State of the L-BFGS optimizer; its vectors are among the checkpoint's tensors."""

    past: int
    """Number of past loss values kept."""
    n_parameters: int
    """Number of LoRA elements trained."""
    iteration: int
    """Optimizer iterations so far."""
    just_initialized: bool
    m: int
    """Number of corrections that approximate the Hessian."""
    best_loss: float
    step: float
    """Step of the line search."""
    j: int
    k: int
    end: int
    no_improvement_count: int
    name: Literal["lbfgs"] = "lbfgs"


_ENDS: Final = (".lora_a", ".lora_b")
ALONE: Final = "one of a pair without the other"
"""What is said of a tensor whose partner is missing."""
_LONGEST_NUMBER: Final = 9  # digits of a layer

Optimizer = Adam | Lbfgs
Format = Literal["ggcl", "gguf", "ggla", "lora"]
"""What a checkpoint was read from: a finetune checkpoint in either form, or an adapter: a ggla file, or GGUF's."""
Rows = Literal["gguf", "hf"]
"""Whose order the rows of B have for q and k: that of GGUF models, or that of Hugging Face's."""


def layer_of(parts: Sequence[str]) -> int | None:
    """Return the layer that a tensor belongs to, by its GGUF name split at dots; None for one of the model itself."""
    number = parts[1] if len(parts) > 1 and parts[0] == "blk" else ""
    is_number = number.isascii() and number.isdecimal() and len(number) <= _LONGEST_NUMBER
    return int(number) if is_number and (number[0] != "0" or number == "0") else None


class Pair(NamedTuple):
    """Two tensors of a checkpoint that change one weight of its base model: norms too."""

    weight: str
    """GGUF name of the weight, such as ``blk.0.attn_q.weight``."""
    layer: int | None
    """0-based number of its layer, None for a weight of the model itself."""
    module: str
    """Which weight of the layer or model, such as ``attn_q``."""
    n_in: int
    n_out: int
    rank: int
    row_a: int
    """Row of `Checkpoint.table` with A, shape (n_in, rank)."""
    row_b: int
    """Row with B, shape (n_out, rank)."""
    scale: float
    """The delta is ``scale * B @ A.T``."""

    @property
    def is_norm(self) -> bool:
        """Whether the weight is a vector that scales, which llama.cpp's adapters cannot change."""
        return self.module.endswith("norm")

    @property
    def dims(self) -> tuple[int, ...]:
        """Dims of the weight, innermost first, as in the base model."""
        return (self.n_in,) if self.is_norm else (self.n_in, self.n_out)


class _Tensors(Mapping[str, npt.NDArray[np.float32]]):
    """Tensors by GGUF name; each look-up makes a view, none makes a copy."""

    def __init__(self, source: Source, names: tuple[str, ...], table: npt.NDArray[np.void]) -> None:
        self._source = source
        self._rows = {name: row for row, name in enumerate(names)}
        self._table = table

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        row = self._table[self._rows[name]]
        flat = np.frombuffer(self._source.map(), "<f4", int(row["nbytes"]) // 4, int(row["offset"]))
        return flat.reshape(int(row["ne1"]), int(row["ne0"])) if row["n_dims"] == 2 else flat

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A finetune checkpoint, open for reading.

    Made by `open_checkpoint`.  A context manager; closing lets go of the file.  Tensor views taken before stay valid
    after it, asking for new ones raises `CheckpointError`.  Several threads can use one at once.
    """

    source: Source
    """Where the bytes are."""
    parameters: ModelParameters
    """Shape of the base model."""
    ranks: Mapping[str, int]
    """LoRA rank by header field: attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, tok_embeddings, norm, output.
    0 for those that an adapter without layers does not tell."""
    training: Training
    """Training counts."""
    optimizer: Optimizer | None
    """Optimizer state without its tensors; None for an adapter, which has none."""
    names: tuple[str, ...]
    """GGUF names of all tensors: of ggcl and ggla files in the order of the file, of GGUF files in that of ggcl."""
    table: npt.NDArray[np.void]
    """(n,) `layout.TENSOR`, a row a name: where each tensor is in the source and in the GGUF data section."""
    warnings: tuple[str, ...] = ()
    """What is unusual about the file and does not prevent its use."""
    format: Format = "ggcl"
    """What it was read from."""
    scale: float = 1.0
    """What deltas are multiplied by, see `Pair.scale`: lora_alpha / lora_r of a ggla file, 1.0 for every checkpoint."""
    alpha: float = 0.0
    """Of a GGUF adapter: deltas are multiplied by alpha / rank, each with its own rank; 0 stands for 1."""
    arch: str | None = "llama"
    """Architecture of the base model, as GGUF files name it; None where the file does not tell."""
    rows: Rows = "gguf"
    """Order of the rows of B for q and k."""
    zero_tail: int = 0
    """Bytes of zeros that the file ends with for no reason, as a download leaves them that was never finished."""
    partial: bool = False
    """Whether any subset of a model's weights may be there: of adapters that finetune did not write."""
    extra: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    """Keys of a GGUF file that `training.file_version` 0 does not have, or has with one value only: what would be lost
    by writing it."""

    def __post_init__(self) -> None:
        for name in ("ranks", "extra"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @functools.cached_property
    def tensors(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """Every tensor by its GGUF name, in the order of the file: read-only float32 views of the source.

        LoRA pairs are ``<name>.weight.lora_a`` of shape (n_in, rank) and ``<name>.weight.lora_b`` of shape
        (n_out, rank); what training added to the base weight is `Pair.scale` times ``lora_b @ lora_a.T``.  Optimizer
        tensors are
        ``optimizer.<optimizer>.<name>`` of shape (n_parameters,), or as `schema.OPTIMIZER_TENSORS` says.

        A file of more than `sources.SMALL` bytes is mapped at the first look-up: if somebody shortens it while you
        read the map, the operating system ends the process.  `convert` never does that.  An adapter with other
        types than float32, or in GGUF form, is decoded into memory instead.
        """
        return _Tensors(self.source, self.names, self.table)

    @functools.cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The LoRA pairs, in the order of the file.

        Raises
        ------
        CheckpointError
            A tensor has no partner, or another rank than its partner.
        """
        rows = dict(zip(self.names, range(len(self.names))))
        ranks, lengths = self.table["ne0"].tolist(), self.table["ne1"].tolist()
        pairs, n_ends = [], 0
        layers: dict[str, int | None] = {}  # of the modules of a layer the name is split once
        for name, row in rows.items():
            if not name.endswith(_ENDS):
                continue
            n_ends += 1
            if name.endswith(_ENDS[1]):
                continue
            weight = name[: -len(_ENDS[0])]
            other = rows.get(weight + _ENDS[1])
            if other is None:
                raise self._unpaired(ALONE, tensor=name, index=row)
            rank = ranks[row]
            if rank != ranks[other]:
                raise self._unpaired(
                    "the two of a pair have different ranks", tensor=weight, field="dims",
                    expected=rank, found=ranks[other],
                )  # fmt: skip
            block, _, module = weight.removesuffix(".weight").rpartition(".")
            if block not in layers:
                layers[block] = layer_of(block.split("."))
            layer = layers[block]
            scale = self.alpha / rank if self.alpha else self.scale
            pairs.append(Pair(weight, layer, module, lengths[row], lengths[other], rank, row, other, scale))
        if n_ends != 2 * len(pairs):
            name = next(n for n in self.names if n.endswith(_ENDS[1]) and n[: -len(_ENDS[1])] + _ENDS[0] not in rows)
            raise self._unpaired(ALONE, tensor=name, index=rows[name])
        return tuple(pairs)

    def _unpaired(self, problem: str, **facts: Any) -> CheckpointError:
        return CheckpointError(problem, source=self.source.name, **facts)

    def close(self) -> None:
        """Let go of the source.  Closing twice does nothing."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        p, o = self.parameters, self.optimizer
        state = f"{o.name}, {self.training.iterations} iterations" if o is not None else "no optimizer"
        return (
            f"<Checkpoint {self.source.name!r}: {self.format}, {p.n_layer} layers, n_embd {p.n_embd}, "
            f"{len(self.names)} tensors, {state}>"
        )
