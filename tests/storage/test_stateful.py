"""Any sequence of conversions, failures, kills and rivals: each name has the old thing or the new one, whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import ggcl_fast
from ggcl_fast.storage import system
from ggcl_fast.storage.outputs import Progress
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..models import Model

OLD: Final = b"precious"
FOLDERS: Final = ("in", "out", "elsewhere")
SOURCES: Final = ("one.ggcl", "two.ggcl")
TARGETS: Final = ("a.gguf", "b.gguf", "base-a.gguf")  # the last is also the base's copy that comes with the first
NAMES: Final = (*TARGETS, "base-b.gguf", "base-base-a.gguf")
PEFT: Final = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
PART: Final = ".ggcl_fast-part"
ASIDE: Final = "-old"
DONE, REFUSED, KILLED, BROKEN = range(4)


class Link(NamedTuple):
    """A symbolic link."""

    to: str


Thing: TypeAlias = bytes | dict[str, bytes] | Link
"""What can be at a name: a file, a folder of files, a link."""
Things: TypeAlias = dict[str, Thing]
"""By names such as ``out/a.gguf``."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion to `name`."""

    source: str
    to: str
    name: str
    force: bool
    fsync: bool

    @property
    def outputs(self) -> list[str]:
        """What it writes, in the order in which it appears."""
        target = f"out/{self.name}"
        return [f"out/base-{self.name}", target] if self.to == "adapter" else [target]

    @property
    def new(self) -> tuple[Thing, ...]:
        """What its outputs become."""
        return made(self.source, self.to)

    def is_kind(self, thing: Thing) -> bool:
        """Tell whether `thing` is a folder where the job's target is one, or a file where that is."""
        return isinstance(thing, dict) if self.to == "peft" else isinstance(thing, bytes)

    def may_replace(self, old: Thing | None) -> bool:
        if old is None:
            return True
        return self.force and self.is_kind(old) and not (isinstance(old, dict) and old.keys() - PEFT)

    def run(self, root: Path, progress: Progress | None = None) -> bool:
        """Do it; false where it fails."""
        base = None if self.to == "checkpoint" else root / "in" / "base.gguf"
        base_out = (
            root / f"out/base-{Path(self.name).stem}.gguf" if self.to == "adapter" else None
        )  # and no other that is there
        try:
            ggcl_fast.convert(
                root / "in" / self.source, root / "out" / self.name, to=self.to, base=base, base_out=base_out,
                force=self.force, fsync=self.fsync, engine="python", progress=progress,
            )  # fmt: skip
        except OSError:
            return False
        return True


@functools.cache
def inputs() -> dict[str, bytes]:
    """A base model of a few tensors, and two checkpoints that differ in all of them."""
    shape = Shape(n_layer=1, n_embd=8, n_vocab=8, n_ff=8, n_head=2, n_rot=4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        Model(n_layer=1, n_head=2, n_head_kv=2, head_dim=4, n_ff=8, n_vocab=8).write(path)
        found = {path.name: path.read_bytes()}
    return found | {name: checkpoint_bytes(shape, seed=seed) for seed, name in enumerate(SOURCES)}


def make_folders(root: Path) -> None:
    for name in FOLDERS:
        (root / name).mkdir()
    for name, data in inputs().items():
        (root / "in" / name).write_bytes(data)


@functools.cache
def made(source: str, to: str) -> tuple[Thing, ...]:
    """What the outputs of a conversion are where nothing disturbs it."""
    job = Job(source, to, "clean", False, False)
    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder))
        assert job.run(Path(folder))
        found = look(Path(folder))
    names = ["out/base-clean.gguf", "out/clean"] if to == "adapter" else ["out/clean"]
    assert {name for name in found if name.startswith("out/")} == set(names)
    return tuple(found[name] for name in names)


def thing_at(path: Path) -> Thing:
    if path.is_symlink():
        return Link(os.readlink(path).removeprefix("../"))
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in os.listdir(path)}
    return path.read_bytes()


