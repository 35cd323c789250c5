"""Files that are not what they claim: a clear error, and nothing touched."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import CheckpointError, NotACheckpointError, TruncatedError, open_checkpoint
from ggcl_fast.formats import layout
from ggcl_fast.readers import engine, ggcl, sweep
from ggcl_fast.readers.engine import Engine
from ggcl_fast.storage import sources
from ggcl_fast.testing import Shape, checkpoint_bytes

from . import reference
from .engines import COMPILED_OR_NOT, warm
from .hostile import ADAM, HOSTILE, LBFGS, ODD, Hostile, places, put, with_header, with_name
from .mutations import BASES, GUARDED, ONES, examine, mutate, verdict, within_bounds

BAD = pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)


def corpus() -> Iterator[bytes]:
    """All hostile files, all sound ones, and mutations of them, always the same."""
    yield from (bad.data() for bad in HOSTILE.values())
    yield from BASES
    rng = random.Random(2023)
    for _ in range(3000):
        data = rng.choice(BASES)
        for _ in range(rng.randrange(1, 4)):
            data = mutate(data, rng)
        yield data


@BAD
@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_a_bad_file_is_told_by_kind_place_and_words(bad: Hostile, engine: Engine) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(GUARDED.holding(bad.data()), engine=engine)
    assert str(caught.value) == f"<buffer>: {bad.message}"
    assert type(caught.value) is bad.kind


@BAD
@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in windows"])
def test_a_bad_file_touches_neither_source_nor_target(
    bad: Hostile, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    source, target = tmp_path / "in.ggcl", tmp_path / "out.gguf"
    source.write_bytes(bad.data())
    target.write_bytes(b"precious")
    with pytest.raises(bad.kind) as caught:
        ggcl_fast.convert(source, target, force=True)
    assert str(caught.value) == f"{source}: {bad.message}"
    assert source.read_bytes() == bad.data()
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ggcl", "out.gguf"]


def test_a_real_file_cut_at_any_byte_is_an_error() -> None:
    view = memoryview(ADAM)
    for size in range(len(ADAM)):
        with pytest.raises(TruncatedError if size >= 4 else NotACheckpointError):
            open_checkpoint(view[:size], engine=COMPILED_OR_NOT[0])


# --- what is odd, and converted all the same ------------------------------------------------------------------------


def converted(data: bytes, path: Path, engine: Engine = "auto") -> tuple[bytes, ggcl_fast.ConversionReport]:
    with open_checkpoint(data, engine=engine) as checkpoint:
        report = ggcl_fast.convert(checkpoint, path, force=True)
    return path.read_bytes(), report


NAMES = {
    "nul": (b"layers.0\0attention", r"layers.0\x00attention"),
    "newline": (b"layers.0.\nwq", r"layers.0.\nwq"),
    "invalid utf-8": (b"layers.\xff\xfe.wq", r"layers.\xff\xfe.wq"),
    "escape codes": (b"\x1b[31mlayers\x1b[0m\x07", r"\x1b[31mlayers\x1b[0m\x07"),
    "nothing": (b"", ""),
}


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES)
def test_tensors_with_strange_names_are_taken_by_position(
    name: bytes, shown: str, engine: Engine, tmp_path: Path
) -> None:
    index = 8
    data = with_name(index, name)
    record = places(ADAM).records[index]
    found, report = converted(data, tmp_path / "out.gguf", engine)
    assert found == converted(ADAM, tmp_path / "sound.gguf")[0]
    assert report.warnings == (
        "1 of 42 tensors have unexpected names and were taken by their position; "
        f"the first is tensor 8, at offset {record.start} ({record.start:#x}): "
        f"expected 'layers.0.attention.wq.weight.loraA', found '{shown}'",
    )


@pytest.mark.parametrize("fixture", reference.FIXTURES)
def test_padding_may_hold_anything(fixture: str, tmp_path: Path) -> None:
    data = (reference.DATA / fixture).read_bytes()
    dirty = bytearray(data)
    for record in places(data).records:
        for at in range(record.name_at + len(record.name), record.data):
            dirty[at] = 0xEE
    assert dirty != data
    assert converted(bytes(dirty), tmp_path / "a")[0] == converted(data, tmp_path / "b")[0]


def test_nan_and_infinity_are_carried_over(tmp_path: Path) -> None:
    payload = put(ADAM, places(ADAM).records[0].data, "<2I", 0x7F800001, 0xFFC12345)  # NaNs of two kinds
    for data in (ODD, payload):
        found, _ = converted(data, tmp_path / "out.gguf")
        for record in places(data).records:
            assert data[record.data : record.data + record.nbytes] in found


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in blocks"])
def test_check_finite_reports_each_tensor_and_fails(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
        monkeypatch.setattr("ggcl_fast.inspection.values._STEP", 64)
    source, target = tmp_path / "in.ggcl", tmp_path / "out.gguf"
    source.write_bytes(ODD)
    for dry_run in (False, True):
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(source, target, check_finite=True, dry_run=dry_run)
        assert str(caught.value) == (
            f"{source}: data: 2 of 44 tensors have values that are NaN or infinite: "
            "output_norm.weight.lora_b (1), blk.1.ffn_up.weight.lora_a (3)"
        )
        assert caught.value.found == {"output_norm.weight.lora_b": 1, "blk.1.ffn_up.weight.lora_a": 3}
        assert not target.exists()
    source.write_bytes(ADAM)
    ggcl_fast.convert(source, target, check_finite=True)


@given(
    position=st.integers(0, 2**62), past=st.integers(0, 2**31 - 1), m=st.integers(1, 2**31 - 1),
    nx=st.integers(1, 2**63 - 1),
)  # fmt: skip
def test_no_file_can_fit_both_optimizers(position: int, past: int, m: int, nx: int) -> None:
    """Nothing can be built to fit both: L-BFGS state is longer for whatever numbers the file has."""

    def end(*vectors: int) -> int:
        at = position + 28
        for n in vectors:
            at = -(-(at + 12 + 4 * (n > 0)) // 32) * 32 + 4 * n
        return at

    adam, lbfgs = end(nx, nx, past) + 12, end(nx, nx, nx, nx, nx, past, m, m) + 24
    assert lbfgs > adam
    fixed = {"past": past, "lbfgs_m": m, "nx": nx}
    assert ggcl._end_of("adam", position, fixed) == adam
    assert ggcl._end_of("lbfgs", position, fixed) > lbfgs


# --- the promise as a whole -----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(base=st.sampled_from([*BASES, ADAM, LBFGS]), rng=st.randoms(use_true_random=False), times=st.integers(1, 6))
def test_any_mutation_is_converted_or_refused_alike_by_both_engines(
    base: bytes, rng: random.Random, times: int
) -> None:
    data = base
    for _ in range(times):
        data = mutate(data, rng)
    examine(data, traced=True)


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=400), words=st.lists(st.sampled_from([0, 1, 2, 3, 2**32 - 1]), max_size=21))
def test_any_bytes_behind_the_magic_are_refused(tail: bytes, words: list[int]) -> None:
    data = struct.pack(f"<2I{len(words)}I", 0x6767636C, 0, *words) + tail
    examine(data, traced=True)


def test_the_pass_with_bounds_checks_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    signature = engine.compiled().nopython_signatures[0]
    checked = numba.njit(signature, boundscheck=True)(sweep.sweep)
    words = np.zeros(100, np.uint32)
    words[:5] = 2, 4, 0, 2, 2
    plan = np.array([[2, 2, 2, 99, 4]], np.int64)  # a name that `names` does not have
    with pytest.raises(IndexError):  # the checks are on
        checked(words, 0, 400, plan, np.zeros(9, np.uint32), np.zeros(1, layout.TENSOR), 0, 0, 0, 0)
    expected = [verdict(data, "numba") for data in corpus()]
    monkeypatch.setattr(engine, "compiled", lambda: checked)
    assert [verdict(data, "numba") for data in corpus()] == expected


def test_the_pass_and_its_interpreted_twin_say_the_same() -> None:
    for data in corpus():
        examine(data)


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_claimed_layers_cost_nothing(engine: Engine) -> None:
    """A header may claim as many layers as the file's size allows: they are found out before they cost anything."""
    data = checkpoint_bytes(Shape(n_layer=0, n_embd=1, n_vocab=1, n_mult=1, ranks=ONES)) + bytes(10_000_000)
    claimed = put(data, 36, "<I", len(data) // 432 - 1)
    warm()
    with pytest.raises(CheckpointError, match=r"tensor 6 .*n_dims"), within_bounds(len(data) // 4, traced=True):
        open_checkpoint(claimed, engine=engine)


LARGE = 64 * 10**9
HEAD = struct.pack("<4sI2Q", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
SPARSE = {
    "layers": (with_header("n_layer", LARGE // 8000)[:92], r"tensor 0 .*: n_dims"),
    "a rank": (with_header("wq", 1 << 26)[:92], r"tensor 0 .*: n_dims"),
    "tensors": (struct.pack("<4sI2Q", b"GGUF", 3, 10**9, 0), r"tensor 0 .*: n_dims"),
    "keys": (struct.pack("<4sI2Q", b"GGUF", 3, 0, 10**9), r"n_kv at .* at most 16384"),
    "a string": (HEAD + struct.pack("<IQ", 8, LARGE - 60), r"training\.type: .* found none"),
    "an array": (HEAD + struct.pack("<2IQ", 9, 4, LARGE // 4 - 30), r"training\.type: .* found none"),
    "strings": (HEAD + struct.pack("<2IQ", 9, 8, LARGE // 8 - 30), r"k at .* at most 16777216 strings"),
    "records": (struct.pack("<4I", 0x67676C61, 1, 4, 4), r"record 0 n_dims at .* found 0"),
}


@pytest.mark.parametrize(("start", "message"), SPARSE.values(), ids=SPARSE)
def test_a_size_is_no_proof(start: bytes, message: str, tmp_path: Path) -> None:
    """A sparse file of some kilobytes has any size, and so has what a server claims."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(LARGE)
    with within_bounds(0, traced=True), pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, engine="python")


def test_real_layers_cost_in_proportion() -> None:
    data = checkpoint_bytes(Shape(n_layer=2000, n_embd=1, n_vocab=1, n_mult=1, n_ff=1, ranks=ONES))
    warm()
    with within_bounds(len(data), traced=True):
        open_checkpoint(data, engine=COMPILED_OR_NOT[0])
