"""The conversion as a whole: against the expected digests, and read back by gguf."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast.readers.engine import Engine
from ggcl_fast.targets import TARGETS
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from . import reference
from .engines import COMPILED_OR_NOT, ENGINES
from .models import BASE
from .reference import DATA, FIXTURES

EXPECTED = json.loads((DATA / "expected.json").read_text())["gguf_checkpoint"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fixture", FIXTURES)
def test_real_files_convert_to_the_expected_bytes(fixture: str, engine: Engine, tmp_path: Path) -> None:
    assert sha256(DATA / fixture) == EXPECTED[fixture]["source_sha256"]
    target = tmp_path / "out.gguf"
    report = ggcl_fast.convert(DATA / fixture, target, engine=engine)
    assert sha256(target) == EXPECTED[fixture]["gguf_sha256"]
    assert report.target_bytes == target.stat().st_size == EXPECTED[fixture]["gguf_bytes"]
    assert os.listdir(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fixture", FIXTURES)
def test_the_command_converts_real_files_to_the_expected_bytes(fixture: str, engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "ggcl_fast", str(DATA / fixture), str(target), "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sha256(target) == EXPECTED[fixture]["gguf_sha256"]
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_memory_converts_like_a_file(tmp_path: Path) -> None:
    with ggcl_fast.open_checkpoint((DATA / "lbfgs.ggcl").read_bytes()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "out.gguf")
    assert sha256(tmp_path / "out.gguf") == EXPECTED["lbfgs.ggcl"]["gguf_sha256"]


def check_read_back(data: bytes, path: Path) -> None:
    """Read `path` with gguf's own reader and compare every key, type and tensor with the reference reader's."""
    keys, tensors = reference.read(data)
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(keys)
    for name, value in keys.items():
        assert fields[name].contents() == value, name
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        ne, values = tensors[tensor.name]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tuple(tensor.shape.tolist()) == ne
        np.testing.assert_array_equal(tensor.data.ravel().view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_gguf_reads_back_what_the_file_says(fixture: str, tmp_path: Path) -> None:
    ggcl_fast.convert(DATA / fixture, tmp_path / "out.gguf")
    check_read_back((DATA / fixture).read_bytes(), tmp_path / "out.gguf")


VALUE_TYPES = {
    "FLOAT32": ("epsilon", "_loss", "_step"),
    "UINT64": ("parameter_count",),
    "BOOL": ("just_initialized",),
    "STRING": ("architecture", ".type"),
    "INT32": ("search_j", "search_k", "search_end"),
}


def test_value_types_are_those_of_the_format(tmp_path: Path) -> None:
    for fixture in ("adam.ggcl", "lbfgs.ggcl"):
        ggcl_fast.convert(DATA / fixture, tmp_path / fixture)
        for name, field in gguf.GGUFReader(tmp_path / fixture).fields.items():
            if name.startswith("GGUF."):
                continue
            expected = next((kind for kind, ends in VALUE_TYPES.items() if name.endswith(ends)), "UINT32")
            assert field.types[0].name == expected, name


shapes = st.builds(
    Shape,
    n_layer=st.integers(0, 40),
    n_embd=st.integers(1, 9),
    n_vocab=st.integers(1, 40),
    n_mult=st.integers(1, 40),
    n_ff=st.none() | st.integers(1, 30),
    ranks=st.fixed_dictionaries(dict.fromkeys(RANKS, st.integers(1, 5))),
    optimizer=st.sampled_from(["adam", "lbfgs"]),
    past=st.integers(0, 4),
    lbfgs_m=st.integers(1, 7),
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, engine=st.sampled_from(COMPILED_OR_NOT), seed=st.integers(0, 9))
def test_any_shape_converts(shape: Shape, engine: Engine, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if shape.n_layer == 0 and shape.n_ff is not None:
        shape = Shape(**{**vars(shape), "n_ff": None})  # nothing in such a file could tell
    data = checkpoint_bytes(shape, seed=seed)
    path = tmp_path_factory.mktemp("shape") / "out.gguf"
    with ggcl_fast.open_checkpoint(data, engine=engine) as checkpoint:
        report = ggcl_fast.convert(checkpoint, path)
    assert report.n_ff == shape.feed_forward_length
    check_read_back(data, path)
    path.unlink()


def test_large_files_stream_to_the_same_bytes(tmp_path: Path) -> None:
    """Above `sources.SMALL` another way of reading is taken; tensors here are both smaller and larger than a block."""
    shape = Shape(n_layer=3, n_embd=700, n_vocab=90_001, past=3)
    data = checkpoint_bytes(shape)
    source = tmp_path / "big.ggcl"
    source.write_bytes(data)
    for engine in COMPILED_OR_NOT:
        ggcl_fast.convert(source, tmp_path / f"{engine}.gguf", engine=engine)
    with ggcl_fast.open_checkpoint(data) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "memory.gguf")
    assert len({sha256(tmp_path / f"{name}.gguf") for name in (*COMPILED_OR_NOT, "memory")}) == 1
    check_read_back(data, tmp_path / "memory.gguf")


@pytest.mark.parametrize("n_ff", [96, None])
def test_ff_asserts_and_never_overrides(n_ff: int | None, tmp_path: Path) -> None:
    shape = Shape(n_ff=n_ff)
    source = tmp_path / "in.ggcl"
    source.write_bytes(checkpoint_bytes(shape))
    assert ggcl_fast.convert(source, tmp_path / "out.gguf", ff=shape.feed_forward_length).n_ff == (n_ff or 96)
    with pytest.raises(ggcl_fast.CheckpointError, match=r"n_ff: .*expected 11008, found 96"):
        ggcl_fast.convert(source, tmp_path / "no.gguf", ff=11008)
    assert not (tmp_path / "no.gguf").exists()


def test_ff_is_held_against_the_header_where_there_are_no_layers(tmp_path: Path) -> None:
    with ggcl_fast.open_checkpoint(checkpoint_bytes(Shape(n_layer=0))) as checkpoint:
        assert ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", ff=96).n_ff == 96
        with pytest.raises(ggcl_fast.CheckpointError, match="expected 97, found 96"):
            ggcl_fast.convert(checkpoint, tmp_path / "no.gguf", ff=97)


def test_a_dry_run_writes_nothing_and_tells_the_size(tmp_path: Path) -> None:
    report = ggcl_fast.convert(DATA / "adam.ggcl", tmp_path / "out.gguf", dry_run=True)
    assert report.dry_run
    assert report.target_bytes == EXPECTED["adam.ggcl"]["gguf_bytes"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("how", [{}, {"outtype": "f16"}, {"base": BASE}], ids=["plain", "f16", "base"])
@pytest.mark.parametrize("to", TARGETS)
def test_progress_adds_up_to_its_total(to: str, how: dict[str, Any], dry_run: bool, tmp_path: Path) -> None:
    class Told(list[int]):
        total = 0

        def begin(self, total: int) -> None:
            assert not self
            self.total = total

        def __call__(self, nbytes: int) -> None:
            self.append(nbytes)

    told, plain = Told(), list[int]()
    options: dict[str, Any] = {"to": to, "dry_run": dry_run, **how}
    try:
        report = ggcl_fast.convert(DATA / "trained.ggcl", tmp_path / "out", progress=told, **options)
    except ValueError:  # not an option of this target
        assert not told
        return
    assert told.total == sum(told) == report.target_bytes
    (tmp_path / "more").mkdir()
    ggcl_fast.convert(DATA / "trained.ggcl", tmp_path / "more" / "out", progress=plain.append, **options)
    assert plain == told


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_source_and_target_must_differ(link: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.ggcl", tmp_path / "b.ggcl"
    shutil.copy(DATA / "adam.ggcl", source)
    if link == "hard":
        os.link(source, target)
    elif link == "symbolic":
        target.symlink_to(source)
    else:
        target = source
    with pytest.raises(shutil.SameFileError):
        ggcl_fast.convert(source, target, force=True)
    assert sha256(source) == EXPECTED["adam.ggcl"]["source_sha256"]


@pytest.mark.parametrize("to", TARGETS)
def test_logs_are_silent_unless_asked_for(to: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And what gguf says of its writers is not ours to say."""
    base = BASE if to != "checkpoint" else None
    with caplog.at_level(logging.DEBUG):
        ggcl_fast.convert(DATA / "trained.ggcl", tmp_path / "out", to=to, base=base)
        gguf.GGUFWriter(None, "llama")  # somebody else's
    (ours,) = (record for record in caplog.records if record.name.startswith("ggcl_fast"))
    assert ours.levelno == logging.INFO
    assert f"trained.ggcl: {tmp_path / 'out'} made of it" in ours.getMessage()
    assert [record.name for record in caplog.records if record is not ours] == ["gguf.gguf_writer"]
