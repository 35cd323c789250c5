"""Numbers, deltas and verdicts, held against plain numpy in float64."""

import json
import math
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import Checkpoint, CheckpointError, SourceChangedError, Summary, open_checkpoint, summarise
from ggcl_fast.commands import tables
from ggcl_fast.formats.decoded import Decoded
from ggcl_fast.inspection import values
from ggcl_fast.inspection.summary import Moments, PairSummary, TensorSummary
from ggcl_fast.inspection.values import _look
from ggcl_fast.inspection.verdict import judge
from ggcl_fast.readers.engine import Engine
from ggcl_fast.storage import copying, sources
from ggcl_fast.testing import RANKS, SHAPE_7B, Shape, checkpoint_bytes, write_checkpoint

from .. import reference
from ..adapters import Type, made, write_adapter
from ..engines import COMPILED_OR_NOT, warm
from ..hostile import ADAM, LBFGS, ODD, places, put, with_values
from ..mutations import BASES, mutate
from ..reference import DATA, FIXTURES
from .test_survey import plain_values

NAN, INF = math.nan, math.inf


# --- whole checkpoints ----------------------------------------------------------------------------------------------


def held_against_numpy(checkpoint: Checkpoint, summary: Summary) -> None:
    """Hold every number of `summary` against numpy in float64."""
    tensors = checkpoint.tensors
    assert [one.name for one in summary.tensors] == list(tensors)
    for one in summary.tensors:
        values = tensors[one.name]
        expected = plain_values(values.ravel())
        assert (one.n_nan, one.n_inf, one.n_zero) == expected[:3]
        assert (one.shape, one.nbytes) == (values.shape, values.nbytes)
        assert one.minimum == (expected.lowest if expected.lowest < INF else None)
        assert one.maximum == (expected.highest if expected.highest > -INF else None)
        assert one.norm == pytest.approx(math.sqrt(expected.squares), rel=1e-9)
    pairs = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert [pair.weight for pair in summary.pairs] == pairs
    scales = [abs(pair.scale) for pair in checkpoint.pairs]
    for pair, scale in zip(summary.pairs, scales):
        a, b = (tensors[f"{pair.weight}.lora_{end}"].astype(np.float64) for end in "ab")
        assert (pair.n_in, pair.rank) == a.shape
        assert (pair.n_out, pair.rank) == b.shape
        with np.errstate(all="ignore"):
            norm = scale * float(np.linalg.norm(b @ a.T))
            factors = scale * float(np.linalg.norm(a) * np.linalg.norm(b))
        # Squares are summed in float32, so that what cancels out of them costs digits.
        slack = 1e-6 * factors**2 if math.isfinite(factors) else 0
        square = norm**2 if math.isfinite(norm) else NAN
        assert pair.norm is not None
        assert pair.norm**2 == pytest.approx(square, rel=2e-5, abs=slack, nan_ok=True)
        assert pair.trained == (norm != 0)
        assert (pair.change is not None) == ("norm" in pair.module)
        if pair.change is not None:
            assert pair.change * math.sqrt(pair.n_in) == pytest.approx(pair.norm, nan_ok=True)
    assert summary.n_parameters == sum(tensors[f"{p}.lora_{end}"].size for p in pairs for end in "ab")


SHAPES = st.builds(
    Shape,
    n_layer=st.integers(0, 3),
    n_embd=st.integers(1, 40),
    n_vocab=st.integers(1, 60),
    n_mult=st.sampled_from([1, 8]),
    ranks=st.fixed_dictionaries({name: st.integers(1, 9) for name in RANKS}),
    optimizer=st.sampled_from(["adam", "lbfgs"]),
    past=st.integers(0, 2),
    lbfgs_m=st.integers(1, 3),
)


