"""The pass over the records: both engines, windows, and the choice between them."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast.readers import engine, read, sweep
from ggcl_fast.storage.sources import WINDOW, SourceBuffer
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..engines import COMPILED_OR_NOT, needs_numba
from ..reference import DATA, FIXTURES


class Windows(SourceBuffer):
    """Memory that is shown through windows of `sources.WINDOW` bytes, as a file on disk is."""

    def window(self, offset: int) -> tuple[int, memoryview]:
        return offset, self.map()[offset : offset + WINDOW]


@pytest.mark.parametrize("fixture", FIXTURES)
def test_engines_and_windows_give_identical_tables(fixture: str) -> None:
    data = (DATA / fixture).read_bytes()
    tables = [read(source(data), name).table for source in (SourceBuffer, Windows) for name in COMPILED_OR_NOT]
    for table in tables[1:]:
        np.testing.assert_array_equal(table, tables[0])


def test_every_row_says_where_the_data_is() -> None:
    data = checkpoint_bytes(Shape(n_layer=3, past=2))
    checkpoint = read(SourceBuffer(data), COMPILED_OR_NOT[0])
    table = checkpoint.table
    assert (table["offset"] % 32 == 0).all()
    assert (table["record"] % 4 == 0).all()
    assert (table["nbytes"] == 4 * table["ne0"] * table["ne1"]).all()
    padded = -(-table["nbytes"] // 32) * 32
    np.testing.assert_array_equal(table["gguf_offset"], np.cumsum(padded) - padded)


@needs_numba
def test_compiled_and_plain_are_one_function() -> None:
    assert engine.compiled().py_func is sweep.sweep
    assert len(engine.compiled().signatures) == 1


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process look as if it had swept nothing."""
    monkeypatch.setattr(engine, "_interpreted", 0)
    monkeypatch.setattr(engine, "can_compile", lambda *_: True)
    monkeypatch.setattr(engine, "compiled", type("Never", (), {"cache_info": lambda: type("I", (), {"currsize": 0})}))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("imported", "price"), [(True, 100_000), (False, 130_000)])
def test_auto_changes_over_when_numba_would_have_paid(
    imported: bool, price: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if imported:
        monkeypatch.setitem(sys.modules, "numba", sys)
    else:
        monkeypatch.delitem(sys.modules, "numba", raising=False)
    n_files = 0
    while engine.pick_engine("auto", 582) == "python":
        n_files += 1
    assert n_files == price // 582 + 1
    assert engine.pick_engine("python", 582) == "python"
    assert engine.pick_engine("numba", 582) == "numba"


@needs_numba
def test_auto_uses_what_is_compiled_already() -> None:
    engine.compiled()
    assert engine.pick_engine("auto", 1) == "numba"


IMPORTS = """
import sys, ggcl_fast, ggcl_fast.commands.convert, ggcl_fast.commands.info
assert not {"numpy", "numba", "gguf"} & set(sys.modules)
ggcl_fast.CheckpointError, ggcl_fast.Checkpoint
assert not {"numba", "gguf"} & set(sys.modules)
ggcl_fast.convert(sys.argv[1], sys.argv[2], dry_run=True)
assert "gguf" in sys.modules and not {"numba", "tqdm"} & set(sys.modules)
"""


def test_one_small_file_is_converted_without_numba() -> None:
    """And a command has begun, and minds signals, before numpy is imported."""
    subprocess.run([sys.executable, "-c", IMPORTS, DATA / "adam.ggcl", "out.gguf"], check=True)


TABLE = """
import hashlib, sys, ggcl_fast
with ggcl_fast.open_checkpoint(sys.argv[1], engine="numba") as checkpoint:
    print(hashlib.sha256(checkpoint.table.tobytes()).hexdigest())
"""


@needs_numba
def test_processes_that_start_cold_at_once(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Sixteen at a time compile the pass: none crashes, all find the same, and no cache is left to be fought over."""
    with ggcl_fast.open_checkpoint(DATA / "lbfgs.ggcl", engine="python") as checkpoint:
        expected = hashlib.sha256(checkpoint.table.tobytes()).hexdigest() + "\n"
    for number in range(pytestconfig.getoption("rounds")):
        cache = tmp_path / str(number)
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TABLE, DATA / "lbfgs.ggcl"], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(16)
        ]  # fmt: skip
        ends = [(*process.communicate(), process.returncode) for process in processes]
        assert ends == [(expected, "", 0)] * 16
        assert not cache.exists()


READ_ONLY = """
import builtins, os, sys
def forbid(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(f"{args[0]} opened for writing")
    if event in ("os.mkdir", "os.rename", "tempfile.mkstemp"):
        raise PermissionError(f"{event} {args}")
sys.addaudithook(forbid)
"""


@needs_numba
def test_a_read_only_installation_works() -> None:
    """Nothing is opened for writing anywhere, so that it does not matter what can be."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", READ_ONLY + TABLE, DATA / "lbfgs.ggcl"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
