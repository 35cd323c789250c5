"""llama.cpp's LoRA files of 2023, `ggcl` checkpoints and `ggla` adapters, brought to what loads today.

>>> import ggcl_fast
>>> report = ggcl_fast.convert("checkpoint.ggcl", "checkpoint.gguf")  # doctest: +SKIP
>>> with ggcl_fast.open_checkpoint("checkpoint.ggcl") as checkpoint:  # doctest: +SKIP
...     print(checkpoint.parameters, checkpoint.optimizer)
...     lora_a = checkpoint.tensors["blk.0.attn_q.weight.lora_a"]  # (n_in, rank) float32, not copied

Importing this package imports neither numba nor gguf; what needs them brings them along at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch.jobs import Job, JobResult
    from .batch.stream import convert_many
    from .checkpoint import Adam, Checkpoint, Lbfgs, ModelParameters, Optimizer, Training
    from .conversion import ConversionReport, convert
    from .errors import CheckpointError, NotACheckpointError, SourceChangedError, TruncatedError
    from .inspection.summarise import summarise
    from .inspection.summary import Summary
    from .readers import open_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "Adam": "checkpoint",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "ConversionReport": "conversion",
    "Job": "batch.jobs",
    "JobResult": "batch.jobs",
    "Lbfgs": "checkpoint",
    "ModelParameters": "checkpoint",
    "NotACheckpointError": "errors",
    "Optimizer": "checkpoint",
    "SourceChangedError": "errors",
    "Summary": "inspection.summary",
    "Training": "checkpoint",
    "TruncatedError": "errors",
    "convert": "conversion",
    "convert_many": "batch.stream",
    "open_checkpoint": "readers",
    "summarise": "inspection.summarise",
}

__all__ = [
    "Adam", "Checkpoint", "CheckpointError", "ConversionReport", "Job", "JobResult", "Lbfgs", "ModelParameters",
    "NotACheckpointError", "Optimizer", "SourceChangedError", "Summary", "Training", "TruncatedError", "__version__",
    "convert", "convert_many", "open_checkpoint", "summarise",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
