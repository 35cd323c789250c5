"""Whether a training is any good, from the numbers that there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ..checkpoint import Adam, Optimizer
from .summary import Moments, PairSummary, TensorSummary, Verdict

__all__ = ["LARGEST_CHANGE", "judge"]

LARGEST_CHANGE: Final = 10.0
"""Relative change of a norm from which on a training counts as diverged: its weights are about one."""

_NAMED: Final = 3  # tensors that a reason names


def judge(
    tensors: Sequence[TensorSummary],
    pairs: Sequence[PairSummary],
    optimizer: Optimizer | None,
    moments: Moments | None,
    n_vocab: int,
    zero_tail: int = 0,
) -> tuple[Verdict, tuple[str, ...]]:
    """Say what a training has come to, and why.

    Incomplete
        The file ends in zeros for no reason: `Checkpoint.zero_tail`.
    Diverged
        Values or losses that are not finite; second moments below zero, which are averages of squares; a norm that
        changed by more than `LARGEST_CHANGE` times its size; a last loss that is well above the best one and worse
        than guessing, which costs ``log(n_vocab)``.
    Untrained
        No delta is other than zero.
    Healthy
        Everything else.
    """
    if zero_tail:
        return "incomplete", (f"the last {zero_tail:,} bytes are zeros: the end of the file was never written",)
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
