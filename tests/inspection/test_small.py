"""Small tensors that are gone through together, held against going through each by itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import Checkpoint
from ggcl_fast.inspection import small, values
from ggcl_fast.inspection.survey import Values
from ggcl_fast.readers.by_name import tensor_table
from ggcl_fast.storage.sources import SourceBuffer
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from ..readers.test_predict import shapes
from ..reference import DATA, FIXTURES

ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38]


def alone(checkpoint: Checkpoint) -> tuple[list[Values], list[float | None]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "LARGEST_SMALL", 0)
        return values.read_values(checkpoint, checkpoint.pairs, engine="python")


def hold(checkpoint: Checkpoint) -> None:
    found, squared = values.read_values(checkpoint, checkpoint.pairs, engine="python")
    expected, norms = alone(checkpoint)
    assert [one[:5] for one in found] == [one[:5] for one in expected]
    np.testing.assert_allclose([one.squares for one in found], [one.squares for one in expected], rtol=1e-12)
    assert [one is None for one in squared] == [one is None for one in norms]
    told = np.array([pair for pair in zip(squared, norms) if None not in pair], np.float64).reshape(-1, 2)
    np.testing.assert_allclose(told[:, 0], told[:, 1], rtol=1e-4)


@given(shape=shapes, odd=st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(ODD)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_together_is_alone(shape: Shape, odd: list[tuple[int, float]]) -> None:
    data = bytearray(checkpoint_bytes(shape))
    with ggcl_fast.open_checkpoint(bytes(data)) as sound:
        rows = sound.table.copy()
    for at, value in odd:
        row = rows[at % len(rows)]
        if row["nbytes"]:
            place = int(row["offset"]) + at % (int(row["nbytes"]) // 4) * 4
            data[place : place + 4] = np.float32(value).tobytes()
    with ggcl_fast.open_checkpoint(bytes(data)) as checkpoint:
        hold(checkpoint)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_real_files(fixture: str) -> None:
    with ggcl_fast.open_checkpoint(DATA / fixture) as checkpoint:
        hold(checkpoint)


@pytest.mark.parametrize("limit", [0, 64, 1000])
def test_any_limits(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one tensor, tensors too large for one, and ranks too high to be measured."""
    ranks = {name: 1 + 3 * i for i, name in enumerate(RANKS)}
    data = checkpoint_bytes(Shape(ranks=ranks, n_layer=3))
    with ggcl_fast.open_checkpoint(data) as checkpoint:
        whole = values.read_values(checkpoint, checkpoint.pairs)
        monkeypatch.setattr(values, "_STEP", max(limit, 400))
        hold(checkpoint)
        monkeypatch.setattr(values, "LARGEST_RANK", 10)
        _, squared = values.read_values(checkpoint, checkpoint.pairs)
        for pair, norm, before in zip(checkpoint.pairs, squared, whole[1]):
            assert norm == (pytest.approx(before, rel=1e-4) if pair.rank <= 10 else None)


def test_tensors_in_any_order_of_the_file() -> None:
    """Rows are in the order of ggcl, data where they are: apart, the other way round, at odd places."""
    rng = np.random.default_rng(5)
    for seed in range(30):
        n = int(rng.integers(1, 9))
        names = (*(f"w{i}.weight.lora_{end}" for i in range(n) for end in "ab"), "other")
        ne = np.array([(2, int(k)) for k in rng.integers(1, 9, 2 * n)] + [(3, 1)])
        offsets, at = np.zeros(len(ne), np.int64), int(rng.integers(0, 8))
        for row in rng.permutation(len(ne)) if seed % 2 else range(len(ne)):
            offsets[row] = at
            at += 4 * int(ne[row].prod()) + int(rng.choice([0, 2, 4, 32, 300]))
        data = rng.standard_normal(at, np.float32).tobytes()
        table = tensor_table(offsets, ne, 2)
        with ggcl_fast.open_checkpoint(DATA / "adam.ggcl") as real:
            facts = {name: getattr(real, name) for name in ("parameters", "ranks", "training", "optimizer")}
        with Checkpoint(SourceBuffer(data), **facts, names=names, table=table) as checkpoint:
            hold(checkpoint)
