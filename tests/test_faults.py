"""Faults by table: whichever call of a conversion fails, and however, all outputs are the old ones or the new.

A sound run tells how often each call is made; then the first of them fails, the second, and so on, with each error
that the call can have.  A call can fail "before", with nothing done, or "after": it was done and an error is told all
the same, as network file systems do where an answer is lost.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.storage import sources, system

from .models import BASE
from .reference import DATA
from .test_failures import open_files

PACKAGE = os.path.dirname(ggcl_fast.__file__) + os.sep
MEMORY = "/dev/shm"
OLD = b"precious"
TARGETS: dict[str, dict[str, bytes]] = {
    "checkpoint": {"out": OLD},
    "adapter": {"out": OLD, "base-out.gguf": OLD},
    "merged": {"out": OLD},
    "peft": {"out/README.md": OLD, "out/adapter_config.json": OLD, "out/adapter_model.safetensors": OLD},
}
"""Old outputs, by their names in the outputs' folder."""

DATA_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
BEFORE: dict[str, tuple[int, ...]] = {
    "open": (errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS),
    "stat": (errno.EIO, errno.EACCES),
    "lstat": (errno.EIO, errno.EACCES),
    "fstat": (errno.EIO,),
    "preadv": (errno.EIO,),
    "writev": (*DATA_LOST, errno.EFBIG),
    "write": DATA_LOST,
    "ftruncate": (errno.EIO, errno.EPERM),
    "fsync": (errno.EIO, errno.ENOSPC),
    "dup": (errno.EMFILE,),
    "link": (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EIO),
    "unlink": (errno.EACCES, errno.EIO),
    "rename": (errno.EACCES, errno.EXDEV, errno.ENOSPC, errno.EIO),
    "replace": (errno.EACCES, errno.EXDEV, errno.ENOSPC, errno.EIO),
    "renameat2": (errno.EACCES, errno.EXDEV, errno.ENOSPC, errno.EIO, errno.ENOSYS, errno.EINVAL),
    "mkdir": (errno.ENOSPC, errno.EACCES, errno.EROFS),
    "rmdir": (errno.EACCES, errno.EIO),
    "listdir": (errno.EACCES, errno.EIO),
    "scandir": (errno.EACCES, errno.EIO),
    "flock": (errno.ENOLCK, errno.EOPNOTSUPP, errno.EAGAIN),
    "fcntl": (errno.EINVAL, errno.EAGAIN, errno.EACCES),
    "fallocate": (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC, errno.EIO),
}
AFTER: dict[str, tuple[int, ...]] = {
    "open": (errno.EIO,),
    "close": DATA_LOST,  # the descriptor is gone all the same
    "link": (errno.EIO, errno.EEXIST),
    "unlink": (errno.EIO, errno.ENOENT),
    "rename": (errno.EIO, errno.ENOENT),
    "replace": (errno.EIO, errno.ENOENT),
    "renameat2": (errno.EIO,),
    "mkdir": (errno.EIO, errno.EEXIST),
    "rmdir": (errno.EIO,),
}
CALLS = tuple(dict.fromkeys((*BEFORE, *AFTER)))
OF_DATA = ("preadv", "writev", "write", "fcntl")
"""Calls that are many, and to which fsync and what a system does not have are all one."""
ALIKE = ("preadv", "writev", "write", "stat", "lstat", "listdir", "scandir", "rmdir", "ftruncate", "fsync", "close")
"""Calls whose errors are all one to their callers: each time another is tried."""
TOLD = ("preadv", "writev", "write", "ftruncate", "fsync", "dup")
"""Calls without which no output is whole."""
OF_SYSTEM = ("fallocate", "renameat2")
OF_FCNTL = ("flock", "fcntl")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "all": (),
    "old": ("renameat2", "fallocate"),
    "bare": ("renameat2", "fallocate", "link"),
}
"""Calls that a system does not have.  All but the first write little at a time."""
PART = "ggcl_fast-part"
CLEANING = ("files._remove", "places._clear", "holding._remove_locked", "holding._is_old", "places._is_back")
"""Where a failing call keeps the package from removing what is temporary: the next run does it."""


