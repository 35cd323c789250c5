"""What a checkpoint and its base model are to each other, settled before anything is written.

Every target begins here: which architecture it is, that the checkpoint was trained on this base, how many tokens it
has, and in which order its rows are.  What comes back is a checkpoint that fits, and what is to be said of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..formats.finetune_keys import ARCH, INVOCATION, is_architecture
from ..formats.schema import MODULES, OUTPUT, TOKEN_EMBD
from .base_model import BaseModel
from .options import Options
from .rows import in_gguf_order, padded

__all__ = ["Fitted", "fit"]

_LLAMA: Final = frozenset(module.name for module in MODULES)


class Fitted(NamedTuple):
    """A checkpoint that fits the model that it is for."""

    checkpoint: Checkpoint
    arch: str
    """Architecture, as GGUF files name it."""
    notes: tuple[str, ...]
    """What the user should know of it."""


def fit(
    checkpoint: Checkpoint,
    options: Options,
    base: BaseModel | None,
    *,
    left_out: Collection[str] = (),
    reorder: bool = True,
) -> Fitted:
    """Make `checkpoint` fit.

    Parameters
    ----------
    checkpoint, options, base
        As a target has them.
    left_out
        Names of weights that the target leaves out, whether they fit or not.
    reorder
        Whether rows of q and k are put into the order of GGUF's models.

    Raises
    ------
    CheckpointError
        It is an activated LoRA, or the architecture is not known, or the checkpoint was trained on another model, or it
        is not known how to put its rows into order.
    """
    if INVOCATION in checkpoint.extra:
        raise CheckpointError(
            "an activated LoRA, which changes what follows certain tokens alone: no other file can tell that",
            source=checkpoint.source.name, field=INVOCATION, expected="none",
            found=f"{checkpoint.extra[INVOCATION]} tokens", hint="llama.cpp of today loads it as it is",
        )  # fmt: skip
    arch = _architecture(checkpoint, options, base)
    notes: list[str] = []
    if base is not None:
        base.check(checkpoint, left_out)
        checkpoint, note = _with_all_tokens(checkpoint, base, left_out)
        notes += note
        notes += base.layers_left(checkpoint)
    if reorder:
        checkpoint, note = in_gguf_order(checkpoint, options, base, arch)
        notes += note
    return Fitted(checkpoint, arch, tuple(notes))


def _architecture(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> str:
    """Return the architecture that somebody tells, all of them the same."""
    if options.arch is not None and not is_architecture(options.arch):
        raise CheckpointError(
            source=checkpoint.source.name, field="--arch (arch=)", expected="the name of an architecture",
            found=f"'{options.arch}'",
        )  # fmt: skip
    told = {
        checkpoint.source.name: checkpoint.arch,
        "--arch (arch=)": options.arch,
        base.source.name if base is not None else "": base.arch if base is not None else None,
    }
    found = {who: arch for who, arch in told.items() if arch is not None}
    if len(set(found.values())) > 1:
        first, expected = next(iter(found.items()))
        second, other = next((who, arch) for who, arch in found.items() if arch != expected)
        raise CheckpointError(
            "not the architecture of the base model", source=checkpoint.source.name, field="architecture",
            expected=f"'{other}' of {second}", found=f"'{expected}' of {first}",
            hint="it was trained on another model" if base is not None else None,
        )  # fmt: skip
    if found:
        return next(iter(found.values()))
    for pair in checkpoint.pairs:
        if pair.module not in _LLAMA:
            raise CheckpointError(
                "LLaMA has no such weight, and nothing tells the architecture", source=checkpoint.source.name,
                tensor=pair.weight, hint="--base tells it, or --arch NAME (arch=), as GGUF files name it",
            )  # fmt: skip
    return ARCH


def _with_all_tokens(
    checkpoint: Checkpoint, base: BaseModel, left_out: Collection[str]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return `checkpoint` with deltas of zero for tokens that the base model was given after the training."""
    n_rows = {}
    for pair in checkpoint.pairs:
        if pair.weight in (TOKEN_EMBD, OUTPUT) and pair.weight not in left_out:
            n_tokens = base.n_tokens(pair)
            if n_tokens > pair.n_out:
                n_rows[pair.row_b] = n_tokens
    if not n_rows:
        return checkpoint, ()
    n_trained = min(int(checkpoint.table["ne1"][row]) for row in n_rows)
    n_tokens = max(n_rows.values())
    note = f"the base model has {n_tokens} tokens, of which training knew {n_trained}: the others have no delta"
    return padded(checkpoint, n_rows), (note,)
