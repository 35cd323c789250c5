"""An output takes a place only of nothing, or of what it was told to replace."""

import errno
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggcl_fast.storage import parts, system
from ggcl_fast.storage.files import OutputFile, OutputFolder
from ggcl_fast.storage.outputs import Output, Outputs

OLD, NEW = b"precious", b"new"


def _make_file(path: Path) -> None:
    path.write_bytes(OLD)


def _make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_bytes(OLD)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def output(path: Path, kind: str, **options: bool) -> Output:
    return OutputFile(path, **options) if kind == "file" else OutputFolder(path, ("a", "b"), **options)


def write(*outputs: Output, before: Callable[[], object] = lambda: None) -> None:
    with Outputs(outputs):
        for one in outputs:
            with one.file("a") as writer:
                writer.writev([NEW])
        before()


@pytest.fixture(params=["in one step", "in two steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what Linux has, and as on systems that have nothing of it."""
    if request.param == "in two steps":
        monkeypatch.setattr(system, "_function", lambda _: None)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("make", [_make_file, _make_folder])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_is_not_replaced(kind: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="--force"):
        write(output(path, kind), before=lambda: make(path))
    assert set(contents(tmp_path).values()) == {OLD}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("steps")
def test_a_folder_that_got_another_file_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_bytes(OLD)
    with pytest.raises(FileExistsError, match=r"other files, such as thesis\.tex"):
        write(
            output(path, "folder", force=True), before=lambda: (path / "thesis.tex").write_bytes(OLD)
        )  # fmt: skip
    assert contents(tmp_path) == {"out/a": OLD, "out/thesis.tex": OLD}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_got_another_file_at_the_last_moment_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the exchange, where no look helps but the one afterwards."""
    path, exchange = tmp_path / "out", system.exchange
    path.mkdir()

    def late(one: str, other: str) -> bool:
        if not (path / "thesis.tex").exists():
            (path / "thesis.tex").write_bytes(OLD)
        return exchange(one, other)

    monkeypatch.setattr(system, "exchange", late)
    with pytest.raises(FileExistsError, match="other files"):
        write(output(path, "folder", force=True))
    assert contents(tmp_path) == {"out/thesis.tex": OLD}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("there", [(), ("one",), ("two",), ("one", "two")])
@pytest.mark.parametrize("failing", ["take", "sync"])
def test_several_outputs_appear_or_none(
    failing: str, there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        (tmp_path / name).write_bytes(OLD)
    outputs = [output(tmp_path / name, "file", force=True) for name in ("one", "two")]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(outputs[1], failing, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(*outputs)
    assert contents(tmp_path) == dict.fromkeys(there, OLD)
    monkeypatch.undo()
    write(*(output(tmp_path / name, "file", force=True) for name in ("one", "two")))
    assert contents(tmp_path) == {"one": NEW, "two": NEW}


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_who_removes_something_has_its_lock(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of what is replaced is a rival's, who gives it up only when all is in place."""
    path = tmp_path / "out"
    path.write_bytes(OLD) if kind == "file" else path.mkdir()
    rival = os.open(path, os.O_RDONLY)
    assert system.lock(rival)
    outputs = [output(path, kind, force=True), output(tmp_path / "other", "file")]
    cls, removed = type(outputs[0]), 0

    def remove(self: Any, name: str, remove: Callable[[Any, str], None] = cls._remove) -> None:  # type: ignore[attr-defined]
        nonlocal removed
        fd = os.open(name, os.O_RDONLY)
        assert system.lock(fd) is False
        os.close(fd)
        removed += 1
        remove(self, name)

    monkeypatch.setattr(cls, "_remove", remove)
    monkeypatch.setattr(outputs[1], "sync", lambda: os.close(rival))
    write(*outputs)
    assert removed == 1
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_leftover_that_came_in_between_is_not_taken_for_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making it and opening it, which no system does in one step."""
    mkdir = os.mkdir

    def late(path: str, *rest: int) -> None:
        monkeypatch.undo()
        mkdir(path, *rest)
        (Path(path) / "a").write_bytes(OLD)

    monkeypatch.setattr(os, "mkdir", late)
    write(output(tmp_path / "out", "folder"))
    assert contents(tmp_path) == {"out/a": NEW}


@pytest.mark.parametrize("name", ["out", ".out.0.ggcl_fast-part"])
def test_a_folder_may_go_while_it_is_looked_at(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, listdir = tmp_path / name, os.listdir
    there.mkdir()

    def late(path: str) -> list[str]:
        monkeypatch.undo()
        there.rmdir()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", late)
    write(output(tmp_path / "out", "folder", force=True))
    assert contents(tmp_path) == {"out/a": NEW}


@pytest.mark.usefixtures("steps")
def test_nothing_is_reserved_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_function", lambda _: None)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("it writes where it cannot reserve"))
    one = OutputFile(tmp_path / "out")
    with Outputs([one]):
        one.preallocate(1 << 30)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
        one.writev([NEW])
    assert contents(tmp_path) == {"out": NEW}


def test_names_are_cut_between_characters(tmp_path: Path) -> None:
    name = "\u4e2d" * 84  # 252 bytes
    write(output(tmp_path / name, "file"))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("was_there", [True, False])
def test_nobody_replaces_what_may_have_to_be_taken_back(
    was_there: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival comes when the first of two outputs is in place, and the second fails: the rival's stays."""
    path, newer = tmp_path / "out", b"newer"
    if was_there:
        write(output(path, kind))
    rival, outputs = output(path, kind, force=True), [output(path, kind, force=True), output(tmp_path / "two", "file")]
    began, seen = threading.Event(), list[dict[str, bytes]]()

    def replace() -> None:
        with Outputs([rival]), rival.file("a") as writer:
            writer.writev([newer])
            began.set()

    thread = threading.Thread(target=replace)

    def fail(**_: bool) -> None:
        thread.start()
        began.wait()
        thread.join(0.1)
        seen.append({name: data for name, data in contents(tmp_path).items() if "-part" not in name})
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(outputs[1], "take", fail)
    name = "out" if kind == "file" else "out/a"
    with pytest.raises(OSError, match="Input/output error"):
        write(*outputs)
    thread.join()
    assert seen == [{name: NEW}]
    assert contents(tmp_path) == {name: newer}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_that_somebody_keeps_is_waited_for_and_not_minded(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(output(path, kind))
    foreign = os.open(path, os.O_RDONLY)
    assert system.lock(foreign)
    write(output(path, kind, force=True, fsync=True))
    os.close(foreign)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["lstat", "open"])
def test_a_file_may_go_before_it_is_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, one = tmp_path / "out", output(tmp_path / "out", "file", force=True)
    real = getattr(os, name)

    def late(which: Any, *rest: Any, **options: Any) -> Any:
        if str(which) == str(path):
            monkeypatch.undo()
            path.unlink()
        return real(which, *rest, **options)

    def before() -> None:
        path.write_bytes(OLD)
        monkeypatch.setattr(os, name, late)

    write(one, before=before)
    assert contents(tmp_path) == {"out": NEW}


def test_without_links_and_exchanges_a_file_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(system, "_function", lambda _: None)
    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        write(*(output(tmp_path / name, "file", force=True) for name in ("one", "two")))
    assert contents(tmp_path) == {"one": NEW, "two": NEW}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_fork_of_a_writer_takes_and_undoes_nothing(kind: str, tmp_path: Path) -> None:
    path, one = tmp_path / "out", output(tmp_path / "out", kind)
    with Outputs([one]), one.file("a") as writer:
        writer.preallocate(100)
        writer.writev([NEW[:1]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that other tests have left
            child = os.fork()
        if child == 0:
            try:
                one.finish()
            except OSError:
                one.give_back()
                one.discard()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        writer.writev([NEW[1:]])
    assert set(contents(tmp_path).values()) == {NEW}
    assert path.exists()


def test_long_names_that_begin_alike_have_places_of_their_own(tmp_path: Path) -> None:
    names = ["x" * 220 + end for end in "ab"]
    one, other = (output(tmp_path / name, "file") for name in names)
    with Outputs([one]), Outputs([other]):
        parts = [name.partition(".ggcl_fast")[0] for name in os.listdir(tmp_path)]
        assert [name.endswith(".0") for name in parts] == [True, True]
        one.file("").__enter__().writev([OLD])
        other.file("").__enter__().writev([NEW])
    assert contents(tmp_path) == dict(zip(names, [OLD, NEW]))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_set_aside_comes_back_only_to_a_free_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival is there between the look and the rename: his stays."""
    path, aside, rename = tmp_path / "out", tmp_path / ".out.0.ggcl_fast-part-old", system.rename_to_free_name
    write(output(aside, kind))

    def late(old: str, new: str) -> bool:
        monkeypatch.undo()
        write(output(path, kind))
        return rename(old, new)

    monkeypatch.setattr(parts, "rename_to_free_name", late)
    with pytest.raises(FileExistsError, match="exists"):
        write(output(path, kind))
    assert set(contents(tmp_path).values()) == {NEW}
    assert os.listdir(tmp_path) == ["out"]
