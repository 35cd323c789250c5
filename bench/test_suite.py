"""Every comparison, timed by pytest-benchmark: `python -m bench` runs this and prints the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .comparisons import COMPARISONS, Comparison, Sizes
from .measure import measure


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name)
def test_comparison(comparison: Comparison, folder: Path, sizes: Sizes, benchmark: Any) -> None:
    benchmark.group = comparison.group
    measure(comparison, folder, sizes, benchmark)
