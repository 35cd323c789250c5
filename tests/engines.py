"""What runs the passes over a file, as far as this installation has it: without numba, what needs it is skipped."""

import importlib.util
from typing import Final

import pytest

from ggcl_fast.readers import engine

__all__ = ["COMPILED_OR_NOT", "ENGINES", "HAS_NUMBA", "needs_numba", "warm"]

HAS_NUMBA: Final = importlib.util.find_spec("numba") is not None
ENGINES: Final[tuple[engine.Engine, ...]] = engine.ENGINES if HAS_NUMBA else ("auto", "python")
COMPILED_OR_NOT: Final[tuple[engine.Engine, ...]] = ("numba", "python") if HAS_NUMBA else ("python",)
needs_numba: Final = pytest.mark.skipif(not HAS_NUMBA, reason="needs numba")


def warm() -> None:
    """Compile what a file needs: once in a process, and not a matter of the file."""
    if HAS_NUMBA:
        engine.compiled()
