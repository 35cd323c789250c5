"""Outputs appear whole or not at all."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggcl_fast.storage.files import OutputFile
from ggcl_fast.storage.outputs import Outputs


@contextlib.contextmanager
def output_file(path: Path, **options: bool) -> Iterator[OutputFile]:
    output = OutputFile(path, force=True, **options)
    with Outputs([output]):
        yield output


def write(path: Path, data: bytes = b"whole") -> None:
    with output_file(path) as output:
        output.writev([data])


def test_a_finished_block_puts_the_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with output_file(path, fsync=True) as output:
        output.preallocate(1 << 20)
        output.writev([b"ab", memoryview(b"cd")])
        output.writev([b"e"])
        assert not path.exists()
    assert path.read_bytes() == b"abcde"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failed_block_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(error), output_file(path) as output:
        output.writev([b"new"])
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_leftovers_are_replaced_and_live_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out"
    leftover = tmp_path / ".out.0.ggcl_fast-part"
    leftover.write_bytes(b"left by a killed process")
    with output_file(path) as first:
        assert os.listdir(tmp_path) == [leftover.name]
        first.writev([b"first"])
        with output_file(path) as second:
            assert sorted(os.listdir(tmp_path)) == [leftover.name, ".out.1.ggcl_fast-part"]
            second.writev([b"second"])
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["out"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".out.0.ggcl_fast-part").symlink_to(victim)
    write(tmp_path / "out")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "out").read_bytes() == b"whole"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "writev", lambda fd, pieces: real(fd, pieces[0][:2]))
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1]))
    with output_file(tmp_path / "out") as output:
        output.writev([b"abc", b"", memoryview(b"defg"), b"h"])
    assert (tmp_path / "out").read_bytes() == b"abcdefgh"
