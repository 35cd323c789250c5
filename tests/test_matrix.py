"""Every reader, every target, every promise: each with each, taken from the tables themselves.

A reader or a target that is added is held to every promise without being asked.  A promise is a function of a `Case`:
it may read its inputs and write into its folder, and the inputs are looked at afterwards.
"""

import contextlib
import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args
from unittest import mock

import pytest

import ggcl_fast
from ggcl_fast import CheckpointError, Job, SourceChangedError, convert_many, open_checkpoint
from ggcl_fast.checkpoint import Format
from ggcl_fast.commands import convert as convert_command
from ggcl_fast.commands import info as info_command
from ggcl_fast.storage import sources
from ggcl_fast.storage.places import Place
from ggcl_fast.targets import TARGETS

from .engines import ENGINES
from .routes import PAIRS, Route
from .test_routes import refusal

Contents = dict[str, bytes]
NAME: Final = "in.bin"  # of every source: outputs are named after it
OLD: Final = b"precious"


def _samples() -> dict[str, tuple[bytes, bytes]]:
    """One sound pair of checkpoint and base model for each kind of source, the small ones first."""
    found: dict[str, tuple[bytes, bytes]] = {}
    for data, base in PAIRS:
        with open_checkpoint(data) as checkpoint:
            kind = f"{checkpoint.format}-{checkpoint.rows}-{checkpoint.optimizer.name if checkpoint.optimizer else ''}"
        found.setdefault(kind.rstrip("-"), (data, base))
    return found


SAMPLES: Final = _samples()


class Case:
    """One source, one target, and a folder to write to."""

    def __init__(self, folder: Path, data: bytes, base: bytes, to: str, *, with_base: bool) -> None:
        self.inputs, self.out = folder / "inputs", folder / "out"
        self.inputs.mkdir()
        self.out.mkdir()
        self.data, self.to = data, to
        self.source, self.target = self.inputs / NAME, self.out / "x"
        self.source.write_bytes(data)
        self.options: dict[str, Any] = {"to": to}
        if with_base:
            self.options["base"] = self.inputs / "base.gguf"
            self.options["base"].write_bytes(base)
        self.is_folder = bool(TARGETS[to].folder)

    def convert(self, source: Any = None, target: Any = None, **more: Any) -> ggcl_fast.ConversionReport:
        source = self.source if source is None else source
        return ggcl_fast.convert(source, target or self.target, **{**self.options, **more})

    def take(self) -> Contents:
        """Return all that was written, of which nothing is temporary, and remove it."""
        found = contents(self.out)
        assert [path for path in self.out.rglob("*") if "-part" in path.name] == []
        shutil.rmtree(self.out)
        self.out.mkdir()
        return found

    def whole(self) -> Contents:
        """Return what a plain conversion writes."""
        self.convert()
        return self.take()

    def put_old(self, names: Contents) -> Contents:
        """Put other files into the places of the outputs."""
        for name in names:
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.out / name).write_bytes(OLD)
        return contents(self.out)


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PROMISES: Final[dict[str, Callable[[Case], None]]] = {}


def promise(function: Callable[[Case], None]) -> Callable[[Case], None]:
    PROMISES[function.__name__] = function
    return function


@promise
def the_same_from_wherever_it_is_read(case: Case) -> None:
    whole = case.whole()
    for each in _places(case):
        with each as source:
            case.convert(source)
        assert case.take() == whole


def _places(case: Case) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the same source in every place that it can be in."""
    yield contextlib.nullcontext(str(case.source))
    for kind in (bytes, bytearray, memoryview):
        yield open_checkpoint(kind(case.data), name=NAME)
    yield open_checkpoint(case.source)
    yield _read_in_blocks(case)
    yield _piped(case)
    with contextlib.suppress(ImportError):  # the extra remote
        import fsspec

        fsspec.filesystem("memory").pipe(f"/matrix/{NAME}", case.data)
        yield contextlib.nullcontext(f"memory://matrix/{NAME}")


@contextlib.contextmanager
def _read_in_blocks(case: Case) -> Iterator[Path]:
    """As if it were large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SMALL", -1)
        yield case.source


@contextlib.contextmanager
def _piped(case: Case) -> Iterator[Path]:
    folder = case.inputs.parent / "pipe"
    folder.mkdir()
    os.mkfifo(folder / NAME)
    writer = threading.Thread(target=(folder / NAME).write_bytes, args=[case.data], daemon=True)
    writer.start()
    yield folder / NAME
    writer.join()
    shutil.rmtree(folder)


@promise
def the_same_by_every_engine_and_every_time(case: Case) -> None:
    whole = case.whole()
    for engine in ENGINES:
        case.convert(engine=engine)
        assert case.take() == whole


