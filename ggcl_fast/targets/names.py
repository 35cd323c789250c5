"""Which outputs a job has, and what each is called: known before anything is read."""

from __future__ import annotations

import os
import re
from typing import Final

from ..storage.urls import StrPath, below, is_url, last_part, located
from .options import Options

__all__ = ["SHARD", "inputs", "outputs", "taken", "target_name"]

SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$", re.ASCII)
"""How the name of one of several files of a model ends."""
_SUFFIXES: Final = (".ggcl", ".ggla", ".gguf", ".bin", ".ckpt", ".chk", ".checkpoint", ".dat")


def target_name(source: StrPath, options: Options) -> str:
    """Return the target's name for a source in a folder: a customary suffix is replaced, any other is kept."""
    name = last_part(source)
    stem, suffix = os.path.splitext(name)
    return (stem if suffix.lower() in _SUFFIXES else name) + ("" if options.folder else ".gguf")


def inputs(source: StrPath, options: Options) -> list[StrPath]:
    """Return what a job reads: its source, and the base model where there is one."""
    return [source] if options.base is None else [source, options.base]


def outputs(target: StrPath, options: Options, *, norms: bool = True) -> list[StrPath]:
    """Return what a job writes, in the order in which it appears; all but a folder are files of a `plan.Plan`.

    Without `norms`, deltas of norms that somebody trained, an adapter has no copy of its base model with it.
    """
    if options.folder:
        return [target]
    if norms and options.to in ("adapter", None) and options.base is not None:
        return [_base_copy(target, options), target]
    return [target]


def taken(target: StrPath, options: Options, *, norms: bool = True) -> list[StrPath]:
    """Return every name that a job takes: its outputs, and the files in them where they are folders."""
    return [*outputs(target, options, norms=norms), *(below(located(target), name) for name in options.folder)]


def _base_copy(target: StrPath, options: Options) -> StrPath:
    """Return where the copy of the base model with changed norms goes: beside the adapter, named after both."""
    if options.base_out is not None:
        return options.base_out
    assert options.base is not None  # or there would be no copy
    stems = [os.path.splitext(last_part(name))[0] for name in (options.base, target)]
    name = f"{SHARD.sub('', stems[0])}-{stems[1]}.gguf"
    return f"{str(target).rpartition('/')[0]}/{name}" if is_url(target) else os.path.join(os.path.dirname(target), name)
