"""The two kernels, compiled, interpreted and with numpy, held against plain numpy in float64."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ggcl_fast.inspection import survey
from ggcl_fast.inspection.survey import PLAIN, Kernels, Values
from ggcl_fast.storage import copying

from ..engines import needs_numba

NAN, INF = math.nan, math.inf
KERNELS = pytest.mark.parametrize(
    "kernels", [pytest.param(survey.compiled, id="numba", marks=needs_numba), pytest.param(lambda: PLAIN, id="python")]
)
FLOATS = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32))


def plain_values(values: npt.NDArray[np.float32]) -> Values:
    finite = values[np.isfinite(values)].astype(np.float64)
    return Values(
        int(np.isnan(values).sum()), int(np.isinf(values).sum()), int((values == 0).sum()),
        float(finite.min()) if finite.size else INF, float(finite.max()) if finite.size else -INF,
        float((finite**2).sum()),
    )  # fmt: skip


def locked(values: Any) -> npt.NDArray[np.float32]:
    array = np.ascontiguousarray(values, np.float32)
    array.flags.writeable = False
    return array


@KERNELS
@given(FLOATS)
@settings(deadline=None)
def test_survey_is_what_numpy_says(kernels: Any, values: npt.NDArray[np.float32]) -> None:
    found, expected = kernels().survey(locked(values)), plain_values(values)
    assert found[:5] == expected[:5]
    assert found.squares == pytest.approx(expected.squares, rel=1e-12)


@needs_numba
@given(FLOATS)
@settings(deadline=None)
def test_survey_interpreted_is_survey_compiled(values: npt.NDArray[np.float32]) -> None:
    values = locked(values)
    with np.errstate(all="ignore"):
        interpreted = survey._survey_with(survey.survey, values)
    compiled = survey.compiled().survey(values)
    assert interpreted[:5] == compiled[:5]
    assert float(interpreted.squares) == pytest.approx(compiled.squares, rel=1e-12)


@KERNELS
def test_survey_of_extremes(kernels: Any) -> None:
    look = kernels().survey
    largest, tiny = float(np.finfo(np.float32).max), 1e-45
    found = look(locked([largest, -largest, tiny, -tiny, -0.0, 0.0]))
    assert found[:5] == (0, 0, 2, -largest, largest)
    assert found.squares == pytest.approx(2 * largest**2)
    assert str(look(locked([-0.0])).lowest) == "0.0"
    quiet = np.array([0xFFC00000, 0x7F800001, 0xFF800000, 0x3F800000], np.uint32).view(np.float32)
    assert look(locked(quiet)) == (2, 1, 0, 1.0, 1.0, 1.0)
    assert look(locked([NAN, INF])) == Values(1, 1)


@KERNELS
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("n", [0, 1, 3, 511, 512, 513, 1100])
def test_gram_is_what_numpy_says(kernels: Any, rank: int, n: int) -> None:
    rows = np.random.default_rng(rank * n).standard_normal((n, rank)).astype(np.float32)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(kernels().gram(locked(rows)), wide.T @ wide, rtol=1e-5, atol=1e-6 * n)


@needs_numba
def test_gram_interpreted_is_gram_compiled() -> None:
    rows = locked(np.random.default_rng(1).standard_normal((520, 3)))
    np.testing.assert_allclose(survey._gram_with(survey.gram, rows), survey.compiled().gram(rows), rtol=1e-5)


@needs_numba
def test_small_files_do_not_wait_for_numba_and_large_ones_do_not_wait_for_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks = Kernels(lambda _: Values(), lambda _: np.zeros((1, 1)))

    class Cold:
        currsize = 0

        def __call__(self) -> Kernels:
            return marks

        def cache_info(self) -> "Cold":
            return self

    monkeypatch.setattr(survey, "compiled", Cold())
    monkeypatch.setattr(survey._start, "done", 0)
    assert survey.pick_engine("numba", 1) is marks
    assert survey.pick_engine("python", 1 << 40) is not marks
    assert survey.pick_engine("auto", 95_308) is not marks
    assert survey.pick_engine("auto", 5 << 30) is marks
    picked = [survey.pick_engine("auto", 100_000_000) is marks for _ in range(60)]
    assert picked == sorted(picked)
    assert picked[-1]
    with pytest.raises(ValueError, match="engine must be one of"):
        survey.pick_engine("rust", 1)  # type: ignore[arg-type]


def test_a_block_has_room() -> None:
    assert survey.LARGEST_BLOCK <= copying.BLOCK
