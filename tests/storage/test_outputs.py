"""Outputs of several files, and folders: all there or nothing, whatever fails; what is not ours is never removed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
import ggcl_fast.testing
from ggcl_fast.storage import sources
from ggcl_fast.storage.files import OutputFile, OutputFolder
from ggcl_fast.storage.outputs import Outputs

from ..models import BASE, Model, Type
from ..reference import DATA
from ..test_failures import _interrupted_at

TRAINED = DATA / "trained.ggcl"
OLD = b"precious"
FILES = {
    "adapter": {"out", "base-out.gguf"},
    "merged": {"out"},
    "peft": {"out", "out/README.md", "out/adapter_config.json", "out/adapter_model.safetensors"},
}
TARGETS = pytest.mark.parametrize("to", FILES)


def tree(folder: Path) -> set[str]:
    """All files and folders below `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(folder: Path, to: str, **options: Any) -> ggcl_fast.ConversionReport:
    return ggcl_fast.convert(TRAINED, folder / "out", to=to, base=BASE, engine="python", **options)


def make_old(folder: Path, to: str) -> None:
    """Put old outputs where the new ones go."""
    for name in FILES[to]:
        path = folder / name
        if name == "out" and to == "peft":
            path.mkdir(exist_ok=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(OLD)


@TARGETS
def test_all_files_appear_and_only_they(to: str, tmp_path: Path) -> None:
    report = convert(tmp_path, to)
    assert tree(tmp_path) == FILES[to]
    assert report.target_bytes == sum(map(len, contents(tmp_path).values()))
    assert (report.to, report.dry_run) == (to, False)
    again = tmp_path / "again"
    again.mkdir()
    assert convert(again, to, dry_run=True).target_bytes == report.target_bytes
    assert tree(again) == set()


@TARGETS
def test_existing_outputs_need_force(to: str, tmp_path: Path) -> None:
    convert(tmp_path, to)
    new = contents(tmp_path)
    for old in FILES[to]:
        if "/" in old:
            continue
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        make_old(tmp_path, to)
        for name in FILES[to] - {old}:
            if "/" not in name:
                (tmp_path / name).unlink()
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match="--force"):
            convert(tmp_path, to)
        assert contents(tmp_path) == before
        convert(tmp_path, to, force=True, fsync=True)
        assert contents(tmp_path) == new


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    make_old(tmp_path, "peft")
    (tmp_path / "out" / "thesis.tex").write_bytes(OLD)
    with pytest.raises(FileExistsError, match=r"other files, such as thesis\.tex"):
        convert(tmp_path, "peft", force=True)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_bytes(OLD)
    with pytest.raises(NotADirectoryError):
        convert(tmp_path, "peft", force=True)
    with pytest.raises(FileNotFoundError):
        ggcl_fast.convert(TRAINED, tmp_path / "none" / "out", to="peft")
    assert contents(tmp_path) == {"out": OLD}


@TARGETS
def test_an_interrupt_while_writing_leaves_nothing(to: str, tmp_path: Path) -> None:
    """At every call of progress, which comes from within the writing."""
    n_calls = 0

    def count(*_: int) -> None:
        nonlocal n_calls
        n_calls += 1

    convert(tmp_path, to, progress=count)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert n_calls > 1
    for last in range(1, n_calls + 1):
        left = last

        def stop(*_: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path, to, progress=stop)
        assert tree(tmp_path) == set()


def interruptible(folder: Path, kind: str) -> None:
    """Write two outputs, of little content, so that all moments can be tried."""
    if kind == "files":
        with Outputs([OutputFile(folder / name) for name in ("one", "two")]) as outputs:
            for output in outputs:
                with output.file("") as writer:
                    writer.writev([b"new"])
    else:
        with Outputs([OutputFolder(folder / "one", ("a", "b"), force=True)]) as (output,):
            for name in ("a", "b"):
                with output.file(name) as writer:
                    writer.writev([b"new"])


@pytest.mark.parametrize("kind", ["files", "folder"])
def test_an_interrupt_at_any_line_leaves_all_or_nothing(kind: str, tmp_path: Path) -> None:
    interruptible(tmp_path, kind)
    whole = contents(tmp_path)
    found, moment = set(), 0
    while True:
        moment += 1
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if not _interrupted_at(moment, lambda: interruptible(tmp_path, kind)):
            break
        assert contents(tmp_path) in ({}, whole), moment
        assert tree(tmp_path) in (set(), *[{*whole, *(["one"] if kind == "folder" else [])}]), moment
        found.add(len(contents(tmp_path)))
    assert moment > 50
    assert found == {0, 2}


def test_an_interrupt_at_any_line_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    found, moment = set(), 0
    while True:
        moment += 1
        shutil.rmtree(tmp_path)
        (tmp_path / "one").mkdir(parents=True)
        (tmp_path / "one" / "a").write_bytes(OLD)
        if not _interrupted_at(moment, lambda: interruptible(tmp_path, "folder")):
            break
        found.add(tuple(sorted(contents(tmp_path).items())))
        assert sorted(os.listdir(tmp_path)) == ["one"], moment
    assert found == {(("one/a", OLD),), (("one/a", b"new"), ("one/b", b"new"))}


@pytest.mark.parametrize("call", ["writev", "mkdir", "open", "fsync", "ftruncate"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@TARGETS
def test_a_failing_call_leaves_nothing(
    to: str, call: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggcl_fast.conversion._PREALLOCATED", 0)
    monkeypatch.setattr(sources, "SMALL", -1)
    real, n_calls = getattr(os, call), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    monkeypatch.setattr(os, call, failing)
    failed = False
    try:
        convert(tmp_path, to, fsync=True)
    except OSError as error:
        failed = error.errno == errno.EIO
    monkeypatch.undo()
    # The last thing that can fail is the folder's own fsync, when the outputs are in place.
    assert tree(tmp_path) == (FILES[to] if not failed else set()) or (call == "fsync" and tree(tmp_path) == FILES[to])
    assert failed == (n_calls >= nth)


def test_errors_name_the_target_and_no_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    for to, name in (("adapter", "base-out.gguf"), ("merged", "out"), ("peft", "out/adapter_model.safetensors")):
        with pytest.raises(OSError, match="No space left") as caught:
            convert(tmp_path, to)
        assert caught.value.filename == str(tmp_path / name)


def test_the_leftover_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.0.ggcl_fast-part"
    leftover.mkdir()
    (leftover / "adapter_config.json").write_bytes(OLD)
    convert(tmp_path, "peft")
    assert tree(tmp_path) == FILES["peft"]


def test_a_rival_that_lives_keeps_its_folder(tmp_path: Path) -> None:
    with Outputs([OutputFolder(tmp_path / "out", ("a",))]) as (rival,):
        with rival.file("a") as writer:
            writer.writev([b"rival's"])
        convert(tmp_path, "peft")
        shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path) == {"out/a": b"rival's"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@TARGETS
def test_signals_leave_no_temporary_file(to: str, number: int, tmp_path: Path) -> None:
    """With a base model of 60 MB, which takes its time; the signal comes when the first temporary name shows."""
    model = Model(n_layer=1, n_head=8, n_head_kv=8, head_dim=32, n_ff=256, n_vocab=60_000, kind=Type.F32)
    source, base, out = tmp_path / "in.ggcl", tmp_path / "base.gguf", tmp_path / "to"
    model.write(base)
    with source.open("wb") as file:
        ggcl_fast.testing.write_checkpoint(
            file, ggcl_fast.testing.Shape(n_layer=1, n_embd=256, n_vocab=60_000, n_ff=256, n_head=8, n_rot=32)
        )
    out.mkdir()
    command = [sys.executable, "-m", "ggcl_fast", "-q", "--to", to, "--base", str(base), str(source), str(out / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not os.listdir(out):
        pass
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode in (0, 128 + number), said
    # A signal that comes in the last moment finds all in place, which nothing undoes any more.
    assert tree(out) == FILES[to] or (process.returncode and tree(out) == set())


def test_a_folder_that_a_killed_process_had_set_aside_comes_back(tmp_path: Path) -> None:
    make_old(tmp_path, "peft")
    before = contents(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.0.ggcl_fast-part-old")
    shutil.copytree(tmp_path / ".out.0.ggcl_fast-part-old", tmp_path / ".out.0.ggcl_fast-part")
    with pytest.raises(FileExistsError, match="is back"):
        convert(tmp_path, "peft")
    assert contents(tmp_path) == before
    (tmp_path / ".out.0.ggcl_fast-part-old").mkdir()  # killed after the second rename
    convert(tmp_path, "peft", force=True)
    assert tree(tmp_path) == FILES["peft"]
    assert OLD not in contents(tmp_path).values()
