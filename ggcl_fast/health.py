"""What is inside a checkpoint, and whether it is any good: numbers for tensors, sizes of deltas, a verdict.

Everything streams: a thread reads blocks of at most 1 MiB ahead, and each block is gone through once while it is in
the processor's cache.  Memory stays at a few of these blocks, whatever the size of the file.

The size of a delta ``B @ A.T`` never takes the product: ``||B A^T||^2 = sum((A^T A) * (B^T B))``, two matrices of
rank x rank that add up block by block.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from . import models
from .checkpoint import Adam, Checkpoint, ModelParameters, Optimizer, Training
from .payload import BLOCK, Progress, read_ahead
from .sources import Source
from .survey import LARGEST_BLOCK, Doubles, Floats, Kernels, Values, pick_engine
from .sweep import Engine

__all__ = [
    "LARGEST_CHANGE", "LARGEST_RANK", "Moments", "PairSummary", "Summary", "TensorSummary", "Verdict", "judge",
    "summarise",
]  # fmt: skip

LARGEST_RANK: Final = 1024
"""Rank up to which the size of a delta is computed: its two Gram matrices take 16 * rank * rank bytes."""
LARGEST_CHANGE: Final = 10.0
"""Relative change of a norm from which on a training counts as diverged: its weights are about one."""

Verdict = Literal["healthy", "diverged", "untrained"]
"""What `judge` says of a checkpoint."""

_SAFE: Final = (1e-12, 1e12)  # largest magnitudes whose squares, and sums of those, float32 can tell
_STEP: Final = min(BLOCK, LARGEST_BLOCK)  # bytes of a block, at most
_NAMED: Final = 3  # tensors that a reason names


# --- what there is to know ------------------------------------------------------------------------------------------


class TensorSummary(NamedTuple):
    """The values of one tensor."""

    name: str
    """GGUF name."""
    shape: tuple[int, ...]
    """As numpy has it, outermost dim first."""
    nbytes: int
    """Bytes of data."""
    n_nan: int
    """Values that are not a number."""
    n_inf: int
    """Values that are infinite, of either sign."""
    n_zero: int
    """Values that are zero."""
    minimum: float | None
    """Smallest finite value; None where there is none."""
    maximum: float | None
    """Largest finite value; None where there is none."""
    norm: float
    """Square root of the sum of squares of all finite values."""


class PairSummary(NamedTuple):
    """One adapted weight: what its lora_a and lora_b add to it."""

    weight: str
    """GGUF name of the weight, such as ``blk.0.attn_q.weight``."""
    layer: int | None
    """0-based number of its layer; None for a weight of the model itself."""
    module: str
    """Which weight of the layer or model, such as ``attn_q``."""
    rank: int
    n_in: int
    n_out: int
    norm: float | None
    """Frobenius norm of ``scale * B @ A.T``; NaN where values are not finite, None above `LARGEST_RANK`."""
    trained: bool
    """False where the delta is zero: B is all zero, as at the start of a training, or A is."""
    change: float | None
    """Of a norm, whose weights are about one: the delta's root mean square, its relative size.  None for others."""


class Moments(NamedTuple):
    """Range of Adam's moments; None where no value is finite."""

    first_minimum: float | None
    first_maximum: float | None
    second_minimum: float | None
    """Never below 0 in a sound file."""
    second_maximum: float | None


class Summary(NamedTuple):
    """Everything that can be told about a checkpoint by itself; made by `Checkpoint.summary`."""

    source: str
    """Name of the file."""
    kind: str
    """What it was read from: "ggcl", or another kind of file that `open_checkpoint` reads."""
    nbytes: int
    """Size of the file."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why the verdict is what it is; what is remarkable about a healthy one."""
    model: str
    """The base model that it fits, see `models.guess`; "unknown" where it fits none that is known."""
    parameters: ModelParameters
    ranks: Mapping[str, int]
    """LoRA ranks, as `Checkpoint.ranks` has them."""
    scale: float
    """What ``B @ A.T`` is multiplied by: 1 for everything that finetune wrote."""
    training: Training
    optimizer: Optimizer | None
    """None where the file has no optimizer state."""
    n_parameters: int
    """LoRA elements."""
    delta_norm: float | None
    """Root of the sum of squares of the norms of all deltas; NaN or None where one of them is."""
    norm_change: float | None
    """Largest `PairSummary.change`; None where there is no norm."""
    moments: Moments | None
    """None without an Adam state."""
    tensors: tuple[TensorSummary, ...]
    """All tensors, in the order of the file."""
    pairs: tuple[PairSummary, ...]
    """All adapted weights, in the order of the file."""
    warnings: tuple[str, ...]
    """What is unusual about the file, as `Checkpoint.warnings` has it."""

    @property
    def loss(self) -> float | None:
        """The last loss that the file tells: Adam's previous loss, L-BFGS's best one, None without an optimizer."""
        if self.optimizer is None:
            return None
        return self.optimizer.previous_loss if isinstance(self.optimizer, Adam) else self.optimizer.best_loss


