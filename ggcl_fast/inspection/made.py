"""What a model that this project wrote, or a PEFT folder, says about itself; their tensors are not looked at."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Final, Literal, NamedTuple

import gguf

from ..errors import CheckpointError
from ..formats.gguf_header import read_header
from ..formats.signatures import HOLDS, MADE_BY, TRAINING
from ..storage.opening import open_source
from ..storage.sources import read_at
from ..storage.urls import StrPath, located, public_name

__all__ = ["Made", "look_at_made"]

_FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_LONGEST_CONFIG: Final = 1 << 20  # bytes
_LARGEST_RANK: Final = 1 << 31
_K = gguf.Keys.General


class Made(NamedTuple):
    """A merged model, a base model with other norms, or an adapter of PEFT's."""

    source: str
    """Name of the file or folder."""
    format: Literal["model", "peft"]
    nbytes: int
    """Size of the file, or of the folder's files that this project writes."""
    n_tensors: int | None
    """None for a folder, which has none of what follows but its base and its rank."""
    holds: str | None
    """How much of a training is in a model, see `targets.about`."""
    training: str | None
    """Fingerprint of the training, see `targets.about.fingerprint`."""
    name: str | None
    """What it calls itself."""
    base: str | None
    """Name or id of the base model."""
    version: str | None
    """Of the ggcl_fast that wrote a model."""
    rank: int | None
    """r of a folder; None for a model, whose training is part of its weights."""


def look_at_made(path: StrPath) -> Made | None:
    """Return what a model that was made here tells, or a PEFT adapter, whoever made it; None for anything else."""
    with contextlib.suppress(CheckpointError, OSError, ValueError, RecursionError):
        return _folder(path) if os.path.isdir(located(path)) else _model(path)
    return None


def _model(path: StrPath) -> Made | None:
    with contextlib.closing(open_source(path)) as source:
        header = read_header(source)
        keys = header.keys
        if MADE_BY not in keys or HOLDS not in keys:
            return None
        holds, training, name, base, version = (
            _text(keys.get(key))
            for key in (HOLDS, TRAINING, _K.NAME, _K.BASE_MODEL_NAME.format(id=0), MADE_BY)
        )  # fmt: skip
        n_tensors = len(header.names)
        return Made(source.name, "model", source.file_size, n_tensors, holds, training, name, base, version, None)


def _folder(path: StrPath) -> Made | None:
    folder = located(path)
    files = [place for name in _FILES if os.path.isfile(place := os.path.join(folder, name))]
    if [os.path.basename(place) for place in files[:2]] != list(_FILES[:2]):
        return None
    with contextlib.closing(open_source(files[0])) as source:
        config = json.loads(bytes(read_at(source, 0, _LONGEST_CONFIG)))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return None
    nbytes, rank = sum(map(os.path.getsize, files)), config.get("r")
    return Made(
        public_name(path), "peft", nbytes, None, None, None, None, _text(config.get("base_model_name_or_path")), None,
        rank if type(rank) is int and 0 < rank <= _LARGEST_RANK else None,
    )  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
