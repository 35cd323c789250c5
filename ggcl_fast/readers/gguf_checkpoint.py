"""Reading the GGUF form of a finetune checkpoint, whoever wrote it.

``training.file_version`` 0 is what the conversion of a ggcl file writes.  Version 1 is what later finetune builds, up
to the middle of 2024, wrote themselves: training counts of 64 bits, and keys for the context, grouped-query attention,
rope and the state of the shuffling, all of which are kept in `Checkpoint.extra`.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import gguf
import numpy as np

from ..checkpoint import Adam, Checkpoint, Lbfgs, ModelParameters, Optimizer, Training
from ..errors import CheckpointError, NotACheckpointError, printable
from ..gguf_reader import GGUFHeader, Value, read_header
from ..schema import MODULES
from ..sources import Source
from ..sweep import Engine
from .by_name import Found, tensor_table
from .ggcl import OPTIMIZER_TENSORS

__all__ = ["read"]

_T = gguf.GGUFValueType
_ARCH: Final = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
_LLM: Final = gguf.Keys.LLM
_TYPE: Final = "finetune_lora"
_COUNTS: Final = {0: _T.UINT32, 1: _T.UINT64}  # type of the training counts by training.file_version

_MODEL: Final = {
    "n_embd": _LLM.EMBEDDING_LENGTH.format(arch=_ARCH),
    "n_head": gguf.Keys.Attention.HEAD_COUNT.format(arch=_ARCH),
    "n_layer": _LLM.BLOCK_COUNT.format(arch=_ARCH),
    "n_rot": gguf.Keys.Rope.DIMENSION_COUNT.format(arch=_ARCH),
    "n_ff": _LLM.FEED_FORWARD_LENGTH.format(arch=_ARCH),
}
"""Keys of type uint32 by what they are in `ModelParameters`."""
_HEAD_COUNT_KV: Final = gguf.Keys.Attention.HEAD_COUNT_KV.format(arch=_ARCH)
_TRAINING: Final = ("training.iteration_count", "training.sample_count", "training.token_count")
_RANKS: Final = {m.rank: f"training.lora.rank.{m.base_name.rpartition('.')[2]}" for m in MODULES}

_OPTIMIZER: Final = {
    "past": ("optimizer.convergence_past_count", _T.UINT32),
    "n_parameters": ("optimizer.parameter_count", _T.UINT64),
    "iteration": ("optimizer.iteration_count", _T.UINT32),
    "just_initialized": ("optimizer.just_initialized", _T.BOOL),
}
"""Key and type of each field that `Adam` and `Lbfgs` have in common."""
_STATE: Final = {
    "adam": {
        "best_loss": ("optimizer.adam.best_loss", _T.FLOAT32),
        "previous_loss": ("optimizer.adam.previous_loss", _T.FLOAT32),
        "no_improvement_count": ("optimizer.adam.no_improvement_count", _T.UINT32),
    },
    "lbfgs": {
        "m": ("optimizer.lbfgs.approx_hessian_count", _T.UINT32),
        "best_loss": ("optimizer.lbfgs.best_loss", _T.FLOAT32),
        "step": ("optimizer.lbfgs.line_search_step", _T.FLOAT32),
        "j": ("optimizer.lbfgs.line_search_j", _T.INT32),
        "k": ("optimizer.lbfgs.line_search_k", _T.INT32),
        "end": ("optimizer.lbfgs.line_search_end", _T.INT32),
        "no_improvement_count": ("optimizer.lbfgs.no_improvement_count", _T.UINT32),
    },
}
"""The same for each optimizer's own fields."""

_KNOWN: Final = {
    gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.ALIGNMENT, "training.file_version", "training.type", *_TRAINING,
    *_MODEL.values(), *_RANKS.values(), "optimizer.file_version", "optimizer.type",
    *(key for fields in (_OPTIMIZER, *_STATE.values()) for key, _ in fields.values()),
}  # fmt: skip
"""What is read from the keys, so that nothing of it is lost."""
_CONSTANT: Final = {
    gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.ALL_F32),
    gguf.Keys.Attention.LAYERNORM_RMS_EPS.format(arch=_ARCH): float(np.float32(1e-5)),
}
"""Keys that version 0 has with one value only."""


