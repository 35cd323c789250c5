"""The summary of a checkpoint, put together from one pass over its values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..checkpoint import Checkpoint, ModelParameters, Pair
from ..readers.engine import Engine
from ..storage.copying import Progress
from .models import guess
from .summary import Moments, PairSummary, Summary, TensorSummary
from .survey import Values
from .values import read_values
from .verdict import judge

__all__ = ["summarise"]


def summarise(checkpoint: Checkpoint, *, engine: Engine = "auto", progress: Progress | None = None) -> Summary:
    """Read all tensors and tell what is inside: values, sizes of the deltas, and whether the training is sound.

    Needs memory for a few blocks of 1 MiB, whatever the size of the file, which is read and never mapped.

    Parameters
    ----------
    checkpoint
        What `open_checkpoint` gave.
    engine
        What goes through the values: see `survey.pick_engine`.
    progress
        Called now and then with the number of bytes read since its last call.

    Raises
    ------
    CheckpointError
        The checkpoint is closed, or the file changed since it was opened.
    OSError
        It can no longer be read.
    """
    pairs = checkpoint.pairs
    values, squared = read_values(checkpoint, pairs, engine=engine, progress=progress)
    checkpoint.source.check_unchanged()
    tensors = tuple(map(_tensor_summary, checkpoint.names, checkpoint.table, values))
    weights = tuple(_pair_summary(pair, squared.get(pair), checkpoint.scale, values) for pair in pairs)
    moments = _moments(tensors)
    changes = [pair.change for pair in weights if pair.change is not None]
    verdict, reasons = judge(tensors, weights, checkpoint.optimizer, moments, _n_vocab(checkpoint.parameters, weights))
    return Summary(
        source=checkpoint.source.name,
        format=checkpoint.format,
        nbytes=checkpoint.source.size,
        verdict=verdict,
        reasons=reasons,
        model=guess(checkpoint.parameters),
        parameters=checkpoint.parameters,
        ranks=dict(checkpoint.ranks),
        scale=checkpoint.scale,
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


def _pair_summary(pair: Pair, squared: float | None, scale: float, values: Sequence[Values]) -> PairSummary:
    norm = None if squared is None else abs(scale) * math.sqrt(squared)
    if norm is not None and not math.isfinite(norm):
        norm = math.nan
    zero = any(v.squares == 0 and not v.n_nan and not v.n_inf for v in (values[pair.row_a], values[pair.row_b]))
    return PairSummary(
        weight=pair.weight,
        layer=pair.layer,
        module=pair.module,
        rank=pair.rank,
        n_in=pair.n_in,
        n_out=pair.n_out,
        norm=norm,
        trained=not zero and norm != 0,
        change=norm / math.sqrt(pair.n_in) if norm is not None and pair.is_norm else None,
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
