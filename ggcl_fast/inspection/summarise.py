"""The summary of a checkpoint, put together from one pass over its values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..checkpoint import Checkpoint, ModelParameters, Pair
from ..readers.engine import Engine
from ..storage.outputs import Progress
from .models import guess
from .summary import Moments, PairSummary, Summary, TensorSummary
from .survey import Values
from .values import read_values
from .verdict import judge

__all__ = ["summarise"]


def summarise(checkpoint: Checkpoint, *, engine: Engine = "auto", progress: Progress | None = None) -> Summary:
    """Read all tensors and tell what is inside: values, sizes of the deltas, and whether the training is sound.

    Needs memory for a few blocks of 1 MiB for each processor, whatever the size of the file, which is never mapped.

    Parameters
    ----------
    checkpoint
        What `open_checkpoint` gave.
    engine
        What goes through the values: see `survey.pick_engine`.
    progress
        Called now and then with the number of bytes read since its last call; see `conversion.convert`.

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
    columns = (checkpoint.table[field].tolist() for field in ("ne0", "ne1", "n_dims", "nbytes"))
    tensors = tuple(map(_tensor_summary, checkpoint.names, values, *columns))
    weights = tuple(_pair_summary(pair, each, values) for pair, each in zip(pairs, squared))
    moments = _moments(tensors)
    scales = {pair.scale for pair in pairs}
    changes = [pair.change for pair in weights if pair.change is not None]
    n_vocab = _n_vocab(checkpoint.parameters, weights)
    verdict, reasons = judge(tensors, weights, checkpoint.optimizer, moments, n_vocab, checkpoint.zero_tail)
    return Summary(
        source=checkpoint.source.name,
        format=checkpoint.format,
        nbytes=checkpoint.source.file_size,
        verdict=verdict,
        reasons=reasons,
        model=guess(checkpoint.parameters),
        parameters=checkpoint.parameters,
        ranks=dict(checkpoint.ranks),
        scale=scales.pop() if len(scales) == 1 else None,
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


def _tensor_summary(name: str, values: Values, ne0: int, ne1: int, n_dims: int, nbytes: int) -> TensorSummary:
    n_nan, n_inf, n_zero, lowest, highest, squares = values
    low, high = (lowest, highest) if lowest <= highest else (None, None)
    shape = (ne1, ne0) if n_dims == 2 else (ne0,)
    return TensorSummary(name, shape, nbytes, n_nan, n_inf, n_zero, low, high, math.sqrt(squares))


def _pair_summary(pair: Pair, squared: float | None, values: Sequence[Values]) -> PairSummary:
    weight, layer, module, n_in, n_out, rank, row_a, row_b, scale = pair
    norm = None if squared is None else abs(scale) * math.sqrt(squared)
    if norm is not None and not math.isfinite(norm):
        norm = math.nan
    a, b = values[row_a], values[row_b]
    zero = (a.squares == 0 and not a.n_nan and not a.n_inf) or (b.squares == 0 and not b.n_nan and not b.n_inf)
    change = norm / math.sqrt(n_in) if norm is not None and pair.is_norm else None
    return PairSummary(weight, layer, module, rank, n_in, n_out, norm, not zero and norm != 0, change)


def _moments(tensors: Iterable[TensorSummary]) -> Moments | None:
    by_name = {one.name: one for one in tensors if one.name.startswith("optimizer.")}
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