def _choices(case: Case) -> dict[str, Any]:
    """Every option that the target takes, and is there to be given, with another value than by default."""
    values = {
        "base_out": case.out / "other-base.gguf" if "base" in case.options else None,
        "heads": None if "base" in case.options else (2, 2),
        "rows": "gguf",
        "arch": None if "base" in case.options else "llama",
        "name": "a name",
        "base_model_id": "owner/model",
        "token_embd": False,
    }
    taken = {name: values[name] for name in TARGETS[case.to].takes if name != "base"}
    return {
        **{name: value for name, value in taken.items() if value is not None},
        "outtype": TARGETS[case.to].outtypes[-1],
    }


def _arguments(options: dict[str, Any]) -> list[str]:
    """Write options as the command has them."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            flags.append(f"--no-{name.replace('_', '-')}")
        elif value is True:
            flags.append(flag)
        else:
            flags.append(f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return flags


@promise
def the_same_in_a_batch_and_by_the_command(case: Case) -> None:
    """Whatever is asked for; and what must fail fails everywhere."""
    for more in ({}, _choices(case), {"ff": 12345}, {"dry_run": True}, {"fsync": True, "force": True}):
        options = {**case.options, **more}
        with contextlib.suppress(CheckpointError):
            ggcl_fast.convert(case.source, case.target, **options)
        expected = case.take()
        with ThreadPoolExecutor(2) as threads:
            for executor in (None, threads):
                [result] = convert_many([Job(case.source, case.target)], executor=executor, workers=1, **options)
                assert bool(result.error) == ("ff" in more)
                assert case.take() == expected
        status = convert_command.main([*_arguments(options), "-q", str(case.source), str(case.target)])
        assert status == ("ff" in more)
        assert case.take() == expected
        assert bool(expected) == (not {"ff", "dry_run"} & set(more))


@promise
def fsync_is_asked_for_by_every_way(case: Case) -> None:
    def n_synced(run: Callable[[], object]) -> int:
        with mock.patch.object(os, "fsync") as fsync:
            run()
        case.take()
        return int(fsync.call_count)

    options = {**case.options, "fsync": True}
    n = n_synced(lambda: ggcl_fast.convert(case.source, case.target, **options))
    assert n >= 2
    assert n == n_synced(lambda: list(convert_many([Job(case.source, case.target)], workers=1, **options)))
    assert n == n_synced(lambda: convert_command.main([*_arguments(options), "-q", str(case.source), str(case.target)]))
    assert n_synced(lambda: case.convert()) == 0


@promise
def the_same_for_threads_that_share_it(case: Case) -> None:
    whole = case.whole()
    with open_checkpoint(case.source) as checkpoint, ThreadPoolExecutor(3) as threads:
        folders = [case.out / str(i) for i in range(3)]
        list(threads.map(lambda folder: case.convert(checkpoint, folder / "x", parents=True), folders))
        assert [contents(folder) for folder in folders] == [whole] * 3


@promise
def the_same_through_links_and_into_new_folders(case: Case) -> None:
    whole = case.whole()
    (case.out / "real").mkdir()
    link = case.out / "link"
    link.symlink_to(case.out / "real")
    case.convert(target=link / "x", fsync=True)
    case.convert(target=case.out / "new" / "folder" / "x", parents=True)
    assert contents(case.out / "real") == contents(case.out / "new" / "folder") == whole


@promise
def the_same_into_streams_and_stores(case: Case) -> None:
    whole = case.whole()
    if case.is_folder or len(whole) > 1:
        return
    pipe = case.out / "x"
    os.mkfifo(pipe)
    fd = os.open(pipe, os.O_RDWR)
    case.convert()
    assert os.read(fd, 1 << 20) == whole["x"]
    os.close(fd)
    with contextlib.suppress(ImportError):  # the extra remote
        import fsspec

        memory = fsspec.filesystem("memory")
        memory.pipe("/matrix/out", OLD)
        with pytest.raises(FileExistsError):
            case.convert(target="memory://matrix/out")
        assert memory.cat("/matrix/out") == OLD
        case.convert(target="memory://matrix/out", force=True)
        assert memory.cat("/matrix/out") == whole["x"]


@promise
def a_dry_run_writes_nothing_and_tells_the_same(case: Case) -> None:
    report = case.convert(dry_run=True)
    assert os.listdir(case.out) == []
    old = case.put_old({"x/README.md": b""} if case.is_folder else {"x": b""})
    with pytest.raises(FileExistsError):
        case.convert(dry_run=True)
    assert case.take() == old
    real = case.convert()
    assert report._replace(seconds=0, dry_run=False) == real._replace(seconds=0)
    assert real.target_bytes == sum(map(len, case.take().values()))


@promise
def nothing_is_replaced_unasked_and_all_of_it_when_asked(case: Case) -> None:
    whole = case.whole()
    for name in whole:  # one that is there is enough
        old = case.put_old({name: b""})
        with pytest.raises(FileExistsError):
            case.convert()
        assert case.take() == old
    case.put_old(whole)
    case.convert(force=True)
    assert case.take() == whole


class _Progress:
    """Takes what is told, and looks at how much of it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun, self.told = folder, list[int](), 0

    def begin(self, total: int) -> None:
        assert self.told == 0
        self.begun.append(total)

    def __call__(self, nbytes: int) -> None:
        self.told += nbytes
        assert self.told <= sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@promise
