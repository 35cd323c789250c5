"""What stands in the middle: a checkpoint, whatever it was read from and whatever it becomes.

Sources make a `Checkpoint`, targets take one.  This module knows neither files nor formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .health import Summary
    from .payload import Progress
    from .sources import Buffer, Source
    from .sweep import Engine

__all__ = ["Adam", "Checkpoint", "Kind", "Lbfgs", "ModelParameters", "Optimizer", "Training"]


class ModelParameters(NamedTuple):
    """Shape of the base model, as the file gives it; 0 for what its kind of file does not tell.

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


Optimizer = Adam | Lbfgs
Kind = Literal["ggcl", "gguf", "ggla"]
"""What a checkpoint was read from: a finetune checkpoint in either form, or the adapter beside it."""


class _Tensors(Mapping[str, npt.NDArray[np.float32]]):
    """Tensors by GGUF name; each look-up makes a view, none makes a copy."""

    def __init__(self, source: Source, names: tuple[str, ...], table: npt.NDArray[np.void]) -> None:
        self._source = source
        self._rows = {name: row for row, name in enumerate(names)}
        self._table = table
        self._bytes: memoryview | None = None
        self.closed = False

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        row = self._table[self._rows[name]]
        if self.closed:
            raise ValueError(f"{self._source.name}: the checkpoint is closed")
        if self._bytes is None:
            self._bytes = self._source.map()
        flat = np.frombuffer(self._bytes, "<f4", int(row["nbytes"]) // 4, int(row["offset"]))
        return flat.reshape(int(row["ne1"]), int(row["ne0"])) if row["n_dims"] == 2 else flat

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self._bytes = None
        self.closed = True


class Checkpoint:
    """A finetune checkpoint, open for reading.

    Made by `open_checkpoint` and `Checkpoint.from_buffer`.  A context manager; closing lets go of the file.
    Tensor views taken before stay valid after it, asking for new ones raises `ValueError`.

    Attributes
    ----------
    source : sources.Source
        Where the bytes are.
    parameters : ModelParameters
        Shape of the base model.
    ranks : Mapping[str, int]
        LoRA rank by header field: attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, tok_embeddings, norm, output.
        0 for those that an adapter without layers does not tell.
    training : Training
        Training counts.
    optimizer : Adam or Lbfgs or None
        Optimizer state without its tensors; None for an adapter, which has none.
    names : tuple of str
        GGUF names of all tensors: of ggcl and ggla files in the order of the file, of GGUF files in that of ggcl.
    table : numpy.ndarray
        (n,) `layout.TENSOR`, a row a name: where each tensor is in the source and in the GGUF data section.
    warnings : tuple of str
        What is unusual about the file and does not prevent its use.
    kind : str
        "ggcl", "gguf" or "ggla".
    scale : float
        Deltas are ``scale * lora_b @ lora_a.T``: lora_alpha / lora_r of an adapter, 1.0 for every checkpoint.
    extra : Mapping[str, int or float or bool or str]
        Keys of a GGUF file that `training.file_version` 0 does not have, or has with one value only: what would be
        lost by writing it.
    """

    def __init__(
        self,
        source: Source,
        parameters: ModelParameters,
        ranks: Mapping[str, int],
        training: Training,
        optimizer: Optimizer | None,
        names: tuple[str, ...],
        table: npt.NDArray[np.void],
        warnings: tuple[str, ...],
        *,
        kind: Kind = "ggcl",
        scale: float = 1.0,
        extra: Mapping[str, int | float | bool | str] = MappingProxyType({}),
    ) -> None:
        self.source = source
        self.parameters = parameters
        self.ranks = MappingProxyType(dict(ranks))
        self.training = training
        self.optimizer = optimizer
        self.names = names
        self.table = table
        self.warnings = warnings
        self.kind = kind
        self.scale = scale
        self.extra = MappingProxyType(dict(extra))
        self._tensors: _Tensors | None = None
        self._closed = False

    @classmethod
    def from_buffer(cls, buffer: Buffer, *, name: str = "<buffer>", engine: Engine = "auto") -> Checkpoint:
        """Read a checkpoint or an adapter from memory, without copying it.

        Parameters
        ----------
        buffer
            A whole file, of any `Kind`: bytes, memoryview, memory map, numpy array, anything with a contiguous buffer.
            It must not change while the checkpoint is in use.
        name
            What messages call it.
        engine
            See `sweep.pick_engine`.

        Raises
        ------
        CheckpointError
            The bytes are not a checkpoint, or not a sound one.
        TypeError
            `buffer` has no contiguous buffer.
        """
        from . import readers
        from .sources import SourceBuffer

        return readers.read(SourceBuffer(buffer, name), engine)

    @property
    def tensors(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """Every tensor by its GGUF name, in the order of the file: read-only float32 views of the source.

        LoRA pairs are ``<name>.weight.lora_a`` of shape (n_in, rank) and ``<name>.weight.lora_b`` of shape
        (n_out, rank); what training added to the base weight is ``scale * lora_b @ lora_a.T``.  Optimizer tensors are
        ``optimizer.<optimizer>.<name>`` of shape (n_parameters,), or as `readers.ggcl.OPTIMIZER_TENSORS` says.

        A file of more than `sources.SMALL` bytes is mapped at the first look-up: if somebody shortens it while you
        read the map, the operating system ends the process.  `convert` never does that.
        """
        if self._tensors is None:
            self._tensors = _Tensors(self.source, self.names, self.table)
            self._tensors.closed = self._closed
        return self._tensors

    def summary(self, *, engine: Engine = "auto", progress: Progress | None = None) -> Summary:
        """Read all tensors and tell what is inside: values, sizes of the deltas, and whether the training is sound.

        Needs memory for a few blocks of 1 MiB, whatever the size of the file, which is read and never mapped.

        Parameters
        ----------
        engine
            What goes through the values: see `survey.pick_engine`.
        progress
            Called now and then with the number of bytes read since its last call.

        Raises
        ------
        SourceChangedError
            The file changed since it was opened.
        OSError
            It can no longer be read.
        ValueError
            The checkpoint is closed.
        """
        from . import health

        if self._closed:
            raise ValueError(f"{self.source.name}: the checkpoint is closed")
        return health.summarise(self, engine=engine, progress=progress)

    def close(self) -> None:
        """Let go of the source.  Closing twice does nothing."""
        self._closed = True
        if self._tensors is not None:
            self._tensors.close()
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        p, o = self.parameters, self.optimizer
        state = f"{o.name}, {self.training.iterations} iterations" if o is not None else "no optimizer"
        return (
            f"<Checkpoint {self.source.name!r}: {self.kind}, {p.n_layer} layers, n_embd {p.n_embd}, "
            f"{len(self.names)} tensors, {state}>"
        )