def look(root: Path) -> Things:
    """Everything that is there."""
    return {
        f"{folder}/{name}": thing_at(root / folder / name) for folder in FOLDERS for name in os.listdir(root / folder)
    }


def put(path: Path, thing: Thing | None) -> None:
    """Put `thing` where something may be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(thing, Link):
        path.symlink_to(f"../{thing.to}")
    elif isinstance(thing, dict):
        path.mkdir()
        for name, data in thing.items():
            (path / name).write_bytes(data)
    elif thing is not None:
        path.write_bytes(thing)


FOREIGN: Final[dict[str, Thing | None]] = {
    "nothing": None,
    "file": OLD,
    "folder": {"thesis.tex": OLD},
    "folder with another file": {"adapter_config.json": OLD, "thesis.tex": OLD},
    "PEFT folder": {"adapter_config.json": OLD},
    "empty folder": {},
}
KINDS: Final = (*FOREIGN, "link", "dangling link", "link to an output", "hard link")
JOBS = st.builds(
    Job, source=st.sampled_from(SOURCES), to=st.sampled_from(["checkpoint", "adapter", "merged", "peft"]),
    name=st.sampled_from(TARGETS), force=st.sampled_from([True, True, False]), fsync=st.booleans(),
)  # fmt: skip
WAYS: Final = st.sampled_from(["as it is", "free", "replaceable"])


@contextlib.contextmanager
def acting(where: str, nth: int, act: Callable[[], object]) -> Iterator[Progress]:
    """Do `act` before the `nth` call of a function, or of progress, which is given."""
    n_calls = 0

    def count() -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth:
            act()

    if where == "progress":
        yield lambda *_: count()
        return
    module = os if hasattr(os, where) else system
    real = getattr(module, where)

    def counted(*args: Any, **options: Any) -> Any:
        count()
        return real(*args, **options)

    with mock.patch.object(module, where, counted):
        yield lambda *_: None


def die_at(moment: int) -> Progress:
    """Let this process end at the `moment`-th step of what it does with names; return progress, of which one counts.

    A step is what comes before a call or after it.
    """
    n_steps = n_progress = 0

    def step() -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps == moment:
            os._exit(KILLED)

    def progress(*_: int) -> None:
        nonlocal n_progress
        n_progress += 1
        if n_progress == 1:
            step()

    def dying(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if real is opening and PART not in str(args[0]):
            return real(*args, **options)
        step()
        result = real(*args, **options)
        step()
        return result

    opening = os.open
    calls = [(os, name) for name in ("open", "mkdir", "unlink", "rmdir", "rename", "replace", "link")]
    for module, name in (*calls, (system, "exchange"), (system, "rename_to_free_name")):
        setattr(module, name, functools.partial(dying, getattr(module, name)))
    return progress


def status_of_child(job: Job, root: Path, moment: int | tuple[str, int]) -> int:
    """Do `job` in a process of its own, which is killed at this moment if it lives as long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that other tests have left
        child = os.fork()
    if child == 0:
        try:
            if isinstance(moment, int):
                done = job.run(root, die_at(moment))
            else:
                with acting(*moment, lambda: os._exit(KILLED)) as progress:
                    done = job.run(root, progress)
            os._exit(DONE if done else REFUSED)
        finally:
            os._exit(BROKEN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Conversions(RuleBasedStateMachine):
    """Holds a folder against what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.root = Path(os.path.realpath(self.stack.enter_context(tempfile.TemporaryDirectory())))
        self.stack.enter_context(mock.patch.object(os, "fsync", return_value=None))  # which takes its time
        make_folders(self.root)
        self.things = look(self.root)
        self.left: Things = {}
        """Temporary places of killed processes."""

    @initialize(in_one_step=st.booleans())
    def choose_a_system(self, in_one_step: bool) -> None:
        """With what Linux has, or as on systems that have nothing of it."""
        self.in_one_step = in_one_step
        if not in_one_step:
            self.stack.enter_context(mock.patch.object(system, "_function", return_value=None))

    def teardown(self) -> None:
        self.stack.close()

    # --- the model --------------------------------------------------------------------------------------------------

    def followed(self, name: str) -> str:
        """Where the links from `name` lead."""
        while isinstance(thing := self.things.get(name), Link):
            name = thing.to
        return name

    def places(self, job: Job) -> list[str]:
        return [self.followed(name) for name in job.outputs]

    def is_possible(self, job: Job) -> bool:
        """Tell whether nothing is in the job's way; two outputs that are one file are."""
        places = self.places(job)
        inodes = [(s.st_dev, s.st_ino) for s in (os.stat(self.root / p) for p in places if p in self.things)]
        apart = len(set(places)) == len(places) and len(set(inodes)) == len(inodes)
        return apart and all(job.may_replace(self.things.get(place)) for place in places)

    def part(self, job: Job, place: str) -> str:
        """Name the temporary place that a job takes: a leftover's where it is of the same kind."""
        folder, name = place.split("/")
        for number in itertools.count():
            part = f"{folder}/.{name}.{number}{PART}"
            aside = self.left.get(part + ASIDE)
            free = part not in self.left or job.is_kind(self.left[part])
            if free and (aside is None or place not in self.things or job.is_kind(aside)):
                return part
        raise AssertionError

    def others(self, part: str) -> list[str]:
        """Name the temporary places of higher numbers, up to the first that is not there."""
        stem, number = part.removesuffix(PART).rsplit(".", 1)
        names = (f"{stem}.{i}{PART}" for i in itertools.count(int(number) + 1))
        return list(itertools.takewhile(lambda name: name in self.left or name + ASIDE in self.left, names))

    def begin(self, job: Job) -> bool:
        """Do what a job does before it writes: settle leftovers; false where it ends there."""
        if not self.is_possible(job):
            return False
        for place in self.places(job):
            own = self.part(job, place)
            for part in (own, *self.others(own)):
                if part in self.left and job.is_kind(self.left[part]):
                    del self.left[part]
                aside = self.left.get(part + ASIDE)
                if aside is None or (part != own and part in self.left):
                    continue
                if place not in self.things:
                    self.things[place] = self.left.pop(part + ASIDE)
                    return False
                if job.is_kind(aside):
                    del self.left[part + ASIDE]
        return True

    def take(self, job: Job, n_outputs: int | None = None) -> None:
        """Let the first outputs of a job be in place, all by default."""
        self.things.update(list(zip(self.places(job), job.new))[:n_outputs])

    def actual(self) -> tuple[Things, Things]:
        """What is there, apart from what is temporary."""
        found = look(self.root)
        left = {name: thing for name, thing in found.items() if PART in name}
        return {name: thing for name, thing in found.items() if name not in left}, left

    def place(self, name: str, kind: str) -> None:
        """Put a foreign thing at ``out/name``, in fact and in the model."""
        out, elsewhere = f"out/{name}", f"elsewhere/{name}"
        new: dict[str, Thing | None] = {}
        if kind in FOREIGN:
            new[out] = FOREIGN[kind]
        elif kind == "link to an output":
            to = f"out/{TARGETS[NAMES.index(name) - 1] if name in TARGETS else TARGETS[0]}"
            new[out] = Link(to) if self.followed(to) != out else None
        else:
            new[elsewhere] = OLD if kind != "dangling link" else None
            new[out] = OLD if kind == "hard link" else Link(elsewhere)
        for one, thing in new.items():
            put(self.root / one, thing)
            self.things.pop(one, None)
            if thing is not None:
                self.things[one] = thing
        if kind == "hard link":
            put(self.root / out, None)
            os.link(self.root / elsewhere, self.root / out)

    def pave(self, job: Job, way: str) -> None:
        """Put at the names of a job's outputs what is not in its way."""
        if way != "as it is":
            for name in job.outputs:
                replaceable = "PEFT folder" if job.to == "peft" else "file"
                self.place(name.removeprefix("out/"), "nothing" if way == "free" else replaceable)

    def attempt(self, job: Job) -> None:
        """Convert undisturbed."""
        possible = self.begin(job)
        assert job.run(self.root) == possible
        if possible:
            self.take(job)

    # --- what happens -----------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(KINDS))
    def somebody_puts_something_there(self, name: str, kind: str) -> None:
        self.place(name, kind)

    @rule(job=JOBS)
    def convert(self, job: Job) -> None:
        self.attempt(job)

    @rule(job=JOBS, read=st.booleans(), hard=st.booleans())
    def convert_to_what_is_read(self, job: Job, read: bool, hard: bool) -> None:
        source = self.root / "in" / (job.source if read or job.to == "checkpoint" else "base.gguf")
        self.place(job.name, "nothing")
        link = self.root / "out" / job.name
        if hard:
            os.link(source, link)
        else:
            link.symlink_to(source)
        assert not dataclasses.replace(job, force=True).run(self.root)
        assert os.path.samefile(source, link)
        link.unlink()

    @rule(
        job=JOBS, where=st.sampled_from(["progress", "rename_to_free_name", "exchange", "replace", "link", "rename"]),
        nth=st.integers(1, 3), way=WAYS,
    )  # fmt: skip
    def convert_with_a_failure(self, job: Job, where: str, nth: int, way: str) -> None:
        self.pave(job, way)
        failed = False

        def fail() -> None:
            nonlocal failed
            failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        before, left_before = dict(self.things), dict(self.left)
        possible = self.begin(job)
        with acting(where, nth, fail) as progress:
            done = job.run(self.root, progress)
        if failed and where == "rename":  # by which what a killed run had set aside would have come back
            for place in self.things.keys() - before.keys():
                begin = "{}/.{}.".format(*place.split("/"))
                gone = sorted(left_before.keys() - self.left.keys())
                *_, aside = (name for name in gone if name.startswith(begin) and name.endswith(ASIDE))
                self.left[aside] = self.things.pop(place)
        # Where there are no links, there is another way.
        assert done in ((possible, False) if failed and where == "link" else (possible and not failed,))
        if done:
            self.take(job)

    @rule(
        job=JOBS, where=st.sampled_from(["progress", "rename_to_free_name"]), nth=st.integers(1, 2),
        name=st.sampled_from(NAMES), at=st.sampled_from([None, 0, -1]), kind=st.sampled_from(KINDS),
        way=WAYS,
    )  # fmt: skip
    def convert_while_somebody_puts_something_there(
        self, job: Job, where: str, nth: int, name: str, at: int | None, kind: str, way: str
    ) -> None:
        """At any name, or at one that the job has; before its outputs are in place, or when the first of two is."""
        self.pave(job, way)
        if at is not None:
            name = job.outputs[at].removeprefix("out/")
        possible = self.begin(job)
        places, n_taken = self.places(job), nth - 1 if where == "rename_to_free_name" else 0
        old = dict(self.things)
        happened = False

        def interfere() -> None:
            nonlocal happened
            happened = True
            self.take(job, n_taken)
            self.place(name, kind)

        with acting(where, nth, interfere) as progress:
            done = job.run(self.root, progress)
        if not happened:
            n_taken = 0
        new = dict(zip(places, job.new))
        assert done == (possible and all(job.may_replace(self.things.get(place)) for place in places[n_taken:]))
        for place in places[n_taken:] if done else ():
            self.things[place] = new[place]
        for place in places[:n_taken] if not done else ():
            if self.things.get(place) == new[place]:
                del self.things[place]
                self.things |= {place: old[place]} if place in old else {}

    @rule(job=JOBS, moment=st.integers(1, 20) | st.integers(4, 8), way=WAYS, again=st.booleans())
    def convert_and_be_killed(self, job: Job, moment: int, way: str, again: bool) -> None:
        """At any step; with another run at once, or whenever it comes."""
        self.pave(job, way)
        self.convert_until(job, moment)
        if again:
            self.attempt(job)

    @rule(job=JOBS, nth=st.integers(1, 2), gone=st.booleans(), again=JOBS)
    def convert_and_be_killed_between_two_renames(self, job: Job, nth: int, gone: bool, again: Job) -> None:
        """With another run of any kind to the same name, and maybe somebody who removes what is there before."""
        job = dataclasses.replace(job, force=True)
        self.pave(job, "replaceable")
        if job.to in ("checkpoint", "merged"):
            self.convert_until(job, nth + 5)  # where there would be a second one
        elif self.in_one_step:
            self.convert_until(job, ("exchange", nth))
        else:
            self.convert_until(job, ("rename", 2) if job.to == "peft" else ("replace", nth))
        if gone:
            self.place(job.name, "nothing")
        self.attempt(dataclasses.replace(again, name=job.name))

    def convert_until(self, job: Job, moment: int | tuple[str, int]) -> None:
        """Convert in a process that is killed at this moment, if it lives as long."""
        before, left_before = dict(self.things), dict(self.left)
        places = self.places(job)
        possible = self.begin(job)
        status = status_of_child(job, self.root, moment)
        if status != KILLED:
            assert status == (DONE if possible else REFUSED)
            if possible:
                self.take(job)
            return
        things, left = self.actual()
        allowed = [before, dict(self.things)]
        for n_outputs in range(len(places) + 1) if possible else ():
            self.take(job, n_outputs)
            allowed.append(dict(self.things))
        if job.to == "peft" and not self.in_one_step and places[0] in before and places[0] not in things:
            assert before[places[0]] in [thing for name, thing in left.items() if name.endswith(ASIDE)]
            del before[places[0]]
        assert things in allowed
        ours = tuple("{}/.{}.".format(*place.split("/")) for place in places)
        for name in left.keys() | left_before.keys():
            assert name.startswith(ours) or left.get(name) == left_before.get(name)
        self.things, self.left = things, left

    @rule(job=JOBS, sources=st.lists(st.sampled_from(SOURCES), min_size=2, max_size=3), way=WAYS)
    def convert_in_several_threads(self, job: Job, sources: list[str], way: str) -> None:
        self.pave(job, way)
        jobs = [dataclasses.replace(job, source=source) for source in sources]
        places = self.places(job)
        if any(name.endswith(ASIDE) for name in self.left):
            return  # whoever comes first puts it back, and whoever comes then finds it
        possible = self.begin(job)
        barrier = threading.Barrier(len(jobs))

        def run(one: Job) -> bool:
            waiting = [barrier] if possible else []
            return one.run(self.root, lambda *_: waiting.pop().wait(10) if waiting else None)

        with ThreadPoolExecutor(len(jobs)) as threads:
            done = list(threads.map(run, jobs))
        things, left = self.actual()
        if not possible:
            assert not any(done)
        elif job.force:
            assert all(done)
            for i, place in enumerate(places):
                assert things[place] in [one.new[i] for one in jobs]
                self.things[place] = things[place]
        else:
            assert done.count(True) == 1
            self.take(jobs[done.index(True)])
        assert left.items() <= self.left.items()
        self.left = left

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        things, left = self.actual()
        assert sorted(name for name in things.keys() | self.things if things.get(name) != self.things.get(name)) == []
        assert sorted(name for name in left.keys() | self.left if left.get(name) != self.left.get(name)) == []


TestConversions = pytest.mark.filterwarnings("error")(Conversions.TestCase)
TestConversions.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_old_and_new_differ() -> None:
    for to in ("checkpoint", "adapter", "merged", "peft"):
        one, two = (made(source, to) for source in SOURCES)
        assert all(this != that for this, that in zip(one, two))