# --- a whole checkpoint ---------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A stretch of one tensor."""

    row: int
    start: int
    stop: int
    rank: int
    """Of the pair that the tensor belongs to; 0 where there is no Gram matrix to form."""
    last: bool
    """Whether the tensor ends with it."""


def summarise(checkpoint: Checkpoint, *, engine: Engine = "auto", progress: Progress | None = None) -> Summary:
    """Read all tensors of `checkpoint` and return its summary; see `Checkpoint.summary`."""
    pairs = _pairs(checkpoint)
    values, grams = _read(checkpoint, pairs, pick_engine(engine, int(checkpoint.table["nbytes"].sum())), progress)
    checkpoint.source.check_unchanged()
    scale = checkpoint.scale
    tensors = tuple(map(_tensor_summary, checkpoint.names, checkpoint.table, values))
    weights = tuple(_pair_summary(checkpoint, pair, grams.get(pair), scale, values) for pair in pairs)
    moments = _moments(tensors)
    changes = [pair.change for pair in weights if pair.change is not None]
    verdict, reasons = judge(tensors, weights, checkpoint.optimizer, moments, _n_vocab(checkpoint.parameters, weights))
    return Summary(
        source=checkpoint.source.name,
        kind=checkpoint.kind,
        nbytes=checkpoint.source.size,
        verdict=verdict,
        reasons=reasons,
        model=models.guess(checkpoint.parameters),
        parameters=checkpoint.parameters,
        ranks=dict(checkpoint.ranks),
        scale=scale,
        training=checkpoint.training,
        optimizer=checkpoint.optimizer,
        n_parameters=sum(pair.rank * (pair.n_in + pair.n_out) for pair in weights),
        delta_norm=_root_of_squares([pair.norm for pair in weights]),
        norm_change=_largest(changes),
        moments=moments,
        tensors=tensors,
        pairs=weights,
        warnings=checkpoint.warnings,
    )


