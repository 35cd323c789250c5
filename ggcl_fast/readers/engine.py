"""What runs the sweep: the interpreter or numba, whichever pays, over a source window by window.

`can_compile` is asked by everything in the package that has a compiled form: an explicit "numba" is taken at its word,
and every other engine goes on without it where numba is missing, broken or switched off.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..formats.layout import TENSOR
from .sweep import MORE, sweep

__all__ = ["ENGINES", "Engine", "Start", "can_compile", "check_engine", "compiled", "pick_engine", "walk"]

Engine = Literal["auto", "numba", "python"]
ENGINES: Final[tuple[Engine, ...]] = ("auto", "numba", "python")

_START_COLD: Final = 130_000  # records that the interpreter sweeps in the time that numba's import and start take
_START_IMPORTED: Final = 100_000  # the same where numba is imported already

_interpreted = 0  # records swept without numba in this process


def check_engine(engine: str) -> None:
    """Raise `ValueError` where `engine` is none of `ENGINES`."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")


def can_compile(build: Callable[[], object], engine: Engine) -> bool:
    """Tell whether `build`, a cached function, gives something compiled.

    Raises
    ------
    ModuleNotFoundError
        `engine` is "numba", and numba is missing or broken.
    """
    problem = _problem_with(build)
    if problem is not None and engine == "numba":
        raise ModuleNotFoundError(f"numba cannot be used here: {problem}; --engine python goes without", name="numba")
    return problem is None and not _is_switched_off()


@functools.cache
def _problem_with(build: Callable[[], object]) -> str | None:
    """Return what is wrong with numba, None where it works; found out once."""
    try:
        import numba  # noqa: F401

        if not _is_switched_off():
            build()
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    return None


def _is_switched_off() -> bool:
    """Tell whether NUMBA_DISABLE_JIT is set: nothing is compiled then, and numpy's integers, left to Python, wrap."""
    return bool(sys.modules["numba"].config.DISABLE_JIT)


class Start:
    """What numba's start costs, for passes whose next piece of work is known: the rule of `pick_engine`, looking ahead.

    Parameters
    ----------
    cold, imported
        Work that is done without numba in the time that its import and start take, and its start alone.
    """

    def __init__(self, *, cold: int, imported: int) -> None:
        self._prices = cold, imported
        self.done = 0
        """Work done without numba in this process."""

    def pays_for(self, work: int) -> bool:
        """Tell whether numba is to do the next `work`; if not, it is done without."""
        if self.done + work > self._prices["numba" in sys.modules]:
            return True
        self.done += work
        return False


def pick_engine(engine: Engine, n_records: int) -> Literal["numba", "python"]:
    """Tell what is to sweep the next `n_records` records: what `engine` says, or for "auto" what pays.

    "auto" stays with the interpreter until it has cost as much as numba's start would have, then changes over.  So
    one file never waits for numba, thousands of them soon run compiled, and the whole never costs more than twice
    what knowing the number of files beforehand would.  Where the pass is compiled already it is used.

    Measured on 2 cores of an AMD EPYC (Milan), Python 3.11, numba 0.68: the interpreter takes 6.7 us a record, the
    compiled pass 0.02 us; numba's import takes 0.22 s and the compilation 0.65 s.  That makes 130,000 records, about
    220 checkpoints of 7B models, or 100,000 where numba is imported already.

    Parameters
    ----------
    engine
        "numba" and "python" are taken at their word; "auto" is the rule above.
    n_records
        Records about to be swept.

    Raises
    ------
    ValueError
        `engine` is none of `ENGINES`.
    ModuleNotFoundError
        `engine` is "numba", and numba is missing or broken.
    """
    global _interpreted
    check_engine(engine)
    if engine == "python":
        return "python"
    if engine == "auto" and not compiled.cache_info().currsize:
        price = _START_IMPORTED if "numba" in sys.modules else _START_COLD
        if _interpreted <= price:
            _interpreted += n_records
            return "python"
    return "numba" if can_compile(compiled, engine) else "python"


@functools.cache
def compiled() -> Any:
    """Return `sweep` compiled by numba, without the GIL and for one signature.

    It is compiled anew in each process that wants it, which takes 0.4 s longer than numba's cache on disk would.
    That cache cannot be made safe: it writes an index, then the code that the index speaks of, so a process that is
    killed in between leaves a new index beside the code of an older version, which every later process then runs.
    """
    import numba

    types: Any = numba.types
    i8 = types.int64
    words = types.Array(types.uint32, 1, "C", readonly=True)
    table = numba.from_dtype(TENSOR)[::1]
    signature = types.UniTuple(i8, 5)(words, i8, i8, i8[:, ::1], words, table, i8, i8, i8, i8)
    return numba.njit(signature, nogil=True)(sweep)


class Windowed(Protocol):
    """What `walk` needs of a source of bytes."""

    @property
    def size(self) -> int:
        """Bytes in the whole source."""

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes around `offset`: where they start, a multiple of 4, and the bytes.

        They hold at least `sources.WINDOW` bytes from `offset` on, or all up to the end of the source.
        """


def walk(
    source: Windowed,
    expected: npt.NDArray[np.int64],
    names: npt.NDArray[np.uint32],
    table: npt.NDArray[np.void],
    *,
    position: int,
    gguf: int = 0,
    n_ff: int = 0,
    engine: Literal["numba", "python"],
) -> tuple[int, int, int, int]:
    """Sweep the records that are expected from byte `position` of `source` on, window by window.

    Both engines fill `table` with the same values.  Returns the index of the first bad record (``len(expected)`` where
    there is none), and position, gguf and n_ff as `sweep.sweep` does.
    """
    kernel, records, view = (compiled(), expected, _array) if engine == "numba" else (sweep, expected.tolist(), _words)
    expected_names = names if engine == "numba" else names.data
    status, index = MORE, 0
    while status == MORE:
        start, window = source.window(position)
        status, index, position, gguf, n_ff = kernel(
            view(window), start, source.size, records, expected_names, table, index, position, gguf, n_ff
        )
    return index, position, gguf, n_ff


def _array(window: memoryview) -> npt.NDArray[np.uint32]:
    words = np.frombuffer(window, "<u4", len(window) // 4)
    if sys.byteorder == "big":
        words = words.astype(np.uint32)
    words.flags.writeable = False  # one signature for every kind of buffer
    return words


def _words(window: memoryview) -> memoryview:
    # Indexing a memoryview gives Python integers, which the interpreter handles several times faster than numpy's.
    return _array(window).data