def read(source: Source, engine: Engine = "auto") -> Checkpoint:  # noqa: ARG001 - nothing is swept here
    """Read the GGUF checkpoint that `source` holds; raises as `readers.open_checkpoint` does."""
    header = read_header(source)
    keys = _Keys(source, header)
    version = _check_kind(keys)
    model = {field: keys.get(key, _T.UINT32) for field, key in _MODEL.items()}
    ranks = {rank: keys.positive(key) for rank, key in _RANKS.items()}
    training = Training(*(keys.get(key, _COUNTS[version]) for key in _TRAINING))
    optimizer = _optimizer(keys)

    table = header.table
    found = Found(source, {name: row for row, name in enumerate(header.names)}, table["ne"], table["dims"])
    lora = found.lora_names(model["n_layer"], f"{_MODEL['n_layer']} says how many layers there are")
    state = _optimizer_dims(found, optimizer)
    names = (*lora, *state)
    found.refuse_others(names)
    _check_types(source, header)
    dims = {name: keys.positive(_MODEL[name]) for name in ("n_embd", "n_ff")}
    n_head_kv, dims["n_embd_kv"] = _grouped(keys, model)
    dims["n_vocab"] = int(table["ne"][found.rows[lora[1]], 1])
    found.check_lora_dims(model["n_layer"], ranks, dims)

    rows = np.array([found.rows[name] for name in names], np.intp)
    n_dims = np.array([2] * len(lora) + [len(ne) for ne in state.values()], np.int64)
    placed = tensor_table(table["offset"][rows], table["ne"][rows, :2], n_dims)
    n_elements = int(placed["nbytes"][: len(lora)].sum()) // 4
    if optimizer.n_parameters != n_elements:
        keys.refuse(_OPTIMIZER["n_parameters"][0], f"{n_elements}, the number of LoRA elements", optimizer.n_parameters)
    found.check_dims(state)
    return Checkpoint(
        source,
        ModelParameters(**model, n_vocab=dims["n_vocab"], n_mult=0, n_head_kv=n_head_kv),
        ranks,
        training,
        optimizer,
        names,
        placed,
        _warnings(source, placed),
        kind="gguf",
        extra=_extra(header, version),
    )


class _Keys:
    """Values by key, each of the type that it must have."""

    def __init__(self, source: Source, header: GGUFHeader) -> None:
        self.source = source
        self.header = header

    def get(self, key: str, kind: gguf.GGUFValueType) -> Any:
        """Return a value."""
        expected = kind.name.lower()
        field = self.header.fields.get(key)
        if field is None:
            raise CheckpointError("the key is missing", source=self.source.name, field=key, expected=expected,
                                  found="none")  # fmt: skip
        if field.type != kind:
            self.refuse(key, expected, field.type.name.lower())
        return self.header.keys[key]

    def positive(self, key: str) -> int:
        """Return a uint32 that cannot be 0."""
        value: int = self.get(key, _T.UINT32)
        if value == 0:
            self.refuse(key, "at least 1", value)
        return value

    def refuse(self, key: str, expected: str, found: object) -> NoReturn:
        """Raise that `key`, which is there, cannot have the value that it has."""
        offset = self.header.fields[key].value
        raise CheckpointError(source=self.source.name, field=key, offset=offset, expected=expected, found=found)


def _check_kind(keys: _Keys) -> int:
    """Hold that this is a finetune checkpoint, and return its version."""
    values = keys.header.keys
    found = values.get("training.type")
    if found != _TYPE:
        kind, hint = _other_kind(keys.header)
        raise NotACheckpointError(
            source=keys.source.name, field="training.type", expected=f"'{_TYPE}'",
            found=f"{_quoted(found) if found is not None else 'none'}: {kind}", hint=hint,
        )  # fmt: skip
    arch = keys.get(gguf.Keys.General.ARCHITECTURE, _T.STRING)
    if arch != _ARCH:
        keys.refuse(gguf.Keys.General.ARCHITECTURE, f"'{_ARCH}'", _quoted(arch))
    version: int = keys.get("training.file_version", _T.UINT32)
    if version not in _COUNTS:
        keys.refuse("training.file_version", "0 or 1, the only ones ever written", version)
    return version


def _quoted(value: object) -> str:
    return f"'{printable(value)}'" if isinstance(value, str) else str(value)