def _pairs(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Return the rows of every lora_a and its lora_b, in the order of the file."""
    rows = {name: row for row, name in enumerate(checkpoint.names)}
    ne0, sizes = (checkpoint.table[field].tolist() for field in ("ne0", "nbytes"))
    found = []
    for name, a in rows.items():
        b = rows.get(f"{name[:-1]}b") if name.endswith(".lora_a") else None
        if b is not None and ne0[a] == ne0[b] and sizes[a] and sizes[b]:
            found.append((a, b))
    return found


def _read(
    checkpoint: Checkpoint, pairs: Sequence[tuple[int, int]], kernels: Kernels, progress: Progress | None
) -> tuple[list[Values], dict[tuple[int, int], float]]:
    """Read every tensor once: what its values are by row, and by pair the squared norm of ``B @ A.T``."""
    values = [Values()] * len(checkpoint.names)
    squared: dict[tuple[int, int], float] = {}
    grams: dict[int, Doubles] = {}
    a_of = {b: a for a, b in pairs}
    for piece, block in _blocks(checkpoint.source, _pieces(checkpoint, pairs)):
        row = piece.row
        floats = _floats(block)
        found = kernels.survey(floats)
        values[row] = values[row].merged(found)
        if piece.rank:
            grams[row] = grams.get(row, 0.0) + _gram(floats.reshape(-1, piece.rank), found, kernels)
            if row in a_of and piece.last:
                squared[a_of[row], row] = _inner(grams.pop(a_of[row]), grams.pop(row))
        if progress is not None:
            progress(piece.stop - piece.start)
    return values, squared


def _pieces(checkpoint: Checkpoint, pairs: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
    """Cut every tensor into whole rows of at most 1 MiB, each lora_b right after its lora_a."""
    offsets, sizes, widths = (checkpoint.table[field].tolist() for field in ("offset", "nbytes", "ne0"))
    paired = {row for pair in pairs for row in pair}
    alone = ((row,) for row in range(len(offsets)) if row not in paired)
    for rows in sorted([*pairs, *alone]):
        for row in rows:
            offset, end = offsets[row], offsets[row] + sizes[row]
            rank = widths[row] if row in paired and widths[row] <= LARGEST_RANK else 0
            step = _STEP // (4 * rank) * 4 * rank if rank else _STEP
            for start in range(offset, end, step):
                yield _Piece(row, start, min(start + step, end), rank, start + step >= end)


def _blocks(source: Source, pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, memoryview]]:
    """Yield each piece with its bytes, which are there until the next one is asked for."""
    if source.memory is not None:
        for piece in pieces:
            yield piece, source.memory[piece.start : piece.stop]
        return
    for piece, buffer, release in read_ahead(source, pieces):
        yield piece, buffer[: piece.stop - piece.start]
        release()


def _floats(block: memoryview) -> Floats:
    floats = np.frombuffer(block, "<f4")
    if sys.byteorder == "big" or not floats.flags.aligned:
        floats = floats.astype(np.float32)
    floats.flags.writeable = False  # one signature for every kind of buffer
    return floats


def _gram(rows: Floats, found: Values, kernels: Kernels) -> Doubles:
    """Return ``rows.T @ rows``; NaN where `rows` has values that are not finite."""
    rank = rows.shape[1]
    if found.n_nan or found.n_inf:
        return np.full((rank, rank), np.nan)
    if rank == 1:
        return np.array([[found.squares]])
    if _SAFE[0] < max(-found.lowest, found.highest) < _SAFE[1]:
        return kernels.gram(rows)
    wide = rows.astype(np.float64)
    return wide.T @ wide


def _inner(a: Doubles, b: Doubles) -> float:
    """Return the sum of the products of the entries of both; never below 0, as it can be by rounding only."""
    total = float(np.add.reduce(a * b, axis=None))
    return total if total > 0 or math.isnan(total) else 0.0


def _tensor_summary(name: str, row: np.void, values: Values) -> TensorSummary:
    ne0, ne1 = int(row["ne0"]), int(row["ne1"])
    some = values.lowest <= values.highest
    return TensorSummary(
        name=name,
        shape=(ne1, ne0) if row["n_dims"] == 2 else (ne0,),
        nbytes=int(row["nbytes"]),
        n_nan=values.n_nan,
        n_inf=values.n_inf,
        n_zero=values.n_zero,
        minimum=values.lowest if some else None,
        maximum=values.highest if some else None,
        norm=math.sqrt(values.squares),
    )


def _pair_summary(
    checkpoint: Checkpoint, pair: tuple[int, int], squared: float | None, scale: float, values: Sequence[Values]
) -> PairSummary:
    a, b = pair
    weight = checkpoint.names[a].removesuffix(".lora_a")
    found = re.fullmatch(r"blk\.([0-9]{1,9})\.(.+)", weight)
    module = (found[2] if found else weight).removesuffix(".weight")
    n_in, n_out = (int(checkpoint.table["ne1"][row]) for row in pair)
    norm = None if squared is None else abs(scale) * math.sqrt(squared)
    if norm is not None and not math.isfinite(norm):
        norm = math.nan
    zero = any(v.squares == 0 and not v.n_nan and not v.n_inf for v in (values[a], values[b]))
    return PairSummary(
        weight=weight,
        layer=int(found[1]) if found else None,
        module=module,
        rank=int(checkpoint.table["ne0"][a]),
        n_in=n_in,
        n_out=n_out,
        norm=norm,
        trained=not zero and norm != 0,
        change=norm / math.sqrt(n_in) if norm is not None and module.endswith("norm") and n_out == 1 else None,
    )


def _moments(tensors: Iterable[TensorSummary]) -> Moments | None:
    by_name = {one.name: one for one in tensors}
    first, second = (by_name.get(f"optimizer.adam.{which}_moments") for which in ("first", "second"))
    if first is None or second is None:
        return None
    return Moments(first.minimum, first.maximum, second.minimum, second.maximum)


def _root_of_squares(norms: Sequence[float | None]) -> float | None:
    if not norms or None in norms:
        return None
    return math.hypot(*(norm for norm in norms if norm is not None))


def _largest(values: Sequence[float]) -> float | None:
    """Return the largest value, NaN where there is one."""
    if not values:
        return None
    return math.nan if any(map(math.isnan, values)) else max(values)


def _n_vocab(parameters: ModelParameters, pairs: Iterable[PairSummary]) -> int:
    """Return the number of tokens, from the tensors where the file does not tell it; 0 where neither does."""
    return parameters.n_vocab or max((p.n_out for p in pairs if p.module in ("token_embd", "output")), default=0)


# --- the verdict ----------------------------------------------------------------------------------------------------


def judge(
    tensors: Sequence[TensorSummary],
    pairs: Sequence[PairSummary],
    optimizer: Optimizer | None,
    moments: Moments | None,
    n_vocab: int,
) -> tuple[Verdict, tuple[str, ...]]:
    """Say what a training has come to, and why.

    Diverged
        Values or losses that are not finite; second moments below zero, which are averages of squares; a norm that
        changed by more than `LARGEST_CHANGE` times its size; a last loss that is well above the best one and worse
        than guessing, which costs ``log(n_vocab)``.
    Untrained
        No delta is other than zero.
    Healthy
        Everything else.
    """
    wrong = [
        *_not_finite(tensors),
        *_loss_is_wrong(optimizer, n_vocab),
        *_moments_are_wrong(moments),
        *_norms_are_wrong(pairs),
    ]
    if wrong:
        return "diverged", tuple(wrong)
    idle = [pair.weight for pair in pairs if not pair.trained]
    if len(idle) == len(pairs):
        return "untrained", (f"all {len(pairs)} deltas are zero, as they are before a training's first step",)
    remarks = ["every value is finite"]
    if idle:
        remarks.append(f"{len(idle)} of {len(pairs)} deltas are zero, never trained: {_some(idle)}")
    else:
        remarks.append(f"all {len(pairs)} deltas are trained")
    return "healthy", tuple(remarks)


def _not_finite(tensors: Sequence[TensorSummary]) -> Iterator[str]:
    bad = [one for one in tensors if one.n_nan or one.n_inf]
    if bad:
        names = _some([f"{one.name} ({one.n_nan:,} NaN, {one.n_inf:,} infinite)" for one in bad])
        yield f"{len(bad)} of {len(tensors)} tensors have values that are not finite: {names}"


def _loss_is_wrong(optimizer: Optimizer | None, n_vocab: int) -> Iterator[str]:
    if optimizer is None or (optimizer.just_initialized and optimizer.iteration == 0):
        return
    losses = {"best": optimizer.best_loss}
    if isinstance(optimizer, Adam):
        losses = {"last": optimizer.previous_loss, **losses}
    odd = [f"the {which} loss is {loss}" for which, loss in losses.items() if not math.isfinite(loss)]
    yield from odd
    if odd or not isinstance(optimizer, Adam) or n_vocab < 2:
        return
    last, best, guessing = optimizer.previous_loss, optimizer.best_loss, math.log(n_vocab)
    if last > guessing and last > 1.5 * best:
        yield (
            f"the last loss, {last:.4g}, is worse than guessing among {n_vocab:,} tokens ({guessing:.4g}); "
            f"the best was {best:.4g}"
        )


def _moments_are_wrong(moments: Moments | None) -> Iterator[str]:
    if moments is not None and moments.second_minimum is not None and moments.second_minimum < 0:
        yield f"Adam's second moments go down to {moments.second_minimum:.4g}, and averages of squares cannot"


def _norms_are_wrong(pairs: Iterable[PairSummary]) -> Iterator[str]:
    grown = [f"{p.weight} ({p.change:.4g} times)" for p in pairs if p.change is not None and p.change > LARGEST_CHANGE]
    if grown:
        yield f"norms changed by more than {LARGEST_CHANGE:g} times their size: {_some(grown)}"


def _some(names: Sequence[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