@given(SHAPES, st.sampled_from(COMPILED_OR_NOT), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_summaries_of_all_shapes_are_what_numpy_says(shape: Shape, engine: Engine, seed: int) -> None:
    with open_checkpoint(checkpoint_bytes(shape, seed=seed)) as checkpoint:
        summary = summarise(checkpoint, engine=engine)
        held_against_numpy(checkpoint, summary)
        assert summary.parameters == checkpoint.parameters
        assert summary.optimizer == checkpoint.optimizer
        assert summary.ranks == dict(checkpoint.ranks)


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
@pytest.mark.parametrize("data", [ODD, *((DATA / name).read_bytes() for name in FIXTURES)], ids=["odd", *FIXTURES])
def test_summaries_of_real_files_are_what_numpy_says(data: bytes, engine: Engine) -> None:
    with open_checkpoint(data) as checkpoint:
        held_against_numpy(checkpoint, summarise(checkpoint, engine=engine))


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_memory_need_not_be_aligned(shift: int) -> None:
    data = memoryview(b"x" * shift + ADAM)[shift:]
    with open_checkpoint(data) as odd, open_checkpoint(ADAM) as even:
        for engine in COMPILED_OR_NOT:
            assert summarise(odd, engine=engine) == summarise(even, engine=engine)


@pytest.mark.parametrize("value", [1e-25, 1e25], ids=["tiny", "huge"])
@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_deltas_beyond_the_range_of_float32_squares(value: float, engine: Engine) -> None:
    data = with_values(8, [value] * 128, with_values(9, [value] * 128))
    with open_checkpoint(data) as checkpoint:
        held_against_numpy(checkpoint, summarise(checkpoint, engine=engine))


def test_the_real_trained_file() -> None:
    with open_checkpoint(DATA / "trained.ggcl") as checkpoint:
        summary = summarise(checkpoint)
    assert (summary.verdict, summary.format, summary.model, summary.scale) == ("healthy", "ggcl", "unknown", 1.0)
    assert summary.reasons == ("every value is finite", "all 21 deltas are trained")
    assert summary.loss == pytest.approx(0.6566, abs=1e-4)
    assert summary.delta_norm == pytest.approx(27.84, abs=0.01)
    assert summary.norm_change == pytest.approx(1.456, abs=0.001)
    assert summary.moments is not None
    assert summary.moments.second_minimum == 0.0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 122 MB at rank 8."""
    path = tmp_path_factory.mktemp("large") / "in.ggcl"
    ranks = {name: 1 if "norm" in name else 8 for name in RANKS}
    with path.open("wb") as file:
        write_checkpoint(file, Shape(**{**vars(SHAPE_7B), "ranks": ranks}))
    yield path
    path.unlink()


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_memory_is_bounded_and_the_file_not_mapped(
    large: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two threads: each has room of its own."""
    monkeypatch.setattr(copying, "n_cpus", lambda: 2)
    warm()
    seen = 0

    def progress(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes

    with open_checkpoint(large) as checkpoint:
        checkpoint.source.map = None  # type: ignore[method-assign, assignment]
        tracemalloc.start()
        try:
            summary = summarise(checkpoint, engine=engine, progress=progress)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert seen == checkpoint.table["nbytes"].sum() > 100_000_000
    assert peak < 12 << 20
    assert summary.model == "LLaMA or Llama 2 7B"


def test_blocks_add_up_to_tensors(large: Path) -> None:
    with open_checkpoint(large) as checkpoint:
        summary = summarise(checkpoint, engine=COMPILED_OR_NOT[0])
        a, b = (checkpoint.tensors[f"output.weight.lora_{end}"].astype(np.float64) for end in "ab")
        second = checkpoint.tensors["optimizer.adam.second_moments"].astype(np.float64)
    (pair,) = (pair for pair in summary.pairs if pair.weight == "output.weight")
    assert pair.norm == pytest.approx(math.sqrt(((a.T @ a) * (b.T @ b)).sum()), rel=1e-5)
    assert summary.tensors[-1].norm == pytest.approx(np.linalg.norm(second), rel=1e-9)
    assert summary.tensors[-1].minimum == second.min()


def test_threads_find_what_one_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(checkpoint_bytes(Shape(n_layer=3, n_embd=2000, n_ff=6000)))
    monkeypatch.setattr(sources, "SMALL", -1)
    monkeypatch.setattr(values, "_STEP", 1 << 12)
    monkeypatch.setattr(copying, "n_cpus", lambda: 4)
    at_work = set()

    def look(*arguments: Any) -> Any:
        at_work.add(threading.get_ident())
        time.sleep(0.001)  # let the others begin
        return _look(*arguments)

    monkeypatch.setattr(values, "_look", look)
    with open_checkpoint(path) as checkpoint:
        alone = summarise(checkpoint, engine="python")
        assert at_work == {threading.get_ident()}
        monkeypatch.setattr(values, "_TASK", 1 << 13)
        assert summarise(checkpoint, engine="python") == alone
    assert len(at_work) == 5


def test_threads_do_not_decode_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tensors in another order than they are stored in are decoded whole, and shown in blocks."""
    weights = [f"blk.{layer}.ffn_up" for layer in range(6)]
    write_adapter(tmp_path / "in.gguf", [made(weight, 512, 32, 512, (Type.F16, Type.F16)) for weight in weights])
    monkeypatch.setattr(sources, "SMALL", -1)
    monkeypatch.setattr(values, "_STEP", 1 << 12)
    monkeypatch.setattr(values, "_TASK", 1)
    monkeypatch.setattr(copying, "n_cpus", lambda: 4)
    decoded = []

    def whole(self: Decoded, index: int) -> memoryview:
        time.sleep(0.0001)
        before = self._last.index
        if before != index:
            decoded.append(index)
        return _whole(self, index)

    _whole = Decoded._whole
    monkeypatch.setattr(Decoded, "_whole", whole)
    with open_checkpoint(tmp_path / "in.gguf") as checkpoint:
        held_against_numpy(checkpoint, summarise(checkpoint, engine="python"))
        decoded.clear()
        summarise(checkpoint, engine="python")
    assert sorted(decoded) == sorted(set(decoded)) != []


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(checkpoint_bytes(Shape(n_vocab=300_001)))
    with open_checkpoint(path) as checkpoint:
        with path.open("rb+") as file:
            file.truncate(5_000_000)
        with pytest.raises(SourceChangedError):
            summarise(checkpoint)


def test_a_file_that_is_written_to_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(ADAM)
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(ADAM + b"\0")
        with pytest.raises(SourceChangedError):
            summarise(checkpoint)


def test_a_closed_checkpoint_has_no_summary() -> None:
    checkpoint = open_checkpoint(DATA / "adam.ggcl")
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        summarise(checkpoint)


def test_absurd_ranks_cost_no_memory() -> None:
    ranks = {**dict.fromkeys(RANKS, 1), "wq": values.LARGEST_RANK + 1}
    data = checkpoint_bytes(Shape(n_layer=1, n_embd=2, n_vocab=3, n_mult=1, ranks=ranks))
    with open_checkpoint(data) as checkpoint:
        summary = summarise(checkpoint)
    by_module = {pair.module: pair for pair in summary.pairs}
    assert by_module["attn_q"].norm is None
    assert by_module["attn_q"].trained
    assert by_module["attn_k"].norm is not None
    assert summary.delta_norm is None


# --- verdicts -------------------------------------------------------------------------------------------------------


def tensor(**fields: Any) -> TensorSummary:
    return TensorSummary("t", (1,), 4, 0, 0, 0, 0.0, 0.0, 0.0)._replace(**fields)


def pair(**fields: Any) -> PairSummary:
    return PairSummary("w", None, "w", 1, 1, 2, 1.0, True, None)._replace(**fields)


def adam(**fields: Any) -> ggcl_fast.Adam:
    return ggcl_fast.Adam(0, 1, 10, False, 2.0, 2.1, 0)._replace(**fields)


LBFGS_STATE = ggcl_fast.Lbfgs(0, 1, 10, False, 6, NAN, 0.5, 1, 1, 1, 0)
GOOD = Moments(-1.0, 1.0, 0.0, 1.0)
VERDICTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "healthy": ("healthy", "every value is finite; all 1 deltas are trained", {}),
    "no optimizer": ("healthy", "every value is finite; all 1 deltas are trained", {"optimizer": None}),
    "some deltas are zero": (
        "healthy", "1 of 2 deltas are zero, never trained: idle",
        {"pairs": [pair(), pair(weight="idle", norm=0.0, trained=False)]},
    ),
    "all deltas are zero": (
        "untrained", "all 2 deltas are zero, as they are before a training's first step",
        {"pairs": [pair(norm=0.0, trained=False)] * 2},
    ),
    "NaN": (
        "diverged", "1 of 2 tensors have values that are not finite: bad (2 NaN, 1 infinite)",
        {"tensors": [tensor(), tensor(name="bad", n_nan=2, n_inf=1)]},
    ),
    "NaN in many": (
        "diverged", "5 of 5 tensors have values that are not finite: t (1 NaN, 0 infinite), t (1 NaN, 0 infinite), "
        "t (1 NaN, 0 infinite) and 2 more", {"tensors": [tensor(n_nan=1)] * 5},
    ),
    "NaN before all zeros": (
        "diverged", "not finite", {"tensors": [tensor(n_nan=1)], "pairs": [pair(norm=0.0, trained=False)]},
    ),
    "last loss": ("diverged", "the last loss is nan", {"optimizer": adam(previous_loss=NAN)}),
    "best loss": ("diverged", "the best loss is inf", {"optimizer": adam(best_loss=INF)}),
    "loss of L-BFGS": ("diverged", "the best loss is nan", {"optimizer": LBFGS_STATE}),
    "losses not yet there": (
        "healthy", "finite", {"optimizer": adam(best_loss=NAN, iteration=0, just_initialized=True)},
    ),
    "worse than guessing": (
        "diverged", "the last loss, 9, is worse than guessing among 100 tokens (4.605); the best was 2",
        {"optimizer": adam(previous_loss=9.0)},
    ),
    "worse than guessing from the start": (
        "healthy", "finite", {"optimizer": adam(previous_loss=9.0, best_loss=8.9)},
    ),
    "no vocabulary to guess among": ("healthy", "finite", {"optimizer": adam(previous_loss=9.0), "n_vocab": 0}),
    "second moments": (
        "diverged", "Adam's second moments go down to -0.5, and averages of squares cannot",
        {"moments": GOOD._replace(second_minimum=-0.5)},
    ),
    "no finite moments": ("healthy", "finite", {"moments": GOOD._replace(second_minimum=None)}),
    "norms": (
        "diverged", "norms changed by more than 10 times their size: n (12 times)",
        {"pairs": [pair(), pair(weight="n", change=12.0)]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_say_why(case: str) -> None:
    verdict, why, changes = VERDICTS[case]
    given = {"tensors": [tensor()], "pairs": [pair()], "optimizer": adam(), "moments": GOOD, "n_vocab": 100, **changes}
    found, reasons = judge(**given)
    assert found == verdict
    assert why in "; ".join(reasons)


def summary_of(data: bytes) -> Summary:
    with open_checkpoint(data) as checkpoint:
        return summarise(checkpoint)


def zeroed(data: bytes, *indices: int) -> bytes:
    for index in indices:
        record = places(data).records[index]
        data = data[: record.data] + bytes(record.nbytes) + data[record.data + record.nbytes :]
    return data


@pytest.mark.parametrize("data", [ADAM, LBFGS], ids=["adam", "lbfgs"])
def test_a_fresh_checkpoint_is_untrained(data: bytes) -> None:
    summary = summary_of(zeroed(data, *range(1, 42, 2)))  # every B
    assert summary.verdict == "untrained"
    assert summary.delta_norm == 0.0
    assert not any(pair.trained for pair in summary.pairs)


def test_a_pair_is_untrained_by_either_half() -> None:
    summary = summary_of(zeroed(ADAM, 8, 11))
    idle = {pair.weight for pair in summary.pairs if not pair.trained}
    assert idle == {"blk.0.attn_q.weight", "blk.0.attn_k.weight"}
    assert summary.verdict == "healthy"
    assert "2 of 21 deltas are zero" in summary.reasons[1]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_value_that_is_not_finite_is_found_anywhere(value: float) -> None:
    for index in (0, 9, 41, 42, 43):
        summary = summary_of(with_values(index, [value]))
        assert summary.verdict == "diverged"
        bad = summary.tensors[index]
        assert (bad.n_nan, bad.n_inf) == ((1, 0) if math.isnan(value) else (0, 1))
        assert bad.name in summary.reasons[0]
        assert bad.minimum is not None
        assert math.isfinite(bad.norm)
        assert (index > 41) == math.isfinite(summary.delta_norm or 0.0)


def test_losses_of_a_diverged_file() -> None:
    data = put(ADAM, len(ADAM) - 12, "<2f", 0.5, 99.0)
    assert "the last loss, 99, is worse than guessing among 270 tokens (5.598)" in summary_of(data).reasons[0]


def test_negative_second_moments_of_a_file() -> None:
    assert "second moments go down to -3" in summary_of(with_values(43, [-3.0])).reasons[0]


def test_reference_reads_the_same_number_of_tensors() -> None:
    assert len(summary_of(LBFGS).tensors) == len(reference.read(LBFGS)[1])


def test_whatever_opens_has_a_summary() -> None:
    rng = random.Random(7)
    n_opened = 0
    for _ in range(500):
        data = mutate(rng.choice(BASES), rng)
        try:
            checkpoint = open_checkpoint(data, engine="python")
        except CheckpointError:
            continue
        n_opened += 1
        with checkpoint:
            summary = summarise(checkpoint, engine="python")
            held_against_numpy(checkpoint, summary)
        assert json.dumps(tables.plain(summary), allow_nan=False).isprintable()
        assert all(reason.isprintable() for reason in summary.reasons)
    assert n_opened > 20


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
@pytest.mark.parametrize("n_embd", [1, 7, 63, 64, 65])
def test_ranks_beyond_the_length_of_a_weight_are_measured_too(n_embd: int, engine: Engine) -> None:
    data = checkpoint_bytes(Shape(n_layer=1, n_embd=n_embd, n_vocab=300, n_ff=9, ranks=dict.fromkeys(RANKS, 64)))
    with open_checkpoint(data) as checkpoint:
        held_against_numpy(checkpoint, summarise(checkpoint, engine=engine))


def test_wide_ranks_of_short_weights_cost_in_proportion() -> None:
    """A file of 2.7 and one of 27 MB: rank x rank work for each pair would be seconds."""
    seconds = []
    for n_layer in (12, 120):
        shape = Shape(n_layer=n_layer, n_embd=1, n_vocab=1, n_mult=1, n_ff=1, ranks=dict.fromkeys(RANKS, 1024))
        with open_checkpoint(checkpoint_bytes(shape)) as checkpoint:
            begin = time.thread_time()
            summarise(checkpoint, engine="python")
            seconds.append(time.thread_time() - begin)
    assert seconds[1] < 3
    assert seconds[1] < 30 * max(seconds[0], 0.01)