def _other_kind(header: GGUFHeader) -> tuple[str, str]:
    """Say what a GGUF file without LoRA training is, and what to hand in instead."""
    values = header.keys
    if values.get("training.type") == "train_model":
        return "a train-text-from-scratch checkpoint, a model in itself", "there is no LoRA in it to convert"
    if values.get(gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER:
        return "a finished adapter", "llama.cpp loads it as it is; nothing is left to convert"
    if gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.TOKEN_EMBD] + ".weight" in header.names:
        return "a base model", "hand in the checkpoint that finetune wrote when it trained on it"
    return "no finetune checkpoint", "gguf-dump shows what it is"


def _optimizer(keys: _Keys) -> Optimizer:
    """Read the optimizer state without its tensors."""
    version = keys.get("optimizer.file_version", _T.UINT32)
    if version != 0:
        keys.refuse("optimizer.file_version", "0, the only one ever written", version)
    name = keys.get("optimizer.type", _T.STRING)
    if name not in _STATE:
        keys.refuse("optimizer.type", "'adam' or 'lbfgs'", _quoted(name))
    facts = {field: keys.get(key, kind) for field, (key, kind) in {**_OPTIMIZER, **_STATE[name]}.items()}
    if name == "lbfgs":
        keys.positive(_STATE["lbfgs"]["m"][0])
    return Adam(**facts) if name == "adam" else Lbfgs(**facts)


def _optimizer_dims(found: Found, optimizer: Optimizer) -> dict[str, tuple[int, ...]]:
    """Return the dims of the optimizer's tensors by name, all of which are there."""
    values = {"nx": optimizer.n_parameters, "past": optimizer.past}
    if isinstance(optimizer, Lbfgs):
        values["lbfgs_m"] = optimizer.m
    state = {
        f"optimizer.{optimizer.name}.{tensor}": tuple(values[dim] for dim in dims)
        for tensor, dims in OPTIMIZER_TENSORS[optimizer.name]
        if dims != ("past",) or optimizer.past
    }
    for name in state:
        if name not in found.rows:
            raise CheckpointError(
                f"the tensor is missing; a checkpoint with optimizer.type '{optimizer.name}' has it",
                source=found.source.name, tensor=name,
            )  # fmt: skip
    return state


def _check_types(source: Source, header: GGUFHeader) -> None:
    """Hold that all tensors are float32."""
    others = np.flatnonzero(header.table["type"] != gguf.GGMLQuantizationType.F32)
    if len(others):
        row = int(others[0])
        dims, n_dims, kind = (int(header.table[field][row]) for field in ("dims", "n_dims", "type"))
        raise CheckpointError(
            source=source.name, tensor=header.names[row], index=row, field="type", offset=dims + 8 * n_dims,
            expected="0 (F32)", found=f"{kind} ({gguf.GGMLQuantizationType(kind).name})",
        )  # fmt: skip


def _grouped(keys: _Keys, model: dict[str, int]) -> tuple[int, int]:
    """Return the heads and the length of keys and values."""
    n_head, n_embd = model["n_head"], model["n_embd"]
    if _HEAD_COUNT_KV not in keys.header.fields:
        return n_head, n_embd
    n_head_kv: int = keys.get(_HEAD_COUNT_KV, _T.UINT32)
    if n_head_kv == n_head:
        return n_head, n_embd
    if n_head_kv == 0 or n_head % n_head_kv or n_embd % n_head:
        keys.refuse(
            _HEAD_COUNT_KV, f"a divisor of {n_head}, the number of heads, which has to divide {n_embd}", n_head_kv
        )
    return n_head_kv, n_embd // n_head * n_head_kv


def _extra(header: GGUFHeader, version: int) -> dict[str, Value]:
    """Return the keys that version 0 has no place for; of arrays, what they are."""
    extra: dict[str, Value] = {"training.file_version": version} if version else {}
    for key, field in header.fields.items():
        value = header.keys.get(key, f"array of {field.length}")
        if key not in _KNOWN and (key not in _CONSTANT or value != _CONSTANT[key]):
            extra[key] = value
    return extra


def _warnings(source: Source, placed: Any) -> tuple[str, ...]:
    """Tell of bytes behind the last tensor and its padding."""
    end = int((placed["offset"] + placed["nbytes"]).max())
    if source.size - end < 32:
        return ()
    return (
        f"{source.size - end} bytes follow the last tensor, which ends at offset {end} ({end:#x}); they are left out",
    )
