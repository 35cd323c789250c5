"""Everything that is compiled, together: what all kernels have in common."""

from collections.abc import Callable
from typing import Any

import pytest

from ggcl_fast.formats import sums
from ggcl_fast.inspection import survey
from ggcl_fast.readers import engine

from .engines import needs_numba

pytestmark = needs_numba

KERNELS: dict[str, Callable[[], Any]] = {  # of partials, what is called first
    "sweep": engine.compiled,
    "survey": lambda: vars(survey)["compiled"]().survey.args[0],
    "gram": lambda: vars(survey)["compiled"]().gram.args[0],
    **{f"sum of {type.name}": lambda type=type: sums.jitted(type) for type in sums.LARGEST},  # type: ignore[misc]
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_lets_other_threads_run(kernel: Callable[[], Any]) -> None:
    assert kernel().targetoptions["nogil"] is True


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_has_one_signature(kernel: Callable[[], Any]) -> None:
    assert len(kernel().signatures) == 1
