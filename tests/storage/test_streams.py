"""Pipes and devices, as sources and as outputs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast.commands.convert import main
from ggcl_fast.storage import streams

from ..reference import DATA

TRAINED = DATA / "trained.ggcl"
COMMAND = [sys.executable, "-m", "ggcl_fast"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("expected") / "out.gguf"
    ggcl_fast.convert(TRAINED, out)
    return out.read_bytes()


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
@pytest.mark.parametrize("target", ["-", "/dev/stdout"])
def test_a_pipe_between_two_programs(source: str, target: str, expected: bytes) -> None:
    """What is said goes to standard error."""
    with TRAINED.open("rb") as file:
        done = subprocess.run(["cat"], stdin=file, capture_output=True, check=True)
    done = subprocess.run([*COMMAND, source, target], input=done.stdout, capture_output=True, check=True)
    assert done.stdout == expected
    assert b"/dev/stdout: written, 44 tensors" in done.stderr


def test_a_redirected_file_is_a_source_like_any_other(expected: bytes, tmp_path: Path) -> None:
    with TRAINED.open("rb") as file:
        subprocess.run([*COMMAND, "-", tmp_path / "out.gguf"], stdin=file, capture_output=True, check=True)
    assert (tmp_path / "out.gguf").read_bytes() == expected


def test_a_slow_writer_is_waited_for(expected: bytes, tmp_path: Path) -> None:
    pipe, data = tmp_path / "pipe", TRAINED.read_bytes()
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for first in range(0, len(data), 50_000):
                threading.Event().wait(0.05)
                file.write(data[first : first + 50_000])

    writer = threading.Thread(target=write)
    writer.start()
    report = ggcl_fast.convert(pipe, tmp_path / "out.gguf")
    writer.join()
    assert report.source_bytes == len(data)
    assert (tmp_path / "out.gguf").read_bytes() == expected


def test_more_than_is_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streams, "LONGEST", 100_000)
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: os.write(write, bytes(60_000)) and os.write(write, bytes(60_000)))
    writer.start()
    with pytest.raises(OSError, match=f"/dev/fd/{read}.*|more than 100,000 bytes"):
        ggcl_fast.convert(f"/dev/fd/{read}", tmp_path / "out.gguf")
    writer.join()
    for fd in (read, write):
        os.close(fd)
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be_streams(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(DATA / "base.gguf")
    for arguments, message in (
        (["--to", "peft", str(TRAINED), "-"], "no room for a folder"),
        (["--to", "adapter", "--base", base, str(TRAINED), "-"], "--base-out"),
        ([str(TRAINED), str(TRAINED), "-"], "Not a folder"),
    ):
        assert main(arguments) == 1
        out, err = capfd.readouterr()
        assert (out, message in err) == ("", True)
    with pytest.raises(SystemExit):
        main(["--json", str(TRAINED), "-"])
    assert (
        main(["--to", "adapter", "--base", base, "--base-out", str(tmp_path / "b.gguf"), str(TRAINED), "/dev/null"])
        == 0
    )
    assert os.listdir(tmp_path) == ["b.gguf"]


def test_a_device_without_room_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(TRAINED), "/dev/full"]) == 1
    assert "/dev/full: No space left on device" in capfd.readouterr().err


def test_a_folder_with_a_slash_is_made(expected: bytes, tmp_path: Path) -> None:
    assert main(["-q", str(TRAINED), f"{tmp_path}/new/folder/"]) == 0
    assert (tmp_path / "new" / "folder" / "trained.gguf").read_bytes() == expected
    assert main(["-q", str(TRAINED), str(DATA / "adam.ggcl"), str(tmp_path / "more")]) == 0
    assert sorted(os.listdir(tmp_path / "more")) == ["adam.gguf", "trained.gguf"]
