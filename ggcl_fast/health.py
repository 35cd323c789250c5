"""What is inside a checkpoint, and whether it is any good: numbers for tensors, sizes of deltas, a verdict.

Everything streams: a thread reads blocks of at most 1 MiB ahead, and each block is gone through once while it is in
the processor's cache.  Memory stays at a few of these blocks, whatever the size of the file.

`survey` and `gram` are what goes through a block.  Like `sweep.sweep` they are plain functions that numba compiles
from outside; `survey_plainly` and `gram_plainly` give the same numbers with numpy, for files that do not repay numba's
start.

The size of a delta ``B @ A.T`` never takes the product: ``||B A^T||^2 = sum((A^T A) * (B^T B))``, two matrices of
rank x rank that add up block by block.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from . import models
from .checkpoint import Adam, Checkpoint, ModelParameters, Optimizer, Training
from .payload import BLOCK, Progress, read_ahead
from .sources import Source
from .sweep import ENGINES, Engine

__all__ = [
    "LARGEST_CHANGE", "LARGEST_RANK", "PLAIN", "Kernels", "Moments", "PairSummary", "Summary", "TensorSummary",
    "Values", "Verdict", "compiled", "gram", "gram_plainly", "judge", "pick_engine", "summarise", "survey",
    "survey_plainly",
]  # fmt: skip

LARGEST_RANK: Final = 1024
"""Rank up to which the size of a delta is computed: its two Gram matrices take 16 * rank * rank bytes."""
LARGEST_CHANGE: Final = 10.0
"""Relative change of a norm from which on a training counts as diverged: its weights are about one."""

Verdict = Literal["healthy", "diverged", "untrained"]
"""What `judge` says of a checkpoint."""

_SAFE: Final = (1e-12, 1e12)  # largest magnitudes whose squares, and sums of those, float32 can tell
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


# --- the pass over the values of a block ----------------------------------------------------------------------------


class Values(NamedTuple):
    """What `survey` finds in some values; of several blocks, what `merged` makes of them."""

    n_nan: int = 0
    n_inf: int = 0
    n_zero: int = 0
    lowest: float = math.inf
    """Smallest finite value; inf where there is none."""
    highest: float = -math.inf
    """Largest finite value; -inf where there is none."""
    squares: float = 0.0
    """Sum of squares of the finite values."""

    def merged(self, other: Values) -> Values:
        """Return the numbers of both together."""
        return Values(
            self.n_nan + other.n_nan,
            self.n_inf + other.n_inf,
            self.n_zero + other.n_zero,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.squares + other.squares,
        )


_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]


class Kernels(NamedTuple):
    """What goes through the blocks: compiled, or with numpy."""

    survey: Callable[[_Floats], Values]
    """Takes (n,) float32."""
    gram: Callable[[_Floats], _Doubles]
    """Takes rows of (n, rank) float32 and gives ``rows.T @ rows`` in float64; NaN where they are not all finite."""


_CHUNK: Final = 512  # rows that are multiplied together in float32 before they are added to float64
_PITCH: Final = _CHUNK + 16  # floats from row to row: a power of two would put all rows in the same lines of the cache

_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
_INFINITE = np.int32(0x7F800000)  # the magnitude of an infinity; those above are NaN
_SIGN = np.int32(31)
_LARGEST = np.int32(0x7FFFFFFF)
_SMALLEST = np.int32(-0x80000000)


def survey(values: Any, words: Any) -> tuple[Any, ...]:
    """Go through the values of a block once, and a second time where some of them are not finite.

    Numbers to compare are the floats' bits made monotone: as int32, which the compiler turns into vector code, as it
    does not with the minimum of floats.  Casts back to int32 are there since numba widens every sum to int64.

    Parameters
    ----------
    values
        (n,) float32, n below 2^31.
    words
        The same bytes as (n,) int32.

    Returns
    -------
    tuple
        Counts of NaN, infinite and zero values; smallest and largest finite value as monotone int32 (the former
        larger than the latter where there is none), for `_float` to turn back; sum of the squares of finite values
        in float64, where that of float32 values cannot overflow.
    """
    lowest, highest, n_zero, squares = _LARGEST, _SMALLEST, np.int32(0), 0.0
    for i in range(len(words)):
        word = words[i]
        key = np.int32(word ^ np.int32(np.int32(word >> _SIGN) & _MAGNITUDE))
        lowest = min(lowest, key)
        highest = max(highest, key)
        n_zero = np.int32(n_zero + np.int32(np.int32(word & _MAGNITUDE) == 0))
        value = np.float64(values[i])
        squares += value * value
    if squares < np.inf:
        return 0, 0, n_zero, lowest, highest, squares
    lowest, highest, n_nan, n_inf, squares = _LARGEST, _SMALLEST, 0, 0, 0.0
    for i in range(len(words)):
        word = words[i]
        magnitude = np.int32(word & _MAGNITUDE)
        if magnitude > _INFINITE:
            n_nan += 1
        elif magnitude == _INFINITE:
            n_inf += 1
        else:
            key = np.int32(word ^ np.int32(np.int32(word >> _SIGN) & _MAGNITUDE))
            lowest = min(lowest, key)
            highest = max(highest, key)
            value = np.float64(values[i])
            squares += value * value
    return n_nan, n_inf, n_zero, lowest, highest, squares


def _float(key: int) -> float:
    """Turn a monotone int32 back into the float that it stands for; -0.0 becomes 0.0."""
    word = key ^ 0x7FFFFFFF if key < 0 else key
    value: float = struct.unpack("<f", struct.pack("<i", word))[0]
    return value + 0.0


def gram(rows: Any, turned: Any, total: Any) -> None:
    """Add ``rows.T @ rows`` to `total`, on and above the diagonal and in blocks of 2 x 4 across it.

    `_CHUNK` rows at a time are turned, so that each entry is a product of two contiguous vectors, eight of which are
    formed together.  Beside BLAS this takes 1.2 to 1.5 of the time with one thread, adds up to a tenth of the error,
    and needs no threads of its own, whose waiting for each other costs many times as much on a busy machine.

    Parameters
    ----------
    rows
        (n, rank) float32.
    turned
        (padded, `_PITCH`) float32, room to work in; zeros from row `rank` on.
    total
        (padded, padded) float64; padded is rank rounded up to a multiple of 4.
    """
    n, rank = rows.shape
    padded = len(total)
    for first in range(0, n, _CHUNK):
        m = min(_CHUNK, n - first)
        for i in range(m):
            for j in range(rank):
                turned[j, i] = rows[first + i, j]
        for j in range(0, padded, 2):
            x, z = turned[j], turned[j + 1]
            for k in range(j & -4, padded, 4):
                p, q, r, s = turned[k], turned[k + 1], turned[k + 2], turned[k + 3]
                xp = xq = xr = xs = zp = zq = zr = zs = np.float32(0)
                for i in range(m):
                    xp += x[i] * p[i]
                    xq += x[i] * q[i]
                    xr += x[i] * r[i]
                    xs += x[i] * s[i]
                    zp += z[i] * p[i]
                    zq += z[i] * q[i]
                    zr += z[i] * r[i]
                    zs += z[i] * s[i]
                total[j, k] += xp
                total[j, k + 1] += xq
                total[j, k + 2] += xr
                total[j, k + 3] += xs
                total[j + 1, k] += zp
                total[j + 1, k + 1] += zq
                total[j + 1, k + 2] += zr
                total[j + 1, k + 3] += zs


def _survey_with(kernel: Callable[..., Any], values: _Floats) -> Values:
    n_nan, n_inf, n_zero, lowest, highest, squares = kernel(values, values.view(np.int32))
    if lowest > highest:
        return Values(n_nan, n_inf, n_zero)
    return Values(n_nan, n_inf, n_zero, _float(lowest), _float(highest), squares)


def _gram_with(kernel: Callable[..., Any], rows: _Floats) -> _Doubles:
    rank = rows.shape[1]
    padded = -(-rank // 4) * 4
    total = np.zeros((padded, padded))
    kernel(rows, np.zeros((padded, _PITCH), np.float32), total)
    upper = np.triu(total[:rank, :rank])
    return upper + np.triu(upper, 1).T


@functools.cache
def compiled() -> Kernels:
    """Return `survey` and `gram` compiled by numba, without the GIL.

    Compiled anew in each process that wants them, for the reason that `sweep.compiled` gives.  Sums may be taken in
    any order, which vector code needs; nothing else about floats is relaxed, NaN and infinity included.
    """
    import numba

    types: Any = numba.types
    f4, f8, i4, i8 = types.float32, types.float64, types.int32, types.int64
    floats, words, rows = types.Array(f4, 1, "C", True), types.Array(i4, 1, "C", True), types.Array(f4, 2, "C", True)
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    look = numba.njit(types.Tuple((i8, i8, i8, i4, i4, f8))(floats, words), **options)(survey)
    multiply = numba.njit(types.void(rows, f4[:, ::1], f8[:, ::1]), **options)(gram)
    return Kernels(functools.partial(_survey_with, look), functools.partial(_gram_with, multiply))


def survey_plainly(values: _Floats, wide: _Doubles | None = None) -> Values:
    """Return what the compiled `survey` does, with numpy.

    `wide` is room for at least as many values in float64: fresh memory would cost more than filling it.
    """
    # Not np.dot: BLAS would start threads for it.
    wide = np.empty(values.size) if wide is None else wide[: values.size]
    with np.errstate(invalid="ignore"):  # of signalling NaN
        wide[:] = values
    squares = float(np.add.reduce(np.square(wide, out=wide)))
    n_nan = n_inf = 0
    if not math.isfinite(squares):
        n_nan, n_inf = (int(np.count_nonzero(which(values))) for which in (np.isnan, np.isinf))
        finite = np.isfinite(values)
        values, squares = values[finite], float(np.add.reduce(wide[finite]))
    if not values.size:
        return Values(n_nan, n_inf)
    n_zero = int(np.count_nonzero(values == 0))
    return Values(n_nan, n_inf, n_zero, float(values.min()) + 0.0, float(values.max()) + 0.0, squares)


def gram_plainly(rows: _Floats) -> _Doubles:
    """Return what the compiled `gram` does, with numpy."""
    rank = rows.shape[1]
    step = max(64, (1 << 18) // rank**2)  # rows: as many as OpenBLAS multiplies without threads, up to rank 64
    total = np.zeros((rank, rank))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        total += some.T @ some
    return total


PLAIN: Final = Kernels(survey_plainly, gram_plainly)
"""What needs no numba."""


_START_COLD: Final = 1 << 30  # bytes that numpy goes through in the time that numba's import and start would add
_START_IMPORTED: Final = 3 << 28  # the same where numba is imported already

_surveyed = 0  # bytes surveyed without numba in this process


def pick_engine(engine: Engine, nbytes: int) -> Kernels:
    """Return what is to go through the next `nbytes` bytes: what `engine` says, or for "auto" what pays.

    The rule is that of `sweep.pick_engine`, by bytes, and the next file's are known: one large file is surveyed by
    the compiled pass from its start on.

    Raises
    ------
    ValueError
        `engine` is none of `sweep.ENGINES`.
    """
    global _surveyed
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if engine != "auto":
        return compiled() if engine == "numba" else PLAIN._replace(survey=_with_room())
    price = _START_IMPORTED if "numba" in sys.modules else _START_COLD
    if compiled.cache_info().currsize or _surveyed + nbytes > price:
        return compiled()
    _surveyed += nbytes
    return PLAIN._replace(survey=_with_room())


def _with_room() -> Callable[[_Floats], Values]:
    return functools.partial(survey_plainly, wide=np.empty(BLOCK // 4))


# --- a whole checkpoint ---------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A stretch of one tensor."""

    row: int
    start: int
    stop: int
    rank: int
    """Of the pair that the tensor belongs to; 0 where there is no Gram matrix to form."""


