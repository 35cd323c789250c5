"""What runs the sweep where numba is missing, broken or switched off."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast.inspection import survey
from ggcl_fast.readers import engine
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from ..engines import needs_numba
from ..reference import DATA


class _Broken:
    """What a numba of another Python, numpy or LLVM is like."""

    def __getattr__(self, name: str) -> Any:
        raise SystemError(f"broken: {name}")


@pytest.fixture(params=["missing", "broken"])
def no_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With "auto" past the point where it changes over."""
    monkeypatch.setitem(sys.modules, "numba", None if request.param == "missing" else _Broken())
    engine._problem_with.cache_clear()
    engine.compiled.cache_clear()
    survey.compiled.cache_clear()
    monkeypatch.setattr(engine, "_interpreted", 10**9)
    monkeypatch.setattr(survey._start, "done", 10**12)
    yield
    engine._problem_with.cache_clear()


@pytest.mark.usefixtures("no_numba")
def test_auto_goes_on_without_numba(tmp_path: Path) -> None:
    ggcl_fast.convert(DATA / "adam.ggcl", tmp_path / "auto.gguf", check_finite=True)
    ggcl_fast.convert(DATA / "adam.ggcl", tmp_path / "python.gguf", engine="python")
    assert (tmp_path / "auto.gguf").read_bytes() == (tmp_path / "python.gguf").read_bytes()
    with ggcl_fast.open_checkpoint(DATA / "adam.ggcl") as checkpoint:
        assert ggcl_fast.summarise(checkpoint) == ggcl_fast.summarise(checkpoint, engine="python")


@pytest.mark.usefixtures("no_numba")
def test_numba_asked_for_and_not_there_is_told() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"numba cannot be used here: .*; --engine python goes"):
        ggcl_fast.open_checkpoint(DATA / "adam.ggcl", engine="numba")
    with (
        ggcl_fast.open_checkpoint(DATA / "adam.ggcl") as checkpoint,
        pytest.raises(ModuleNotFoundError, match="numba cannot be used here"),
    ):
        ggcl_fast.summarise(checkpoint, engine="numba")


WRAPS = """
import sys, ggcl_fast
try:
    ggcl_fast.open_checkpoint(sys.argv[1], engine=sys.argv[2])
except ggcl_fast.CheckpointError as error:
    print(error)
with ggcl_fast.open_checkpoint(sys.argv[3], engine=sys.argv[2]) as checkpoint:
    print(ggcl_fast.summarise(checkpoint, engine=sys.argv[2]).verdict)
"""


@needs_numba
@pytest.mark.parametrize("engine_", ["auto", "numba", "python"])
def test_numba_switched_off_does_not_make_arithmetic_wrap(engine_: str, tmp_path: Path) -> None:
    """A tensor of 4 GiB, which is 0 in 32 bits, in a file of some kilobytes: only its n_ff tells."""
    ranks = dict.fromkeys(RANKS, 4)
    data = bytearray(checkpoint_bytes(Shape(n_layer=1, n_embd=1, n_vocab=1, n_mult=1, n_ff=1, ranks=ranks)))
    with ggcl_fast.open_checkpoint(bytes(data)) as checkpoint:
        row = checkpoint.names.index("blk.0.ffn_gate.weight.lora_b")
        struct.pack_into("<2I", data, int(checkpoint.table["record"][row]) + 12, 4, 1 << 28)
    path = tmp_path / "in.ggcl"
    path.write_bytes(data)
    said = []
    for environment in ({}, {"NUMBA_DISABLE_JIT": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", WRAPS, path, engine_, DATA / "trained.ggcl"], check=True, capture_output=True,
            text=True, env={**os.environ, **environment},
        )  # fmt: skip
        said.append(done.stdout)
    assert said[0] == said[1]
    assert "blk.0.ffn_gate.weight.lora_b': data at offset" in said[0]
    assert "expected 4294967296 bytes" in said[0]
    assert said[0].endswith("healthy\n")