def progress_comes_to_its_total(case: Case) -> None:
    progress = _Progress(case.out)
    report = case.convert(progress=progress)
    assert progress.begun == [report.target_bytes]
    assert progress.told == report.target_bytes


@promise
def a_failure_when_all_is_in_place_is_undone(case: Case) -> None:
    whole = case.whole()
    for is_there in (False, True):
        old = case.put_old(whole) if is_there else {}
        with mock.patch.object(Place, "sync", side_effect=OSError(5, "bad")), pytest.raises(OSError, match="bad"):
            case.convert(fsync=True, force=is_there)
        assert case.take() == old


@promise
def a_source_that_changes_is_an_error(case: Case) -> None:
    def change(_: int) -> None:
        case.source.write_bytes(case.data[:-1] + bytes([case.data[-1] ^ 1]))

    with pytest.raises(SourceChangedError):
        case.convert(progress=change)
    assert os.listdir(case.out) == []
    case.source.write_bytes(case.data)


@promise
def a_failure_at_any_step_leaves_what_was_there(case: Case) -> None:
    told: list[int] = []
    case.convert(progress=told.append)
    whole = case.take()
    for last in range(len(told)):
        for is_there in (False, True):
            old = case.put_old(whole) if is_there else {}
            left = last

            def fail(_: int) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(28, "No space left on device")

            with pytest.raises(OSError, match="No space left"):
                case.convert(progress=fail, force=is_there)
            assert case.take() == old


@promise
def no_input_is_an_output(case: Case) -> None:
    for path in case.inputs.iterdir():
        for name in (path, case.out / "link"):
            if name != path:
                name.symlink_to(path)
            with pytest.raises(OSError, match=r"[sS]ame|is the|input|folder"):
                case.convert(target=name, force=True)
            (case.out / "link").unlink(missing_ok=True)
            assert os.listdir(case.out) == []


@promise
def what_is_cut_short_leaves_nothing(case: Case) -> None:
    """But where only padding is gone; and a ggla file may end behind any tensor, and tells nowhere how many it has."""
    whole, n_bytes = case.whole(), len(case.data)
    for size in {*range(0, n_bytes, max(1, n_bytes // 40)), n_bytes - 1}:
        case.source.write_bytes(case.data[:size])
        with contextlib.suppress(CheckpointError):
            case.convert()
            assert case.take() == whole or case.data.startswith(b"algg")
        assert os.listdir(case.out) == []
    case.source.write_bytes(case.data)


@promise
def what_is_written_is_known_again(case: Case) -> None:
    case.convert()
    for path in case.out.iterdir():
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert info_command.main([str(path)]) == 0
        assert str(path) in shown.getvalue()


class Cell(NamedTuple):
    """A source and a target, by name, and whether the base model is given."""

    kind: str
    to: str
    with_base: bool

    @property
    def refusal(self) -> str:
        """Why this source cannot become that target; nothing where it can."""
        return refusal(*SAMPLES[self.kind], Route(self.to, with_base=self.with_base))

    def __str__(self) -> str:
        return f"{self.kind}-{self.to}{'-base' if self.with_base else ''}"


CELLS: Final = [
    Cell(kind, to, with_base)
    for kind in SAMPLES
    for to, target in TARGETS.items()
    for with_base in (True, False)
    if ("base" in target.takes or not with_base) and ("base" not in target.needs or with_base)
]


def test_every_format_has_a_sample() -> None:
    assert {kind.split("-")[0] for kind in SAMPLES} == set(get_args(Format))
    assert {cell.to for cell in CELLS if not cell.refusal} == set(TARGETS)


@pytest.fixture
def case(cell: Cell, tmp_path: Path) -> Iterator[Case]:
    case = Case(tmp_path, *SAMPLES[cell.kind], cell.to, with_base=cell.with_base)
    before = contents(case.inputs)
    yield case
    assert contents(case.inputs) == before


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.refusal], ids=str)
def test_promise(name: str, case: Case) -> None:
    PROMISES[name](case)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.refusal], ids=str)
def test_what_cannot_be_is_refused_and_leaves_what_was_there(cell: Cell, case: Case) -> None:
    for is_there in (False, True):
        old = case.put_old({"x/adapter_config.json": b""} if case.is_folder else {"x": b""}) if is_there else {}
        with pytest.raises(CheckpointError, match=re.escape(cell.refusal)):
            case.convert(force=is_there)
        assert case.take() == old
