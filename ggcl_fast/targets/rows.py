"""Order and number of the rows of B: what a pair has to fit the weight that it changes.

llama.cpp rotates neighbouring values of a head together, Hugging Face a value of the first half of the head with one
of the second.  The rows of the weights of q and k are therefore in another order in GGUF files, and so are those of B
in a `Checkpoint` whose `rows` say so.  Which rows belong together is a matter of heads, which the base model tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Final

import gguf

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.decoded import Decoded, EncodedTensor
from ..formats.finetune_keys import ARCH
from .base_model import BaseModel, Heads
from .options import Options

__all__ = ["ROTATED", "count_heads", "heads_of", "in_gguf_order", "padded"]

ROTATED: Final = {"attn_q": "n_head", "attn_k": "n_head_kv"}
"""Field of `Heads` by the module whose rows are rotated, in the architectures that are known."""
_FUSED: Final = "attn_qkv"  # q, k and v in one weight
_TOLD: Final = "--base or --heads N[,N_KV] (heads=) tells the number of heads"


def heads_of(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> Heads:
    """Return the heads that the base model has, or the options, or the checkpoint say.

    Raises
    ------
    CheckpointError
        Options and base model tell different ones.
    """
    if base is not None and base.heads.n_head:
        if options.heads is not None and options.heads != base.heads:
            raise CheckpointError(
                "the heads asked for are not the base model's", source=base.source.name, field="heads",
                expected=",".join(map(str, options.heads)), found=",".join(map(str, base.heads)),
                hint="leave --heads (heads=) out: the base model tells them",
            )  # fmt: skip
        return base.heads
    if options.heads is not None:
        return Heads(*options.heads)
    return Heads(checkpoint.parameters.n_head, checkpoint.parameters.n_head_kv)


def count_heads(checkpoint: Checkpoint, pairs: Iterable[Pair], heads: Heads) -> dict[Pair, int]:
    """Return how many heads the rows of each pair belong to, all of modules that are `ROTATED`.

    Raises
    ------
    CheckpointError
        There cannot be so many: the rows do not divide, or q and k would have heads of different lengths.
    """
    counts: dict[Pair, int] = {}
    for pair in pairs:
        n_head: int = getattr(heads, ROTATED[pair.module])
        if n_head <= 0 or pair.n_out % (2 * n_head):
            raise CheckpointError(
                source=checkpoint.source.name, field=ROTATED[pair.module],
                expected=f"a divisor of half of {pair.n_out}, the rows of {pair.weight}",
                found=n_head or "nothing that tells it", hint=_TOLD,
            )  # fmt: skip
        counts[pair] = n_head
    lengths = {pair: pair.n_out // n_head for pair, n_head in counts.items()}
    first = next(iter(lengths), None)
    for pair, length in lengths.items():
        if first is not None and length != lengths[first]:
            raise CheckpointError(
                f"by {heads.n_head} heads and {heads.n_head_kv} of keys, heads have different lengths",
                source=checkpoint.source.name, tensor=pair.weight, field="rows of a head",
                expected=f"{lengths[first]} as in {first.weight}", found=length, hint=_TOLD,
            )  # fmt: skip
    return counts


def in_gguf_order(
    checkpoint: Checkpoint, options: Options, base: BaseModel | None, arch: str
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return `checkpoint` with all rows in the order of GGUF models, and what is to be said of it.

    Raises
    ------
    CheckpointError
        How many heads the rows belong to is not known, or which order they have in models of `arch`.
    """
    others = [pair for pair in checkpoint.pairs if pair.module in (*ROTATED, _FUSED)]
    if checkpoint.rows == "gguf" or not others:
        return checkpoint, ()
    modules = " and ".join(sorted({pair.module for pair in others}))
    is_known = arch == ARCH and all(pair.module != _FUSED for pair in others)
    if options.rows == "gguf":
        order = "not in" if is_known else "in Hugging Face's order, which may not be"
        return checkpoint, (
            f"the rows of {modules} were taken as they stand: they are {order} the order of GGUF's models",
        )
    first = others[0]
    as_they_stand = "--rows gguf (rows='gguf') takes them as they stand, as llama.cpp did in 2023"
    if not is_known:
        raise CheckpointError(
            f"the rows are in Hugging Face's order, and which one models of architecture '{arch}' have is not known",
            source=checkpoint.source.name, tensor=first.weight, hint=as_they_stand,
        )  # fmt: skip
    heads = heads_of(checkpoint, options, base)
    if not all(heads):
        raise CheckpointError(
            "the rows are in Hugging Face's order, and that of GGUF's models depends on the number of heads",
            source=checkpoint.source.name, tensor=first.weight,
            hint=f"--base tells it, or --heads N[,N_KV] (heads=); {as_they_stand}, which computes something else",
        )  # fmt: skip
    n_heads = {pair.row_b: n_head for pair, n_head in count_heads(checkpoint, others, heads).items()}
    note = f"the rows of {modules} were put into GGUF's order, by {heads.n_head} heads and {heads.n_head_kv} of keys"
    return _shown(checkpoint, n_heads, {}), (note,)


def padded(checkpoint: Checkpoint, n_rows: Mapping[int, int]) -> Checkpoint:
    """Return `checkpoint` with more rows in some tensors, by their row in the table; the new ones are zero."""
    return _shown(checkpoint, {}, n_rows) if n_rows else checkpoint


def _shown(checkpoint: Checkpoint, n_heads: Mapping[int, int], n_rows: Mapping[int, int]) -> Checkpoint:
    """Return `checkpoint` with tensors shown in another way, see `decoded.EncodedTensor`."""
    columns = (checkpoint.table[field].tolist() for field in ("offset", "nbytes", "ne0", "ne1"))
    tensors = [
        EncodedTensor(
            offset, nbytes, gguf.GGMLQuantizationType.F32, (ne1, ne0), n_head=n_heads.get(row, 0),
            n_rows=n_rows.get(row, 0),
        )
        for row, (offset, nbytes, ne0, ne1) in enumerate(zip(*columns))
    ]  # fmt: skip
    shown = Decoded(checkpoint.source, tensors)
    table = checkpoint.table.copy()
    table["offset"] = shown.offsets
    table["nbytes"] = [tensor.shown for tensor in tensors]
    for row, n in n_rows.items():
        table["ne1"][row] = max(n, table["ne1"][row])
    table.flags.writeable = False
    return dataclasses.replace(checkpoint, source=shown, table=table, rows="gguf" if n_heads else checkpoint.rows)
