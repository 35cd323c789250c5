"""One open checkpoint, several threads and processes."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast.storage import remote, sources
from ggcl_fast.storage.files import OutputFile, OutputFolder
from ggcl_fast.storage.outputs import Outputs
from ggcl_fast.testing import Shape, checkpoint_bytes


@pytest.fixture(scope="module")
def data() -> bytes:
    """A checkpoint of several blocks, every one of which is different."""
    return checkpoint_bytes(Shape(n_layer=2, n_embd=64, n_vocab=60_000))


@pytest.mark.parametrize("place", ["file", "object"])
def test_threads_share_a_checkpoint(place: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    monkeypatch.setattr(sources, "SMALL", -1)
    monkeypatch.setattr(remote, "SMALL", 0)
    (tmp_path / "in.ggcl").write_bytes(data)
    fsspec.filesystem("memory").pipe("/shared.ggcl", data)
    name = {"file": str(tmp_path / "in.ggcl"), "object": "memory://shared.ggcl"}[place]
    with ggcl_fast.open_checkpoint(data) as alone:
        ggcl_fast.convert(alone, tmp_path / "alone.gguf")
        expected = ggcl_fast.summarise(alone)

    def convert(checkpoint: ggcl_fast.Checkpoint, i: int, barrier: threading.Barrier) -> bool:
        barrier.wait()
        ggcl_fast.convert(checkpoint, tmp_path / f"{i}.gguf", force=True)
        return (tmp_path / f"{i}.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()

    def summarise(checkpoint: ggcl_fast.Checkpoint, _: int, barrier: threading.Barrier) -> bool:
        barrier.wait()
        return ggcl_fast.summarise(checkpoint)._replace(source="", nbytes=0) == expected._replace(source="", nbytes=0)

    for _ in range(5):
        barrier = threading.Barrier(3)
        with ggcl_fast.open_checkpoint(name) as checkpoint, ThreadPoolExecutor(3) as threads:
            work: list[Callable[..., bool]] = [convert, convert, summarise]
            assert all(threads.map(lambda i: work[i](checkpoint, i, barrier), range(3)))  # noqa: B023


def test_closing_while_another_thread_reads_is_an_error_or_nothing(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    (tmp_path / "in.ggcl").write_bytes(data)
    for moment in range(3):
        checkpoint = ggcl_fast.open_checkpoint(tmp_path / "in.ggcl")
        left = moment

        def close(*_: int) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                checkpoint.close()  # noqa: B023

        with pytest.raises(ggcl_fast.CheckpointError, match="the checkpoint is closed"):
            ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", progress=close)
        with pytest.raises(ggcl_fast.CheckpointError, match="the checkpoint is closed"):
            ggcl_fast.summarise(checkpoint)
        assert os.listdir(tmp_path) == ["in.ggcl"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_child_that_leaves_through_the_stack_removes_nothing(kind: str, tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out") if kind == "file" else OutputFolder(tmp_path / "out", ("a",))
    try:
        with Outputs([output]):
            with output.file("a") as writer:
                writer.writev([b"whole"])
            child = os.fork()
            if child == 0:
                raise SystemExit
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    except SystemExit:
        os._exit(7)
    path = tmp_path / "out" if kind == "file" else tmp_path / "out" / "a"
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["out"]


def test_a_checkpoint_is_read_in_a_fork(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    (tmp_path / "in.ggcl").write_bytes(data)
    with ggcl_fast.open_checkpoint(tmp_path / "in.ggcl") as checkpoint:
        child = os.fork()
        if child == 0:
            try:
                ggcl_fast.convert(checkpoint, tmp_path / "child.gguf")
            finally:
                os._exit(0)
        ggcl_fast.convert(checkpoint, tmp_path / "parent.gguf")
        os.waitpid(child, 0)
    assert (tmp_path / "child.gguf").read_bytes() == (tmp_path / "parent.gguf").read_bytes()
