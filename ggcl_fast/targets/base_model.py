"""The base model that a checkpoint was trained on: a GGUF file, held against the checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Final, NamedTuple

import gguf
import numpy as np

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.finetune_keys import KIND, TRAINING_TYPE
from ..formats.gguf_header import GGUFHeader
from ..formats.gguf_keys import GGUFKeys
from ..formats.gguf_shards import open_model
from ..formats.gguf_tensors import GGUFTensor
from ..formats.numbers import Floats, with_delta
from ..formats.schema import OUTPUT, TOKEN_EMBD
from ..storage.sources import Source, read_at
from ..storage.urls import StrPath, located
from .deltas import Census, lora_a, lora_b

__all__ = ["BaseModel", "Heads"]

_PARAMETERS: Final = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_head_kv": "attention.head_count_kv",
    "n_rot": "rope.dimension_count",
}
"""Keys that have to fit, without the architecture, by field of `checkpoint.ModelParameters`."""
_OTHER: Final = "not a base model that finetune could train"
_F32: Final = gguf.GGMLQuantizationType.F32
_OF_NORMS: Final = (_F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)


class Heads(NamedTuple):
    """Attention heads of a model; 0 where nothing tells them."""

    n_head: int
    n_head_kv: int
    """Those of keys and values."""


class BaseModel:
    """A base model, open for reading.  A context manager.

    Parameters
    ----------
    path
        A GGUF file on a local disk, or a URL; of a model in several files any of them.

    Raises
    ------
    CheckpointError
        It is no sound GGUF file, or one of several, or something else than a model.
    OSError
        It cannot be opened or read.
    """

    def __init__(self, path: StrPath) -> None:
        self.source, self.header = self._open(path)
        try:
            self._rows = {name: row for row, name in enumerate(self.header.names)}
            self._keys = GGUFKeys(self.source.name, self.header)
            self.arch = self._keys.architecture()
            """Architecture, as GGUF files name it."""
            self._check_kind()
        except BaseException:
            self.source.close()
            raise

    @staticmethod
    def _open(path: StrPath) -> tuple[Source, GGUFHeader]:
        try:
            return open_model(path)
        except IsADirectoryError as error:
            if os.path.exists(os.path.join(located(path), "adapter_config.json")):
                error.strerror = f"{error.strerror}, of PEFT's: an adapter, and no model"
            elif os.path.exists(os.path.join(located(path), "config.json")):
                error.strerror = (
                    f"{error.strerror}, of Hugging Face's: llama.cpp's convert_hf_to_gguf.py makes a GGUF file of it"
                )
            raise

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.source.close()

    def _check_kind(self) -> None:
        """Hold that it is a model, and not what can be made of one."""
        if KIND in self._keys and self.header.keys.get(KIND) != gguf.GGUFType.MODEL:
            self._keys.refuse(KIND, f"'{gguf.GGUFType.MODEL}'", _OTHER)
        if TRAINING_TYPE.name in self._keys:
            self._keys.refuse(TRAINING_TYPE.name, "none", _OTHER, hint="it is a checkpoint")

    @property
    def heads(self) -> Heads:
        """Attention heads; without a key for those of keys and values they are as many."""
        n_head = self.key("attention.head_count")
        return Heads(n_head, self.key("attention.head_count_kv") or n_head)

    @property
    def is_tied(self) -> bool:
        """Tell whether the model has no output weight of its own and uses its token embeddings in its place."""
        return OUTPUT not in self._rows

    def key(self, name: str) -> int:
        """Return an integer of the architecture's keys, 0 without it; `CheckpointError` where it is something else."""
        return self._keys.count(f"{self.arch}.{name}")

    def tensor(self, pair: Pair) -> GGUFTensor:
        """Return where the weight is that `pair` changes: the token embeddings for the output weight of a tied model.

        Raises
        ------
        KeyError
            There is no such weight; `check` has seen to that.
        """
        return self.named(TOKEN_EMBD if pair.weight == OUTPUT and self.is_tied else pair.weight)

    def named(self, name: str) -> GGUFTensor:
        """Return where a tensor is; raises `KeyError` where there is none."""
        return self.header.tensor(self._rows[name])

    def n_tokens(self, pair: Pair) -> int:
        """Return the rows that the weight has that `pair` changes, 0 where there is none."""
        try:
            dims = self.tensor(pair).dims
        except KeyError:
            return 0
        return dims[1] if len(dims) == 2 else 0

    def layers_left(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Say how many layers `checkpoint` does not change, where it may leave some out."""
        n_layer = self.key(_PARAMETERS["n_layer"])
        layers = {pair.layer for pair in checkpoint.pairs if pair.layer is not None}
        if checkpoint.partial and len(layers) < n_layer:
            yield f"it changes {len(layers)} of the base model's {n_layer} layers"

    def check(self, checkpoint: Checkpoint, left_out: Collection[str] = ()) -> None:
        """Hold the model's parameters and the shapes of all pairs of `checkpoint` against the base model's.

        Parameters
        ----------
        checkpoint
            What was trained on it.
        left_out
            Names of weights that are not looked at.

        Raises
        ------
        CheckpointError
            Layers, heads or rotary dims are others, or a weight is missing or has other dims: the message names both
            files.
        """
        self._check_parameters(checkpoint)
        for pair in checkpoint.pairs:
            if pair.weight in left_out:
                continue
            try:
                tensor = self.tensor(pair)
            except KeyError:
                raise CheckpointError(
                    "the base model has no such tensor", source=checkpoint.source.name, tensor=pair.weight,
                    expected=f"dims {pair.dims} in {self.source.name}", found="nothing",
                ) from None  # fmt: skip
            dims = tensor.dims
            while len(dims) > len(pair.dims) and dims[-1] == 1:
                dims = dims[:-1]
            has_more_tokens = pair.weight in (TOKEN_EMBD, OUTPUT) and pair.dims < dims < (pair.n_in + 1,)
            if dims != pair.dims and not has_more_tokens:
                raise CheckpointError(
                    "not the shape of the base model", source=checkpoint.source.name, tensor=pair.weight, field="dims",
                    expected=f"{dims} as in {self.source.name}", found=pair.dims,
                    hint="it was trained on another model",
                )  # fmt: skip
            if pair.is_norm and tensor.type not in _OF_NORMS:
                raise CheckpointError(
                    "norms are floats in every model", source=self.source.name, tensor=pair.weight, field="type",
                    expected="F32, or F16 or BF16 as some programs write them", found=tensor.type.name,
                )  # fmt: skip

    def _check_parameters(self, checkpoint: Checkpoint) -> None:
        """Hold layers, heads and rotary dims against the base model's, as far as both tell them."""
        for field, key in _PARAMETERS.items():
            found: int = getattr(checkpoint.parameters, field)
            if (found == 0 or checkpoint.partial) and field != "n_layer":
                continue
            here = self.heads.n_head_kv if field == "n_head_kv" else self.key(key)
            if here == 0 or here == found or (checkpoint.partial and found < here):
                continue
            cut = field == "n_layer" and checkpoint.format == "ggla" and found < here
            raise CheckpointError(
                "not the shape of the base model", source=checkpoint.source.name, field=field,
                expected=f"{here} as in {self.source.name}", found=found,
                hint="the file is cut short, or " * cut + "it was trained on another model",
            )  # fmt: skip

    def has_scale(self, pair: Pair) -> bool:
        """Tell whether llama.cpp multiplies by a scale tensor after the weight that `pair` changes."""
        return _scale_name(pair) in self._rows

    def scale_of(self, pair: Pair) -> float:
        """Return what llama.cpp multiplies by after the weight that `pair` changes: a scale tensor, 1 without one.

        Raises
        ------
        CheckpointError
            The scale is no number other than zero.
        """
        if not self.has_scale(pair):
            return 1.0
        name = _scale_name(pair)
        tensor = self.named(name)
        data = np.frombuffer(read_at(self.source, tensor.offset, tensor.nbytes), np.uint8)
        scale = float(data.view("<f4")[0]) if tensor.type == _F32 and tensor.nbytes == 4 else math.nan
        if not math.isfinite(scale) or scale == 0:
            raise CheckpointError(
                "a delta cannot be divided by it", source=self.source.name, tensor=name, field="data",
                expected="one float32, finite and not 0", found=f"{tensor.type.name} of dims {tensor.dims}: {scale}",
            )  # fmt: skip
        return scale

    def norm(self, checkpoint: Checkpoint, pair: Pair, census: Census) -> Floats:
        """Return the norm weight with the delta of `pair` added, shape (n_embd,)."""
        tensor = self.tensor(pair)
        data = np.frombuffer(read_at(self.source, tensor.offset, tensor.nbytes), np.uint8)
        weight = gguf.quants.dequantize(data, tensor.type).reshape(1, -1)
        a, b = lora_a(checkpoint, pair, census), lora_b(checkpoint, pair, census)
        norm: Floats = with_delta(weight, b, a, source=self.source.name, tensor=pair.weight)[0].astype("<f4")
        return norm


def _scale_name(pair: Pair) -> str:
    return pair.weight.removesuffix("weight") + "scale"
