"""Adding deltas by threads and kernels: the same bits as with numpy, and the same errors."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.formats import sums
from ggcl_fast.storage.sources import SourceFile
from ggcl_fast.targets import adding

from ..engines import COMPILED_OR_NOT, needs_numba
from ..models import Model, Type

TYPES = pytest.mark.parametrize("type", [*sums.LARGEST, Type.Q5_1], ids=lambda type: type.name)


def merge(folder: Path, model: Model, factors: Any, engine: Any, **options: Any) -> bytes:
    with model.checkpoint(factors, 0.75) as checkpoint:
        base, out = folder / "base.gguf", folder / "out.gguf"
        ggcl_fast.convert(checkpoint, out, to="merged", base=base, engine=engine, force=True, **options)
    return out.read_bytes()


@needs_numba
@TYPES
@pytest.mark.parametrize("n_rows", [1, 5, 1000])
def test_kernels_and_numpy_give_the_same_file(
    type: Type, n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(kind=type, tied=True)
    model.write(tmp_path / "base.gguf")
    factors = model.factors()
    monkeypatch.setattr(adding, "_ROWS", n_rows * 4 * 64)
    monkeypatch.setattr(adding, "_add_plainly", lambda *_: pytest.fail("not with a kernel"))
    fast = merge(tmp_path, model, factors, "numba") if type in sums.LARGEST else None
    monkeypatch.undo()
    monkeypatch.setattr(adding, "_ROWS", n_rows * 4 * 64)
    plain = merge(tmp_path, model, factors, "python")
    assert fast is None or fast == plain


@needs_numba
@TYPES
@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e-42])
def test_odd_values_take_the_way_of_numpy(type: Type, odd: float, tmp_path: Path) -> None:
    model = Model(kind=type)
    model.write(tmp_path / "base.gguf")
    factors = model.factors()
    factors["blk.1.ffn_up.weight"][1][7] = odd
    factors["output.weight"][1][:] = 0
    assert merge(tmp_path, model, factors, "numba") == merge(tmp_path, model, factors, "python")


@needs_numba
@pytest.mark.parametrize("odd", [None, np.nan, -np.inf, 1e-7])
@pytest.mark.parametrize(("to", "outtype"), [("adapter", "f16"), ("adapter", "bf16"), ("peft", "f16")])
def test_adapters_are_rounded_by_kernels_as_by_numpy(
    to: str, outtype: str, odd: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    factors = model.factors()
    if odd is not None:
        factors["blk.1.ffn_up.weight"][1][7] = odd
    monkeypatch.setattr(adding, "_TOGETHER", 1 << 10)

    def made(engine: Any) -> bytes:
        with model.checkpoint(factors, 0.75) as checkpoint:
            out = tmp_path / engine
            ggcl_fast.convert(checkpoint, out, to=to, outtype=outtype, engine=engine)
        file: Path = out / "adapter_model.safetensors" if to == "peft" else out
        return file.read_bytes()

    plain = made("python")
    if odd is None:
        monkeypatch.setattr(adding, "quantized", lambda *_, **__: pytest.fail("not with a kernel"))
    assert made("numba") == plain


@needs_numba
@pytest.mark.parametrize("to", ["adapter", "peft"])
def test_values_without_room_in_f16_are_told_by_kernels_too(to: str, tmp_path: Path) -> None:
    model = Model()
    factors = model.factors()
    factors["blk.1.ffn_up.weight"][1][3] = 1e6
    with model.checkpoint(factors) as checkpoint, pytest.raises(CheckpointError, match="too large for F16"):
        ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, outtype="f16", engine="numba")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_an_overflow_is_told_and_leaves_nothing(engine: str, tmp_path: Path) -> None:
    model = Model(kind=Type.F16)
    model.write(tmp_path / "base.gguf")
    factors = model.factors()
    factors["blk.1.ffn_up.weight"][1][3] = 1e6
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight.*too large for F16"):
        merge(tmp_path, model, factors, engine)
    assert os.listdir(tmp_path) == ["base.gguf"]
    assert threading.active_count() == before


def test_an_interrupt_ends_all_threads(tmp_path: Path) -> None:
    model = Model(n_vocab=20_000)
    model.write(tmp_path / "base.gguf")
    before = threading.active_count()

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path, model, model.factors(), "python", progress=interrupt)
    assert os.listdir(tmp_path) == ["base.gguf"]
    assert threading.active_count() == before


def test_a_base_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(n_vocab=40_000)
    model.write(tmp_path / "base.gguf")
    read_into = SourceFile.read_into

    def broken(self: SourceFile, offset: int, buffer: memoryview) -> None:
        if offset > 2_000_000 and threading.current_thread().name.startswith("ggcl_fast-worker"):
            raise OSError(5, "Input/output error", self.name)
        read_into(self, offset, buffer)

    monkeypatch.setattr(SourceFile, "read_into", broken)
    with pytest.raises(OSError, match="Input/output error"):
        merge(tmp_path, model, model.factors(), "auto")
    assert os.listdir(tmp_path) == ["base.gguf"]


@needs_numba
def test_kernels_come_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "_compiled", set())
    monkeypatch.setattr(adding._start, "done", 0)
    monkeypatch.setitem(sys.modules, "numba", sys.modules.get("numba", sys))
    assert adding.pick_kernel(Type.F16, "auto", 1000) is None
    assert adding.pick_kernel(Type.F16, "python", 1 << 40) is None
    assert adding.pick_kernel(Type.Q5_1, "numba", 1 << 40) is None
    picked = [adding.pick_kernel(Type.F16, "auto", 20_000_000) is not None for _ in range(10)]
    assert picked == sorted(picked)
    assert picked[-1]
    assert adding.pick_kernel(Type.F16, "auto", 1) is sums.compiled(Type.F16)
    with pytest.raises(ValueError, match="engine must be one of"):
        adding.pick_kernel(Type.F16, "rust", 1)  # type: ignore[arg-type]


GENERIC = """
import sys
from pathlib import Path
from tests.models import Model, Type
from tests.targets.test_adding import merge
folder = Path(sys.argv[1])
model = Model(kind=Type[sys.argv[2]])
model.write(folder / "base.gguf")
sys.stdout.buffer.write(merge(folder, model, model.factors(), "numba"))
"""


@needs_numba
@pytest.mark.parametrize("name", ["F16", "Q8_0"])
def test_a_processor_that_cannot_convert_halves(name: str, tmp_path: Path) -> None:
    """Nothing in the kernels asks for more than the least that a processor has."""
    done = subprocess.run(
        [sys.executable, "-c", GENERIC, tmp_path, name], check=True, capture_output=True,
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    )  # fmt: skip
    model = Model(kind=gguf.GGMLQuantizationType[name])
    assert done.stdout == merge(tmp_path, model, model.factors(), "python")
