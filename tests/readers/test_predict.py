"""Records that are predicted and proved, held against the sweep."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast.readers import ggcl, predict, read
from ggcl_fast.readers.engine import walk
from ggcl_fast.storage.sources import Source, SourceBuffer
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from ..engines import needs_numba
from ..hostile import places, put
from ..reference import DATA, FIXTURES
from .test_sweep import Windows

shapes = st.builds(
    Shape, n_layer=st.integers(0, 4), n_embd=st.integers(1, 40), n_vocab=st.integers(1, 50), n_ff=st.integers(1, 70),
    ranks=st.fixed_dictionaries(dict.fromkeys(RANKS, st.integers(1, 9))), optimizer=st.sampled_from(["adam", "lbfgs"]),
    past=st.integers(0, 3), lbfgs_m=st.integers(1, 3),
)  # fmt: skip


def unaligned(data: bytes) -> SourceBuffer:
    return SourceBuffer(memoryview(b" " + data)[1:])


SOURCES = pytest.mark.parametrize("source", [SourceBuffer, Windows, unaligned])


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each sweep was asked for."""
    asked: list[int] = []

    def counting(source: Source, expected: np.ndarray, *rest: object, **named: object) -> object:
        asked.append(len(expected))
        return walk(source, expected, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ggcl, "walk", counting)
    return asked


@needs_numba
@given(shape=shapes)
@settings(max_examples=60, deadline=None)
def test_what_is_proved_is_what_the_sweep_finds(shape: Shape) -> None:
    data = checkpoint_bytes(shape)
    expected = read(SourceBuffer(data), "numba")
    for source in (SourceBuffer, Windows, unaligned):
        found = read(source(data), "python")
        np.testing.assert_array_equal(found.table, expected.table)
        assert (found.names, found.parameters, found.optimizer) == (
            expected.names, expected.parameters, expected.optimizer,
        )  # fmt: skip


SOUND = [*((DATA / name).read_bytes() for name in FIXTURES), checkpoint_bytes(Shape(n_layer=300))]


@SOURCES
@pytest.mark.parametrize("data", SOUND)
def test_a_sound_file_is_not_swept(data: bytes, source: Callable[[bytes], Source], swept: list[int]) -> None:
    read(source(data), "auto")
    assert swept == []


@needs_numba  # which always sweeps
@SOURCES
def test_any_word_of_a_head_or_name_that_differs_is_found(source: Callable[[bytes], Source]) -> None:
    """What is odd and can be read is read: the answer is the sweep's, word by word."""
    data = checkpoint_bytes(Shape(n_layer=1))
    for record in places(data).records[:24]:
        for at in range(record.start, record.data - record.data % 4, 4):
            changed = put(data, at, "<I", int.from_bytes(data[at : at + 4], "little") ^ 0x01010101)
            said = []
            for engine in ("numba", "python"):
                try:
                    opened = read(source(changed), engine)
                    said.append(f"{opened.warnings} {opened.table.tobytes()!r}")
                except ggcl_fast.CheckpointError as error:
                    said.append(str(error))
            assert said[0] == said[1]


def test_only_the_piece_that_deviates_is_swept(swept: list[int]) -> None:
    data = checkpoint_bytes(Shape(n_layer=300))
    index = 6 + 18 * 200
    record = places(data).records[index]
    renamed = put(data, record.name_at, "<I", 0x4559414C)
    assert read(SourceBuffer(renamed), "python").warnings
    assert swept == [18 * 128]


def test_shapes_that_take_turns_are_kept() -> None:
    files = [checkpoint_bytes(Shape(n_vocab=n)) for n in (10, 20, 30)]
    for data in files:
        read(SourceBuffer(data))
    before = predict.predict.cache_info().misses
    for data in files * 3:
        read(SourceBuffer(data))
    assert predict.predict.cache_info().misses == before


def test_a_length_that_no_file_could_have_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = checkpoint_bytes(Shape(n_layer=1))
    w1 = places(data).records[6 + 13]
    monkeypatch.setattr(predict, "predict", lambda *_, **__: pytest.fail("it was predicted"))
    for n_ff in (0, 1 << 20, (1 << 32) - 1):
        with pytest.raises(ggcl_fast.CheckpointError, match=r"feed_forward|ffn_gate"):
            read(SourceBuffer(put(data, w1.start + 16, "<I", n_ff)))


def test_the_next_file_of_a_shape_has_the_same_arrays() -> None:
    """Nobody can write to them, and what differs is not among them."""
    one, two = (read(SourceBuffer(checkpoint_bytes(Shape(past=2), seed=seed))) for seed in (1, 2))
    assert one.table is two.table
    assert one.names is two.names
    assert not one.table.flags.writeable
    other = read(SourceBuffer(checkpoint_bytes(Shape(past=3))))
    assert other.table is not one.table
