"""Failing disks, signals, rivals: the target is the old one or the whole new one, and the source is never touched."""

import mmap
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import SourceChangedError
from ggcl_fast.storage import sources, system
from ggcl_fast.testing import SHAPE_7B, Shape, checkpoint_bytes, write_checkpoint

from .mutations import GGCL
from .reference import DATA

PACKAGE = Path(ggcl_fast.__file__).parent
OLD = b"precious"
SMALL = GGCL[-1]
SIZES = pytest.mark.parametrize("small", [True, False], ids=["read whole", "read by a thread"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.ggcl"
    path.write_bytes(SMALL)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "out.gguf"
    path.write_bytes(OLD)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `SMALL` becomes."""
    path = tmp_path_factory.mktemp("whole") / "out.gguf"
    with ggcl_fast.open_checkpoint(SMALL) as checkpoint:
        ggcl_fast.convert(checkpoint, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 61 MB: long enough in work to be hit in the middle of it."""
    folder = tmp_path_factory.mktemp("large")
    with (folder / "in.ggcl").open("wb") as file:
        write_checkpoint(file, SHAPE_7B)
    yield folder / "in.ggcl"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def large_whole(large: Path) -> bytes:
    ggcl_fast.convert(large, large.with_name("whole.gguf"))
    return large.with_name("whole.gguf").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


# --- what is no file ------------------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


INPUTS: dict[str, tuple[Callable[[Path], object], type[OSError], str]] = {
    "folder": (Path.mkdir, IsADirectoryError, "Is a directory"),
    "fifo that nobody writes to": (_fifo, OSError, "Nothing comes out"),
    "device": (lambda path: path.symlink_to("/dev/zero"), OSError, "Not a regular file"),
    "broken link": (lambda path: path.symlink_to("nowhere"), FileNotFoundError, "No such file"),
    "missing": (lambda _: None, FileNotFoundError, "No such file"),
}


@pytest.mark.parametrize(("make", "kind", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_that_are_no_files(
    make: Callable[[Path], object], kind: type[OSError], message: str, tmp_path: Path, target: Path
) -> None:
    make(tmp_path / "in.ggcl")
    with pytest.raises(kind, match=message) as caught:
        ggcl_fast.convert(tmp_path / "in.ggcl", target, force=True)
    assert caught.value.filename == str(tmp_path / "in.ggcl")
    assert target.read_bytes() == OLD


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of one's own, and nobody's rights where the tests run as root, whom nothing is forbidden."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_an_input_without_permission(unprivileged: Path) -> None:
    path = unprivileged / "in.ggcl"
    path.write_bytes(SMALL)
    path.chmod(0)
    with pytest.raises(PermissionError) as caught:
        ggcl_fast.convert(path, unprivileged / "out.gguf")
    assert caught.value.filename == str(path)
    assert names(unprivileged) == ["in.ggcl"]


def test_a_read_only_output_folder(unprivileged: Path) -> None:
    (unprivileged / "in.ggcl").write_bytes(SMALL)
    folder = unprivileged / "folder"
    folder.mkdir(mode=0o555)
    with pytest.raises(PermissionError) as caught:
        ggcl_fast.convert(unprivileged / "in.ggcl", folder / "out.gguf")
    assert caught.value.filename == str(folder / "out.gguf")
    assert names(folder) == []


OUTPUTS: dict[str, tuple[str, type[OSError], str]] = {
    "in a missing folder": ("missing/out.gguf", FileNotFoundError, "folder is not there"),
    "in a file": ("in.ggcl/out.gguf", NotADirectoryError, "Not a directory|folder is not there"),
    "a folder": (".", IsADirectoryError, "is a folder"),
    "a fifo that nobody reads": ("fifo", OSError, "No such device"),
}


@pytest.mark.parametrize(("name", "kind", "message"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_that_cannot_be(name: str, kind: type[OSError], message: str, source: Path) -> None:
    os.mkfifo(source.with_name("fifo"))
    with pytest.raises(kind, match=message):
        ggcl_fast.convert(source, source.parent / name, force=True)
    assert names(source.parent) == ["fifo", "in.ggcl"]
    assert source.read_bytes() == SMALL


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_file_is_replaced(exists: bool, source: Path, whole: bytes) -> None:
    folder = source.parent / "folder"
    folder.mkdir()
    if exists:
        (folder / "real.gguf").write_bytes(OLD)
    link = source.with_name("link.gguf")
    link.symlink_to("folder/real.gguf")
    ggcl_fast.convert(source, link, force=True)
    assert link.is_symlink()
    assert (folder / "real.gguf").read_bytes() == whole
    assert names(folder) == ["real.gguf"]


# --- signals --------------------------------------------------------------------------------------------------------


class _Interrupt(BaseException):
    pass


def _interrupted_at(moment: int, run: Callable[[], object]) -> bool:
    """Run `run` with an interrupt at the `moment`-th line, call or return in the package; false where it ended first.

    That is where Python runs a signal's handler.
    """
    # What only computes is left out: an interrupt there is like any other above it.
    modules = tuple(
        str(PACKAGE / f"{name}.py")
        for name in (
            "conversion",
            "formats/gguf_writer",
            "storage/copying",
            "storage/files",
            "storage/holding",
            "storage/outputs",
            "storage/places",
            "storage/sources",
            "storage/system",
        )
    )
    passed = 0

    def is_finalizer(frame: FrameType | None) -> bool:
        return frame is not None and (frame.f_code.co_name == "__del__" or is_finalizer(frame.f_back))

    def trace(frame: FrameType, *_: Any) -> Any:
        nonlocal passed
        if frame.f_code.co_filename not in modules or is_finalizer(frame):
            return None
        passed += 1
        if passed == moment:
            sys.settrace(None)
            raise _Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except _Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the source may stay open for a moment
@SIZES
def test_an_interrupt_at_any_line_leaves_the_old_or_the_new(
    small: bool, source: Path, target: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes its time

    def run() -> None:
        ggcl_fast.convert(source, target, force=True, fsync=True, engine="python")

    run()
    moment, found = 0, set()
    while True:
        moment += 1
        target.write_bytes(OLD)
        if not _interrupted_at(moment, run):
            break
        found.add(target.read_bytes())
        assert names(source.parent) == ["in.ggcl", "out.gguf"], moment
    assert moment > 200
    assert found == {OLD, whole}


COMMAND = (sys.executable, "-m", "ggcl_fast", "--force")


def _hit(process: "subprocess.Popen[bytes]", folder: Path, number: int, rng: random.Random) -> None:
    """Send the signal at some moment: anywhere from the start on, or while the temporary file is there."""
    if rng.random() < 0.4:
        time.sleep(rng.uniform(0, 0.6))
    else:
        while process.poll() is None and not any(name.endswith("-part") for name in os.listdir(folder)):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.06))
    process.send_signal(number)
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sigint_and_sigterm_leave_no_temporary_file(
    number: signal.Signals, large: Path, large_whole: bytes, target: Path
) -> None:
    rng = random.Random(number)
    statuses = set()
    for _ in range(15):
        target.write_bytes(OLD)
        with subprocess.Popen([*COMMAND, large, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            _hit(process, target.parent, number, rng)
            said = process.stderr.read().decode() if process.stderr else ""
        # Until the command has begun, Python's own start answers.
        python_answers = any(words in said for words in ("Fatal Python error: init", "Could not import runpy module"))
        assert process.returncode in (0, 128 + number, -number) or python_answers, said
        assert names(target.parent) == ["out.gguf"]
        assert target.read_bytes() in (OLD, large_whole)
        statuses.add(process.returncode)
    assert 128 + number in statuses


def test_sigkill_leaves_what_the_next_run_replaces(large: Path, large_whole: bytes, target: Path) -> None:
    rng = random.Random(9)
    left = set()
    for _ in range(20):
        target.write_bytes(OLD)
        with subprocess.Popen([*COMMAND, large, target], stdout=subprocess.DEVNULL) as process:
            _hit(process, target.parent, signal.SIGKILL, rng)
        assert target.read_bytes() in (OLD, large_whole)
        left |= set(names(target.parent))
    assert left == {"out.gguf", ".out.gguf.0.ggcl_fast-part"}
    subprocess.run([*COMMAND, large, target], check=True, stdout=subprocess.DEVNULL)
    assert names(target.parent) == ["out.gguf"]
    assert target.read_bytes() == large_whole


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4096, 1 << 20, 60 << 20])
def test_a_full_disk_shows_as_an_error(limit: int, large: Path, target: Path) -> None:
    """A limit on the size of files is met as a full disk is: by a short write, then an error."""
    for source in (large, DATA / "adam.ggcl"):
        if source.stat().st_size < limit:
            continue
        done = subprocess.run(
            [*COMMAND, source, target], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"ggcl-fast: error: {target}: File too large\n"
        assert target.read_bytes() == OLD
        assert names(target.parent) == ["out.gguf"]


def test_short_writes_and_interrupted_calls_are_completed(
    source: Path, target: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes of a few bytes each; EINTR never shows, since Python's calls start again by themselves (PEP 475)."""
    real = os.write
    monkeypatch.setattr(os, "writev", lambda fd, pieces: real(fd, bytes(pieces[0])[:3]))
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        ggcl_fast.convert(source, target, force=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert target.read_bytes() == whole


def test_fsync_reaches_the_file_before_and_the_folder_after_the_change(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace, exchange = os.fsync, os.replace, system.exchange

    def log_fsync(fd: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def log_replace(*args: Any) -> None:
        events.append("replace")
        replace(*args)

    monkeypatch.setattr(os, "fsync", log_fsync)

    def log_exchange(one: str, other: str) -> bool:
        events.append("replace")
        return exchange(one, other)

    monkeypatch.setattr(os, "replace", log_replace)
    monkeypatch.setattr(system, "exchange", log_exchange)
    ggcl_fast.convert(source, target, force=True)
    assert events == ["replace"]
    events.clear()
    ggcl_fast.convert(source, target, force=True, fsync=True)
    assert events == ["file", "replace", "folder"]


# --- sources that change --------------------------------------------------------------------------------------------


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-10_000, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(0, 0))


def _rewrite_and_put_the_time_back(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-10_000, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = [_shrink, _grow, _rewrite, _rewrite_and_put_the_time_back]


@pytest.fixture
def middle(tmp_path: Path) -> Path:
    """A checkpoint of 20 MB: larger than what is read whole, and than what is read ahead."""
    path = tmp_path / "in.ggcl"
    path.write_bytes(checkpoint_bytes(Shape(n_vocab=400_000)))
    return path


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["opened", "half read"])
def test_a_source_that_changes_is_an_error(
    change: Callable[[Path], None], moment: str, middle: Path, target: Path
) -> None:
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        if not done:
            change(middle)
        done += nbytes

    with ggcl_fast.open_checkpoint(middle) as checkpoint:
        if moment == "opened":
            change(middle)
        with pytest.raises(SourceChangedError, match="the file changed while it was read"):
            ggcl_fast.convert(checkpoint, target, force=True, progress=progress if moment == "half read" else None)
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["in.ggcl", "out.gguf"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_source_that_changes_is_an_error(change: Callable[[Path], None], tmp_path: Path, target: Path) -> None:
    source = tmp_path / "in.ggcl"
    source.write_bytes(GGCL[0])
    with ggcl_fast.open_checkpoint(source) as checkpoint:
        change(source)
        with pytest.raises(SourceChangedError):
            ggcl_fast.convert(checkpoint, target, force=True)
    assert target.read_bytes() == OLD


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kept", ["file and map", "map"])
@pytest.mark.parametrize("written", [True, False])
def test_writes_through_a_map_whose_pages_are_dirty(
    size: str, kept: str, written: bool, middle: Path, tmp_path: Path, target: Path
) -> None:
    """No time tells of them; an open file that nobody writes to is no reason to fail."""
    source = middle if size == "large" else tmp_path / "small.ggcl"
    if size == "small":
        source.write_bytes(GGCL[0])
    with source.open("r+b") as file:
        if not system.is_written_elsewhere(file.fileno()):
            pytest.skip("a file system without leases")
        mapped = mmap.mmap(file.fileno(), 0)
        for at in range(0, len(mapped), mmap.PAGESIZE):
            mapped[at] = mapped[at]
        mapped.flush()
        for at in range(0, len(mapped), mmap.PAGESIZE):
            mapped[at] = mapped[at]
        if kept == "map":
            file.close()
        with mapped, ggcl_fast.open_checkpoint(source) as checkpoint:
            if written:
                mapped[-300:] = bytes(300)
                with pytest.raises(SourceChangedError, match="through a map"):
                    ggcl_fast.convert(checkpoint, target, force=True)
            else:
                ggcl_fast.convert(checkpoint, target, force=True)
    assert (target.read_bytes() == OLD) == written


def test_a_file_that_nobody_writes_is_read_once(middle: Path) -> None:
    with ggcl_fast.open_checkpoint(middle) as checkpoint:
        assert isinstance(checkpoint.source, sources.SourceFile)
        assert checkpoint.source._digest is None


@pytest.mark.parametrize("what", ["link", "rename", "mode", "read"])
def test_what_changes_no_byte_is_no_change(what: str, source: Path, target: Path, whole: bytes) -> None:
    """All but the last set the time of the last change of status too."""
    with ggcl_fast.open_checkpoint(source) as checkpoint:
        if what == "link":
            os.link(source, source.with_name("other"))
        elif what == "rename":
            source.rename(source.with_name("other"))
        elif what == "mode":
            source.chmod(0o400)
        else:
            source.read_bytes()
        ggcl_fast.convert(checkpoint, target, force=True)
    assert target.read_bytes() == whole


def test_a_source_that_is_replaced_is_read_to_its_end(source: Path, target: Path, whole: bytes) -> None:
    """Whoever replaces a file in one step does no harm: the one that was opened is still whole."""
    with ggcl_fast.open_checkpoint(source) as checkpoint:
        source.with_name("new").write_bytes(b"another")
        source.with_name("new").replace(source)
        ggcl_fast.convert(checkpoint, target, force=True)
    assert target.read_bytes() == whole


# --- rivals ---------------------------------------------------------------------------------------------------------


def test_converters_to_one_target_at_once(large: Path, large_whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    for _ in range(2):
        rivals = [subprocess.Popen([*COMMAND, large, target], stdout=subprocess.DEVNULL) for _ in range(6)]
        assert [rival.wait() for rival in rivals] == [0] * 6
        assert target.read_bytes() == large_whole
        assert names(tmp_path) == ["out.gguf"]
        target.unlink()


def test_converters_to_one_target_in_threads(source: Path, target: Path, whole: bytes) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                ggcl_fast.convert(source, target, force=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert target.read_bytes() == whole
    assert names(source.parent) == ["in.ggcl", "out.gguf"]
