"""Reading the GGUF form of a finetune checkpoint, whoever wrote it.

Both versions of `finetune_keys` are read; what version 1 has beyond version 0 is kept in `Checkpoint.extra`.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from ..checkpoint import Adam, Checkpoint, Lbfgs, ModelParameters, Optimizer, Training
from ..errors import CheckpointError, NotACheckpointError
from ..formats import finetune_keys as finetune
from ..formats.finetune_keys import Key
from ..formats.gguf_header import GGUFHeader, Value, read_header
from ..formats.gguf_keys import GGUFKeys
from ..formats.schema import OPTIMIZER_TENSORS, TOKEN_EMBD
from ..formats.signatures import HOLDS, MADE_BY
from ..storage.sources import Source
from . import gguf_lora
from .by_name import NamedTensors, tensor_table
from .engine import Engine

__all__ = ["read"]


def read(source: Source, engine: Engine = "auto") -> Checkpoint:  # noqa: ARG001 - nothing is swept here
    """Read the GGUF checkpoint or adapter that `source` holds; raises as `readers.open_checkpoint` does."""
    header = read_header(source)
    if gguf_lora.is_lora(header):
        return gguf_lora.read(source, header)
    keys = GGUFKeys(source.name, header)
    version = _version(keys)
    model = {field: keys.get(key) for field, key in finetune.MODEL.items()}
    ranks = {rank: keys.positive(key) for rank, key in finetune.RANKS.items()}
    counts = finetune.TRAINING_COUNTS[version]
    training = Training(**{field: keys.get(Key(key.name, counts)) for field, key in finetune.TRAINING.items()})
    optimizer = _optimizer(keys)

    table = header.table
    tensors = NamedTensors(source, {name: row for row, name in enumerate(header.names)}, table["ne"], table["dims"])
    n_layer = finetune.MODEL["n_layer"].name
    lora = tensors.lora_names(model["n_layer"], f"{n_layer} says how many layers there are")
    state = _optimizer_dims(tensors, optimizer)
    names = (*lora, *state)
    tensors.refuse_others(names)
    _check_types(source, header)
    dims = {name: keys.positive(finetune.MODEL[name]) for name in ("n_embd", "n_ff")}
    n_head_kv, dims["n_embd_kv"] = _grouped(keys, model)
    dims["n_vocab"] = int(table["ne"][tensors.rows[lora[1]], 1])
    tensors.check_lora_dims(model["n_layer"], ranks, dims)

    rows = np.array([tensors.rows[name] for name in names], np.intp)
    n_dims = np.array([2] * len(lora) + [len(ne) for ne in state.values()], np.int64)
    placed = tensor_table(table["offset"][rows], table["ne"][rows, :2], n_dims)
    n_elements = int(placed["nbytes"][: len(lora)].sum()) // 4
    if optimizer.n_parameters != n_elements:
        counted = f"{n_elements}, the number of LoRA elements"
        keys.refuse(finetune.OPTIMIZER["n_parameters"].name, counted)
    tensors.check_dims(state)
    return Checkpoint(
        source,
        ModelParameters(**model, n_vocab=dims["n_vocab"], n_mult=0, n_head_kv=n_head_kv),
        ranks,
        training,
        optimizer,
        names,
        placed,
        _warnings(source, placed),
        format="gguf",
        extra=_extra(header, version, optimizer.name),
    )


def _version(keys: GGUFKeys) -> int:
    """Hold that this is a finetune checkpoint, and return its version."""
    trained = keys.header.keys.get(finetune.TRAINING_TYPE.name)
    if trained != finetune.TRAINED:
        what, hint = _something_else(keys.header)
        raise NotACheckpointError(
            source=keys.source, field=finetune.TRAINING_TYPE.name, expected=f"'{finetune.TRAINED}'",
            found=f"{_quoted(trained) if trained is not None else 'none'}: {what}", hint=hint,
        )  # fmt: skip
    if keys.get(finetune.ARCHITECTURE) != finetune.ARCH:
        keys.refuse(finetune.ARCHITECTURE.name, f"'{finetune.ARCH}'")
    version: int = keys.get(finetune.FILE_VERSION)
    if version not in finetune.TRAINING_COUNTS:
        keys.refuse(finetune.FILE_VERSION.name, "0 or 1, the only ones ever written")
    return version


def _quoted(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _something_else(header: GGUFHeader) -> tuple[str, str]:
    """Say what a GGUF file without LoRA training is, and what to hand in instead."""
    values = header.keys
    if values.get(finetune.TRAINING_TYPE.name) == "train_model":
        return "a train-text-from-scratch checkpoint, a model in itself", "there is no LoRA in it to convert"
    if values.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 0) not in (0, 1):
        return (
            "one of several files of a base model",
            "hand in the checkpoint that finetune wrote when it trained on it",
        )
    if MADE_BY in values:
        return f"a model that ggcl_fast made, with {values.get(HOLDS)} of a training", "it runs as it is"
    if TOKEN_EMBD in header.names:
        return "a base model", "hand in the checkpoint that finetune wrote when it trained on it"
    return "no finetune checkpoint", "gguf-dump shows what it is"


def _optimizer(keys: GGUFKeys) -> Optimizer:
    """Read the optimizer state without its tensors."""
    if keys.get(finetune.OPTIMIZER_FILE_VERSION) != 0:
        keys.refuse(finetune.OPTIMIZER_FILE_VERSION.name, "0, the only one ever written")
    name = keys.get(finetune.OPTIMIZER_TYPE)
    if name not in finetune.STATE:
        keys.refuse(finetune.OPTIMIZER_TYPE.name, "'adam' or 'lbfgs'")
    facts = {field: keys.get(key) for field, key in {**finetune.OPTIMIZER, **finetune.STATE[name]}.items()}
    if name == "lbfgs":
        keys.positive(finetune.STATE["lbfgs"]["m"])
    return Adam(**facts) if name == "adam" else Lbfgs(**facts)


def _optimizer_dims(tensors: NamedTensors, optimizer: Optimizer) -> dict[str, tuple[int, ...]]:
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
        if name not in tensors.rows:
            raise CheckpointError(
                f"the tensor is missing; a checkpoint with optimizer.type '{optimizer.name}' has it",
                source=tensors.source.name, tensor=name,
            )  # fmt: skip
    return state


def _check_types(source: Source, header: GGUFHeader) -> None:
    """Hold that all tensors are float32."""
    others = np.flatnonzero(header.table["type"] != gguf.GGMLQuantizationType.F32)
    if len(others):
        row = int(others[0])
        dims, n_dims, type = (int(header.table[field][row]) for field in ("dims", "n_dims", "type"))
        raise CheckpointError(
            source=source.name, tensor=header.names[row], index=row, field="type", offset=dims + 8 * n_dims,
            expected="0 (F32)", found=f"{type} ({gguf.GGMLQuantizationType(type).name})",
        )  # fmt: skip


def _grouped(keys: GGUFKeys, model: dict[str, int]) -> tuple[int, int]:
    """Return the heads and the length of keys and values."""
    n_head, n_embd = model["n_head"], model["n_embd"]
    if finetune.HEAD_COUNT_KV.name not in keys:
        return n_head, n_embd
    n_head_kv: int = keys.get(finetune.HEAD_COUNT_KV)
    if n_head_kv == n_head:
        return n_head, n_embd
    keys.positive(finetune.MODEL["n_head"])
    if n_head_kv == 0 or n_head % n_head_kv or n_embd % n_head:
        expected = f"a divisor of {n_head}, the number of heads, which has to divide {n_embd}"
        keys.refuse(finetune.HEAD_COUNT_KV.name, expected)
    return n_head_kv, n_embd // n_head * n_head_kv


def _extra(header: GGUFHeader, version: int, optimizer: str) -> dict[str, Value]:
    """Return the keys that version 0 has no place for, or has with another type or value; of arrays, what they are."""
    constant = {key.name: (key.type, value) for key, value in finetune.CONSTANT.items()}
    extra: dict[str, Value] = {finetune.FILE_VERSION.name: version} if version else {}
    for name, field in header.fields.items():
        value = header.keys.get(name, f"{field.type.name.lower()} of {field.length}")
        if name not in finetune.KNOWN[optimizer] and (field.type, value) != constant.get(name):
            extra[name] = value
    return extra


def _warnings(source: Source, placed: npt.NDArray[np.void]) -> tuple[str, ...]:
    """Tell of bytes behind the last tensor and its padding."""
    end = int((placed["offset"] + placed["nbytes"]).max())
    if source.size - end < 32:
        return ()
    return (
        f"{source.size - end} bytes follow the last tensor, which ends at offset {end} ({end:#x}); they are left out",
    )