class Fault(NamedTuple):
    """The `nth` call of this name fails, counted from the fault before it on."""

    call: str
    nth: int
    code: int
    after: bool


class Complaint(NamedTuple):
    """What is wrong after a call in a function of the package failed."""

    place: str
    what: str


class Case(NamedTuple):
    """Where a complaint is heard, and why."""

    to: str
    force: bool
    system: str
    call: str
    why: str
    second: bool = False
    """Whether it takes two faults."""


NAMELESS = "no file is named"
TEMPORARY = "a temporary name is told"
LEFT = "a temporary file is left"
NEW = "an error, and an output is the new one"
NEITHER = "an error, and an output is neither the old one nor the new"
UNHEARD = "a traceback for nobody"
NONE = "a file named None is told"
OTHER = "another error is told"
SWALLOWED = "an error is not told"

KNOWN: dict[Complaint, Case] = {
    Complaint("files._claim_and_replace", NEITHER): Case(
        "checkpoint", False, "bare", "open", "an empty file that was made though the call failed may be anybody's"
    ),
}
"""What cannot be mended: nothing tells the one from the other."""


class Shim:
    """Stands before the calls that concern files in `folder`: counts them, and lets some of them fail."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = str(folder)
        self._ours = set[int]()
        self._active = False
        self._without: tuple[str, ...] = ()
        self._faults: list[Fault] = []
        self.counts = Counter[str]()
        self.places: list[str] = []
        """The functions of the package whose calls failed."""
        for name in CALLS:
            if name not in OF_SYSTEM:
                module = fcntl if name in OF_FCNTL else os
                patch.setattr(module, name, functools.partial(self._call, name, getattr(module, name)))
        functions = {name: functools.partial(self._call, name, system._function(name)) for name in OF_SYSTEM}
        patch.setattr(system, "_function", functions.__getitem__)

    def run(self, function: Callable[[], object], without: tuple[str, ...], *faults: Fault) -> None:
        """Call `function` with these faults."""
        self._faults, self._without = list(faults), without
        self.counts.clear()
        self.places.clear()
        self._ours.clear()
        self._active = True
        try:
            function()
        finally:
            self._active = False

    def _concerns(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if name in OF_SYSTEM:
            return True
        if isinstance(args[0], int):
            return args[0] in self._ours
        if options.get("dir_fd") is not None:
            return options["dir_fd"] in self._ours
        return os.fsdecode(args[0]).startswith(self._folder)

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not self._active or not self._concerns(name, args, options):
            return real(*args, **options)
        if name in self._without:
            return self._failed(name, errno.EPERM if name == "link" else errno.ENOSYS, args)
        self.counts[name] += 1
        fault = self._faults[0] if self._faults else None
        if fault is None or (name, self.counts[name]) != (fault.call, fault.nth):
            return self._done(name, real, args, options)
        del self._faults[0]
        self.counts.clear()
        self.places.append(_place())
        if fault.after:
            done = self._done(name, real, args, options)
            if name == "open":
                self._done("close", os.close, (done,), {})
        return self._failed(name, fault.code, args)

    def _done(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name == "fsync":  # which takes its time
            return None
        if name == "writev" and self._without:
            args = args[0], [bytes(args[1][0])[:100]]
        if name == "close":
            self._ours.discard(args[0])
        result = real(*args, **options)
        if name in ("open", "dup"):
            self._ours.add(result)
        return result

    @staticmethod
    def _failed(name: str, code: int, args: tuple[Any, ...]) -> int:
        if name in OF_SYSTEM:
            ctypes.set_errno(code)
            return -1
        paths = [arg for arg in args[:2] if isinstance(arg, str | os.PathLike)]
        raise OSError(code, os.strerror(code), *(paths if len(paths) < 2 else (paths[0], None, paths[1])))


def _place() -> str:
    """Return which function of the package makes the call, be it by way of `system`."""
    frame = sys._getframe()
    while frame.f_back is not None and (
        not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == system.__file__
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


class Job:
    """A conversion that is done again and again: from what is in ``in`` to what is in ``to``."""

    def __init__(self, folder: Path, shim: Shim, to: str, *, force: bool) -> None:
        self._shim, self._to, self._force = shim, to, force
        self._out = folder / "to"
        self._inputs = [folder / "in" / "in.ggcl", folder / "in" / "base.gguf"]
        self._inputs[0].parent.mkdir()
        self._out.mkdir()
        for path, data in zip(self._inputs, (DATA / "trained.ggcl", BASE)):
            shutil.copyfile(data, path)
        self._before = self._status()
        self._old = TARGETS[to] if force else {}
        self._known = [str(self._out / name) for name in (*TARGETS[to], "out")] + list(map(str, self._inputs))
        self._convert(False)
        self._new = self._contents()
        self._n_open = open_files()

    def _status(self) -> list[tuple[int, ...]]:
        return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, self._inputs)]

    def _contents(self) -> dict[str, bytes]:
        """All files, and folders that have none."""
        return {
            str(path.relative_to(self._out)): b"" if path.is_dir() else path.read_bytes()
            for path in self._out.rglob("*")
            if path.is_file() or not os.listdir(path)
        }

    def _begin(self) -> None:
        """Make everything as it was."""
        if self._contents() != self._old:
            shutil.rmtree(self._out)
            self._out.mkdir()
            for name, data in self._old.items():
                (self._out / name).parent.mkdir(exist_ok=True)
                (self._out / name).write_bytes(data)

    def _convert(self, fsync: bool) -> None:
        ggcl_fast.convert(
            self._inputs[0], self._out / "out", to=self._to, base=None if self._to == "checkpoint" else self._inputs[1],
            force=self._force, fsync=fsync, engine="python",
        )  # fmt: skip

    def count(self, fsync: bool, without: tuple[str, ...], *faults: Fault) -> Counter[str]:
        """Return how often each call is made in a sound run, or after the last fault; nothing where it cannot be."""
        self._begin()
        try:
            self._shim.run(functools.partial(self._convert, fsync), without, *faults)
        except OSError:
            if not faults:
                return Counter()
        return self._shim.counts.copy()

    def complaints(self, fsync: bool, without: tuple[str, ...], *faults: Fault) -> set[Complaint]:
        """Return what is wrong after a run with these faults."""
        self._begin()
        unraisable: list[object] = []
        hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
        said, what = None, set()
        try:
            self._shim.run(functools.partial(self._convert, fsync), without, *faults)
        except (OSError, CheckpointError) as error:
            said = "; ".join([str(error), *getattr(error, "__notes__", ())])
            if getattr(error, "errno", None) not in [fault.code for fault in faults]:
                what.add(OTHER)
        except Exception as error:
            said = self._known[0]
            what.add(f"a {type(error).__name__}")
        finally:
            sys.unraisablehook = hook
        assert len(self._shim.places) == len(faults)
        if said is None and faults[0].call in TOLD:
            what.add(SWALLOWED)
        if unraisable:
            unraisable.clear()
            what.add(UNHEARD)
        if said is not None and not any(name in said for name in self._known):
            what.add(NAMELESS)
        if said is not None and PART in said:
            what.add(TEMPORARY)
        if self._status() != self._before:
            what.add("an input was changed")
        if open_files() > self._n_open:
            what.add("a file is open")
        now = self._contents()
        outputs = {name: data for name, data in now.items() if PART not in name}
        wanted = self._new if said is None else self._old
        if outputs != wanted:
            what.update(self._differences(outputs, wanted, said))
        place = self._shim.places[-1]
        if outputs != now and (place not in CLEANING or not self._is_cleared_away(without)):
            what.add(LEFT)
        complaints = {Complaint(place, one) for one in what}
        if said is not None and said.endswith("-> None"):
            complaints.add(Complaint("parts._naming_the_target", NONE))
        return complaints

    def _is_cleared_away(self, without: tuple[str, ...]) -> bool:
        """Tell whether the next run for the same target removes what is left."""
        for name in TARGETS[self._to] if not self._force else ():
            (self._out / name).unlink(missing_ok=True)
            if "/" in name and (self._out / name).parent.exists() and not os.listdir((self._out / name).parent):
                (self._out / name).parent.rmdir()
        try:
            self._shim.run(functools.partial(self._convert, False), without)
        except OSError:
            return False
        return self._contents() == self._new

    def _differences(self, outputs: dict[str, bytes], wanted: dict[str, bytes], said: str | None) -> Iterator[str]:
        """Yield what is neither as it should be nor told."""
        for name in outputs.keys() | wanted.keys():
            if outputs.get(name) == wanted.get(name):
                continue
            if said is None:
                yield "success, and an output is not the new one"
            elif outputs.get(name) == self._new.get(name):
                if f"{self._out / name.partition('/')[0]} is the new one" not in said:
                    yield NEW
            else:
                yield NEITHER


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that no link leads to; in memory where that can be, since thousands of runs are slow on a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        yield Path(os.path.realpath(name))


@pytest.fixture
def shim(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    monkeypatch.setattr("ggcl_fast.conversion._PREALLOCATED", 0)
    monkeypatch.setattr(sources, "SMALL", -1)
    return Shim(folder, monkeypatch)


def faults(call: str, n_calls: int) -> Iterator[Fault]:
    """Yield the faults of a call that is made so often."""
    for nth in range(1, n_calls + 1):
        for after, table in enumerate((BEFORE, AFTER)):
            codes = table.get(call, ())
            for code in codes if call not in ALIKE else [codes[nth % len(codes)]] if codes else ():
                yield Fault(call, nth, code, bool(after))


def found(job: Job, call: str, fsync: bool, without: tuple[str, ...], *first: Fault) -> set[Complaint]:
    """Return all that is wrong after one fault of a call, behind the `first`."""
    complaints = set[Complaint]()
    for fault in faults(call, job.count(fsync, without, *first)[call]):
        complaints |= job.complaints(fsync, without, *first, fault)
    return complaints


def last_fault(job: Job, without: tuple[str, ...]) -> Fault:
    """Return the last one that there can be: the names of the outputs, which are in place, do not reach the disk."""
    return Fault("fsync", job.count(True, without)["fsync"], errno.EIO, False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("force", [True, False], ids=["force", "new"])
@pytest.mark.parametrize("to", TARGETS)
def test_one_fault(to: str, force: bool, call: str, folder: Path, shim: Shim) -> None:
    job = Job(folder, shim, to, force=force)
    for name, without in SYSTEMS.items():
        for fsync in (True, False) if call not in OF_DATA else (False,):
            assert not found(job, call, fsync, without) - KNOWN.keys(), (name, fsync)
        if call in OF_DATA and job.count(False, without)[call]:
            break


@pytest.mark.parametrize("force", [True, False], ids=["force", "new"])
@pytest.mark.parametrize("to", TARGETS)
def test_a_second_fault_while_all_is_given_back(to: str, force: bool, folder: Path, shim: Shim) -> None:
    job = Job(folder, shim, to, force=force)
    for name, without in SYSTEMS.items():
        first = last_fault(job, without)
        for call in job.count(True, without, first) if first.nth else ():
            assert not found(job, call, True, without, first) - KNOWN.keys(), (name, call)


@pytest.mark.parametrize("known", KNOWN, ids=": ".join)
def test_what_is_known_still_happens(known: Complaint, folder: Path, shim: Shim) -> None:
    """An entry goes when its fault does."""
    case = KNOWN[known]
    job, without = Job(folder, shim, case.to, force=case.force), SYSTEMS[case.system]
    if case.second:
        complaints = found(job, case.call, True, without, last_fault(job, without))
    else:
        complaints = found(job, case.call, True, without) | found(job, case.call, False, without)
    assert known in complaints
