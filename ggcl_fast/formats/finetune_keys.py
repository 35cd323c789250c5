"""The keys of a finetune checkpoint in GGUF form: one table, which is read from and written from.

Order and types are those of ``training.file_version`` 0, what the conversion of a ggcl file writes.  Version 1, what
later finetune builds wrote, up to the middle of 2024, has training counts of 64 bits and further keys.  Names are
gguf's wherever it has them.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import gguf
import numpy as np

from .schema import MODULES

__all__ = [
    "ADAPTER", "ARCH", "ARCHITECTURE", "CONSTANT", "FILE_VERSION", "HEAD_COUNT_KV", "INVOCATION", "KIND", "KNOWN",
    "MODEL", "OPTIMIZER", "OPTIMIZER_FILE_VERSION", "OPTIMIZER_TYPE", "RANKS", "STATE", "TRAINED", "TRAINING",
    "TRAINING_COUNTS", "TRAINING_TYPE", "Key", "is_architecture",
]  # fmt: skip

_T = gguf.GGUFValueType
_KEYS: Final = gguf.Keys
ARCH: Final = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
"""Value of ``general.architecture``."""
TRAINED: Final = "finetune_lora"
"""Value of ``training.type``."""
KIND: Final = _KEYS.General.TYPE
"""Key that tells an adapter from a model."""
ADAPTER: Final = gguf.GGUFType.ADAPTER
"""Its value in adapters."""
INVOCATION: Final = "adapter.alora.invocation_tokens"
"""Key of the tokens behind which alone an activated LoRA counts."""


_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


def is_architecture(value: object) -> bool:
    """Tell whether a value can be the name of an architecture: it becomes a part of keys."""
    return isinstance(value, str) and _ARCHITECTURE.fullmatch(value) is not None


class Key(NamedTuple):
    """A key and the type of its value."""

    name: str
    type: gguf.GGUFValueType


ARCHITECTURE: Final = Key(_KEYS.General.ARCHITECTURE, _T.STRING)
CONSTANT: Final = {
    Key(_KEYS.General.FILE_TYPE, _T.UINT32): int(gguf.LlamaFileType.ALL_F32),
    # ggcl files do not store it; finetune knew no other.
    Key(_KEYS.Attention.LAYERNORM_RMS_EPS.format(arch=ARCH), _T.FLOAT32): float(np.float32(1e-5)),
}
"""Keys that have one value only."""
FILE_VERSION: Final = Key("training.file_version", _T.UINT32)
TRAINING_TYPE: Final = Key("training.type", _T.STRING)
TRAINING: Final = {
    "iterations": Key("training.iteration_count", _T.UINT32),
    "samples": Key("training.sample_count", _T.UINT32),
    "tokens": Key("training.token_count", _T.UINT32),
}
"""Keys of the training counts, by field of `checkpoint.Training`."""
TRAINING_COUNTS: Final = {0: _T.UINT32, 1: _T.UINT64}
"""Type of the training counts by file version."""
MODEL: Final = {
    "n_embd": Key(_KEYS.LLM.EMBEDDING_LENGTH.format(arch=ARCH), _T.UINT32),
    "n_head": Key(_KEYS.Attention.HEAD_COUNT.format(arch=ARCH), _T.UINT32),
    "n_layer": Key(_KEYS.LLM.BLOCK_COUNT.format(arch=ARCH), _T.UINT32),
    "n_rot": Key(_KEYS.Rope.DIMENSION_COUNT.format(arch=ARCH), _T.UINT32),
    "n_ff": Key(_KEYS.LLM.FEED_FORWARD_LENGTH.format(arch=ARCH), _T.UINT32),
}
"""Keys of the model, by field of `checkpoint.ModelParameters`."""
HEAD_COUNT_KV: Final = Key(_KEYS.Attention.HEAD_COUNT_KV.format(arch=ARCH), _T.UINT32)
"""A key of version 1."""
RANKS: Final = {m.rank: Key(f"training.lora.rank.{m.name}", _T.UINT32) for m in MODULES}
"""Keys of the LoRA ranks, by `Module.rank`."""
OPTIMIZER_FILE_VERSION: Final = Key("optimizer.file_version", _T.UINT32)
OPTIMIZER: Final = {
    "past": Key("optimizer.convergence_past_count", _T.UINT32),
    "n_parameters": Key("optimizer.parameter_count", _T.UINT64),
    "iteration": Key("optimizer.iteration_count", _T.UINT32),
    "just_initialized": Key("optimizer.just_initialized", _T.BOOL),
}
"""Keys of what `checkpoint.Adam` and `checkpoint.Lbfgs` have in common, by field."""
OPTIMIZER_TYPE: Final = Key("optimizer.type", _T.STRING)
STATE: Final = {
    "adam": {
        "best_loss": Key("optimizer.adam.best_loss", _T.FLOAT32),
        "previous_loss": Key("optimizer.adam.previous_loss", _T.FLOAT32),
        "no_improvement_count": Key("optimizer.adam.no_improvement_count", _T.UINT32),
    },
    "lbfgs": {
        "m": Key("optimizer.lbfgs.approx_hessian_count", _T.UINT32),
        "best_loss": Key("optimizer.lbfgs.best_loss", _T.FLOAT32),
        "step": Key("optimizer.lbfgs.line_search_step", _T.FLOAT32),
        "j": Key("optimizer.lbfgs.line_search_j", _T.INT32),
        "k": Key("optimizer.lbfgs.line_search_k", _T.INT32),
        "end": Key("optimizer.lbfgs.line_search_end", _T.INT32),
        "no_improvement_count": Key("optimizer.lbfgs.no_improvement_count", _T.UINT32),
    },
}
"""Keys of each optimizer's own fields."""

KNOWN: Final = {
    name: frozenset(
        key.name
        for key in (
            ARCHITECTURE, FILE_VERSION, TRAINING_TYPE, *TRAINING.values(), *MODEL.values(), *RANKS.values(),
            OPTIMIZER_FILE_VERSION, *OPTIMIZER.values(), OPTIMIZER_TYPE, *state.values(),
        )
    ) | {_KEYS.General.ALIGNMENT}
    for name, state in STATE.items()
}  # fmt: skip
"""Names of all keys of version 0 but `CONSTANT`, by optimizer; and of the alignment, which is the file's own affair."""
