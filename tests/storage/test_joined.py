"""Several sources as one."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggcl_fast import CheckpointError, SourceChangedError
from ggcl_fast.storage import sources
from ggcl_fast.storage.joined import Joined
from ggcl_fast.storage.sources import WINDOW, Source, SourceBuffer, SourceFile, read_at

PARTS = (b"a" * 5000, b"", b"b" * 3, b"c" * 40, b"", b"d" * 9001)


class Far(SourceBuffer):
    """A source that notes what it is told, and what of it is read."""

    far = True

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.told: list[int] = []
        self.read: list[tuple[int, int]] = []

    def prefetch(self, offsets: Sequence[int]) -> None:
        self.told += offsets

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read.append((offset, len(buffer)))
        super().read_into(offset, buffer)


def files(folder: Path, parts: Sequence[bytes] = PARTS) -> tuple[list[Path], Joined]:
    paths = [folder / f"{i}" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        path.write_bytes(part)
    return paths, Joined([SourceFile(path) for path in paths])


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.binary(max_size=20), min_size=1, max_size=6), data=st.data())
def test_any_range_is_that_of_the_concatenation(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    source = Joined([SourceBuffer(part) for part in parts])
    assert source.size == source.file_size == len(whole)
    assert source.starts == [0, *accumulate(map(len, parts))][:-1]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    buffer = bytearray(b"\xee" * (stop - start + 2))
    source.read_into(start, memoryview(buffer)[1:-1])
    assert buffer == b"\xee" + whole[start:stop] + b"\xee"
    assert read_at(source, start, 1000) == whole[start:]
    at, window = source.window(start)
    assert (at, bytes(window)) == (start, whole[start:])
    assert source.map() == whole


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in windows"])
def test_files_are_read_across_all_borders(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    whole = b"".join(PARTS)
    source: Source = files(tmp_path)[1]
    borders = [0, *accumulate(map(len, PARTS))]
    places = sorted({min(max(0, border + i), len(whole)) for border in borders for i in (-2, -1, 0, 1, 2)})
    for start in places:
        for stop in places:
            assert read_at(source, start, stop - start) == whole[start:stop]
        at, window = source.window(start)
        assert (at, bytes(window)) == (start, whole[start : start + WINDOW])
    assert source.map() == whole
    assert source.map().readonly
    assert source.memory is None
    source.close()


def test_only_the_sources_of_a_range_are_read() -> None:
    ones = [Far(part) for part in PARTS]
    source = Joined(ones)
    read_at(source, 4990, 20)
    assert [one.read for one in ones] == [[(4990, 10)], [], [(0, 3)], [(0, 7)], [], []]
    read_at(source, 5003, 40)
    assert [one.read for one in ones[3:]] == [[(0, 7), (0, 40)], [], []]


def test_each_is_told_of_its_own_offsets() -> None:
    ones = [Far(part) for part in PARTS]
    source = Joined(ones)
    source.prefetch([0, 4999, 5000, 5002, 5043, 14_043])
    assert [one.told for one in ones] == [[0, 4999], [], [0, 2], [], [], [0, 9000]]
    source.prefetch([])
    assert sum(len(one.told) for one in ones) == 6


def test_it_is_far_where_one_is() -> None:
    assert Joined([SourceBuffer(b"a"), Far(b"b")]).far
    assert not Joined([SourceBuffer(b"a"), SourceBuffer(b"b")]).far


def test_it_has_the_name_of_the_first_and_the_identity_of_all(tmp_path: Path) -> None:
    paths, source = files(tmp_path, (b"a", b"b", b"c"))
    assert source.name == str(paths[0])
    identities = []
    for path in paths:
        one = SourceFile(path)
        identities.append(one.identity)
        one.close()
    assert source.identity == identities[0] | identities[1] | identities[2]
    assert len(source.identity) == 3
    source.close()
    assert Joined([SourceBuffer(b"a"), SourceBuffer(b"b")]).identity == frozenset()


@pytest.mark.parametrize("index", range(len(PARTS)))
def test_a_change_of_any_is_noticed(index: int, tmp_path: Path) -> None:
    paths, source = files(tmp_path)
    source.check_unchanged()
    with paths[index].open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceChangedError, match=rf"/{index}: the file changed while it was read"):
        source.check_unchanged()
    source.close()


@pytest.mark.parametrize("index", [0, 2, 5])
def test_one_that_was_shortened_is_named(index: int, tmp_path: Path) -> None:
    paths, source = files(tmp_path)
    os.truncate(paths[index], 1)
    with pytest.raises(SourceChangedError, match=rf"/{index}: the file changed .* now ends at 1$"):
        source.map()
    source.close()


def test_all_are_closed_with_it(tmp_path: Path) -> None:
    n = len(os.listdir("/proc/self/fd"))
    _, source = files(tmp_path)
    whole = source.map()
    assert len(os.listdir("/proc/self/fd")) == n + len(PARTS)
    assert not source.closed
    source.close()
    assert source.closed
    assert all(one.closed for one in source._sources)
    assert len(os.listdir("/proc/self/fd")) == n
    assert whole == b"".join(PARTS)
    for use in (source.map, source.check_unchanged, lambda: read_at(source, 5001, 1), lambda: source.window(0)):
        with pytest.raises(CheckpointError, match="the checkpoint is closed"):
            use()
    source.close()