def summarise(checkpoint: Checkpoint, *, engine: Engine = "auto", progress: Progress | None = None) -> Summary:
    """Read all tensors of `checkpoint` and return its summary; see `Checkpoint.summary`."""
    pairs = _pairs(checkpoint)
    values, grams = _read(checkpoint, pairs, pick_engine(engine, int(checkpoint.table["nbytes"].sum())), progress)
    checkpoint.source.check_unchanged()
    scale = float(getattr(checkpoint, "scale", 1.0))
    tensors = tuple(map(_tensor_summary, checkpoint.names, checkpoint.table, values))
    weights = tuple(_pair_summary(checkpoint, pair, grams.get(pair), scale, values) for pair in pairs)
    moments = _moments(tensors)
    changes = [pair.change for pair in weights if pair.change is not None]
    verdict, reasons = judge(tensors, weights, checkpoint.optimizer, moments, _n_vocab(checkpoint.parameters, weights))
    return Summary(
        source=checkpoint.source.name,
        kind=getattr(checkpoint, "kind", "ggcl"),
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
    ne0 = checkpoint.table["ne0"].tolist()
    found = []
    for name, a in rows.items():
        b = rows.get(f"{name[:-1]}b") if name.endswith(".lora_a") else None
        if b is not None and ne0[a] == ne0[b] > 0:
            found.append((a, b))
    return found


def _read(
    checkpoint: Checkpoint, pairs: Sequence[tuple[int, int]], kernels: Kernels, progress: Progress | None
) -> tuple[list[Values], dict[tuple[int, int], float]]:
    """Read every tensor once: what its values are by row, and by pair the squared norm of ``B @ A.T``."""
    values = [Values()] * len(checkpoint.names)
    squared: dict[tuple[int, int], float] = {}
    grams: dict[int, _Doubles] = {}
    a_of = {b: a for a, b in pairs}
    for piece, block in _blocks(checkpoint.source, _pieces(checkpoint, pairs)):
        row = piece.row
        floats = _floats(block)
        found = kernels.survey(floats)
        values[row] = values[row].merged(found)
        if piece.rank:
            grams[row] = grams.get(row, 0.0) + _gram(floats.reshape(-1, piece.rank), found, kernels)
            end = int(checkpoint.table["offset"][row] + checkpoint.table["nbytes"][row])
            if row in a_of and piece.stop == end:
                squared[a_of[row], row] = _inner(grams.pop(a_of[row]), grams.pop(row))
        if progress is not None:
            progress(piece.stop - piece.start)
    return values, squared


def _pieces(checkpoint: Checkpoint, pairs: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
    """Cut every tensor into whole rows of at most `BLOCK` bytes, each lora_b right after its lora_a."""
    table = checkpoint.table
    paired = {row for pair in pairs for row in pair}
    alone = ((row,) for row in range(len(table)) if row not in paired)
    for rows in sorted([*pairs, *alone]):
        for row in rows:
            offset, nbytes, ne0 = (int(table[field][row]) for field in ("offset", "nbytes", "ne0"))
            rank = ne0 if row in paired and ne0 <= LARGEST_RANK else 0
            step = BLOCK // (4 * rank) * 4 * rank if rank else BLOCK
            for start in range(offset, offset + nbytes, step):
                yield _Piece(row, start, min(start + step, offset + nbytes), rank)


def _blocks(source: Source, pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, memoryview]]:
    """Yield each piece with its bytes, which are there until the next one is asked for."""
    if source.memory is not None:
        for piece in pieces:
            yield piece, source.memory[piece.start : piece.stop]
        return
    for piece, buffer, release in read_ahead(source, pieces):
        yield piece, buffer[: piece.stop - piece.start]
        release()


def _floats(block: memoryview) -> _Floats:
    floats = np.frombuffer(block, "<f4")
    if sys.byteorder == "big" or not floats.flags.aligned:
        floats = floats.astype(np.float32)
    floats.flags.writeable = False  # one signature for every kind of buffer
    return floats


def _gram(rows: _Floats, found: Values, kernels: Kernels) -> _Doubles:
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


def _inner(a: _Doubles, b: _Doubles) -> float:
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
