"""Writing the base model with every delta added: one file that needs no adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import gguf

from ..checkpoint import Checkpoint
from ..formats.schema import OUTPUT
from ..storage.urls import StrPath
from .about import ALL, of_model, refuse_twice
from .base_model import BaseModel
from .deltas import Census
from .fitting import fit
from .options import Options
from .plan import Plan
from .rewriting import Item, model_file

__all__ = ["plan"]

_Type = gguf.GGMLQuantizationType
_EXACT: Final = (_Type.F32, _Type.F16)


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:  # noqa: ARG001
    """Plan the merged model.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or is in it already, or gguf cannot read the type of
        a weight.
    """
    assert base is not None  # `targets.TARGETS` says that it is needed
    if not options.adds_twice:
        refuse_twice(checkpoint, base, adds=ALL)
    fitted = fit(checkpoint, options, base)
    about = of_model(checkpoint, options, base, ALL)
    pairs = (pair._replace(scale=pair.scale / base.scale_of(pair)) for pair in fitted.checkpoint.pairs)
    census = Census()
    model = model_file(fitted.checkpoint, base, pairs, about, options.engine, census)
    return Plan((model.file,), model.n_tensors, (*fitted.notes, *_notes(model.changed)), census.warnings)


def _notes(items: Sequence[Item]) -> Iterator[str]:
    """Tell which weights could not be kept as they were."""
    changed = [item for item in items if item.pair is not None]
    as_others = [item for item in changed if item.info.type != item.origin.type]
    for type in dict.fromkeys(item.info.type for item in as_others):
        some = _listed([item for item in as_others if item.info.type == type])
        why = "which norms are" if type == _Type.F32 else "since gguf cannot quantize to their types"
        yield f"written as {type.name}, {why}: {some}"
    rounded = [item for item in changed if item.info.type == item.origin.type and item.info.type not in _EXACT]
    if rounded:
        yield f"rounded anew, which takes small deltas away: {_listed(rounded)}; an adapter with --base is exact"
    if any(item.info.name == OUTPUT and item.origin.name != OUTPUT for item in items):
        yield f"the embeddings are no longer tied: {OUTPUT} was added, since training changed the two apart"


def _listed(items: list[Item]) -> str:
    """Name tensors and their types, those of all layers together."""
    names = Counter((re.sub(r"^blk\.\d+\.", "blk.*.", item.info.name), item.origin.type.name) for item in items)
    return ", ".join(f"{name} ({type}{f', {n} times' if n > 1 else ''})" for (name, type), n in names.items())
