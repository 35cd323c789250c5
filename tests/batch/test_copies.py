"""The copy of a base model that several jobs would write alike: one file, with a name for each adapter."""

import contextlib
import errno
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import JobResult, conversion, convert_many
from ggcl_fast.commands.convert import main
from ggcl_fast.storage.files import OutputFile
from ggcl_fast.targets import copies
from ggcl_fast.targets.copies import copy_fingerprint
from ggcl_fast.targets.options import Options

from ..reference import DATA

BASE = DATA / "base.gguf"
WAYS: dict[str, tuple[int | None, Callable[[], Executor | None]]] = {
    "here": (1, lambda: None), "pool": (2, lambda: None), "threads": (None, lambda: ThreadPoolExecutor(3)),
}  # fmt: skip


def folders(root: Path, *names: str) -> list[Path]:
    """Make folders of these names."""
    for name in names:
        (root / name).mkdir()
    return [root / name for name in names]


def trained(path: Path, add: float = 0, *, norm: bool = True) -> Path:
    """Write the trained checkpoint, with something added to the deltas of a norm or of another weight."""
    data = bytearray((DATA / "trained.ggcl").read_bytes())
    with ggcl_fast.open_checkpoint(DATA / "trained.ggcl") as checkpoint:
        pair = next(pair for pair in sorted(checkpoint.pairs) if pair.is_norm == norm)
        place = checkpoint.table[pair.row_b]
    values = np.frombuffer(data, "<f4", count=int(place["nbytes"]) // 4, offset=int(place["offset"]))
    values += np.float32(add)
    path.write_bytes(data)
    return path


def of_one_training(folder: Path) -> list[Path]:
    """Write what finetune left of its latest state: a checkpoint under two names, and an adapter beside each."""
    for kind, suffix in (("chk", "ggcl"), ("lora", "ggla")):
        for name in ("320", "LATEST"):
            (folder / f"{kind}-{name}.{suffix}").write_bytes((DATA / f"trained.{suffix}").read_bytes())
    return sorted(folder.iterdir())


def run(sources: Sequence[Path], out: Path, way: str = "here", **options: Any) -> dict[str, JobResult]:
    """Convert to adapters upon the base; return the results by the names of the sources without their suffixes."""
    workers, make = WAYS[way]
    executor = make()
    jobs = [(source, out / f"{source.stem}.gguf") for source in sources]
    options = {"to": "adapter", "base": BASE, **options}
    results = list(convert_many(jobs, workers=workers, executor=executor, chunk=2, **options))
    if executor is not None:
        executor.shutdown()
    assert len(results) == len(jobs)
    return {Path(result.job.source).stem: result for result in results}


def notes_of(result: JobResult) -> tuple[str, ...]:
    assert result.report is not None, result.error
    return result.report.notes


def hold_together(out: Path, *groups: str) -> None:
    """Hold that the copies that come with adapters of these names are one file for each group."""
    inodes = [{(out / f"base-{name}.gguf").stat().st_ino for name in group.split()} for group in groups]
    assert [len(some) for some in inodes] == [1] * len(groups)
    assert len(set.union(*inodes)) == len(groups)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_the_same_is_written_once(way: str, tmp_path: Path) -> None:
    sources, out, alone = folders(tmp_path, "sources", "out", "alone")
    same = of_one_training(sources)
    others = [trained(sources / "norms.ggcl", 0.5), trained(sources / "weights.ggcl", 0.5, norm=False)]
    results = run([*same, *others], out, way)
    stems = [source.stem for source in [*same, *others]]
    assert {path.name for path in out.iterdir()} == {f"{head}{name}.gguf" for head in ("", "base-") for name in stems}
    hold_together(out, "chk-320 chk-LATEST lora-320 lora-LATEST", "norms", "weights")
    for name in ("chk-320", "norms"):
        ggcl_fast.convert(sources / f"{name}.ggcl", alone / f"{name}.gguf", to="adapter", base=BASE)
        for file in (f"{name}.gguf", f"base-{name}.gguf"):
            assert (out / file).read_bytes() == (alone / file).read_bytes()
    for name, result in results.items():
        norms, *more = notes_of(result)
        assert norms == f"the norm deltas are in {out}/base-{name}.gguf: load the adapter upon that model"
        assert len(more) == (name in ("chk-LATEST", "lora-320", "lora-LATEST"))
        assert all(note.startswith(f"{out}/base-{name}.gguf and ") for note in more)
        assert all(note.endswith(".gguf are two names of one file") for note in more)
        assert result.report is not None
        assert result.report.extra_outputs == (f"{out}/base-{name}.gguf",)
        assert result.report.target_bytes == sum((out / f"{head}{name}.gguf").stat().st_size for head in ("", "base-"))


def test_nothing_is_shared_where_no_norm_was_trained(tmp_path: Path) -> None:
    wild = [tmp_path / "a.ggla", tmp_path / "b.ggla"]
    for path in wild:
        path.write_bytes((DATA / "wild/peft-qkv.ggla").read_bytes())
        with ggcl_fast.open_checkpoint(path) as checkpoint:
            assert copy_fingerprint(checkpoint) is None
    (tmp_path / "out").mkdir()
    run(wild, tmp_path / "out", base=DATA / "wild/peft-qkv-base.gguf")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize("way", WAYS)
def test_where_one_fails_the_next_writes_it(way: str, tmp_path: Path) -> None:
    sources, out = folders(tmp_path, "sources", "out")
    (out / "chk-320.gguf").write_bytes(b"somebody's")
    results = run(of_one_training(sources), out, way)
    assert {name for name, result in results.items() if result.status == "failed"} == {"chk-320"}
    assert not (out / "base-chk-320.gguf").exists()
    hold_together(out, "chk-LATEST lora-320 lora-LATEST")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_there_is_left_and_what_is_missing_made_again(way: str, tmp_path: Path) -> None:
    sources, out = folders(tmp_path, "sources", "out")
    files = of_one_training(sources)
    run(files, out, way)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}

    def again(some: Sequence[Path]) -> dict[str, str]:
        results = run(some, out, way, skip_existing=True)
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert {name: len(data) for name, data in found.items()} == {name: len(data) for name, data in whole.items()}
        return {name: result.status for name, result in results.items()}

    for some in (files, files[1:], files[::-1], files[2:3]):
        assert set(again(some).values()) == {"skipped"}
    for name, job in (("base-chk-320.gguf", "chk-320"), ("lora-320.gguf", "lora-320"), ("chk-320.gguf", "chk-320")):
        (out / name).unlink()
        assert {of for of, status in again(files).items() if status == "converted"} == {job}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_replaced_for_one_and_stays_for_the_others(way: str, tmp_path: Path) -> None:
    """As where training went on, and the latest checkpoint is converted again."""
    sources, out = folders(tmp_path, "sources", "out")
    files = of_one_training(sources)
    run(files, out, way)
    old = (out / "base-chk-320.gguf").read_bytes()
    trained(sources / "chk-LATEST.ggcl", 0.5)
    run([sources / "chk-LATEST.ggcl"], out, way, force=True)
    assert (out / "base-chk-LATEST.gguf").read_bytes() != old
    assert (out / "base-chk-320.gguf").read_bytes() == old
    hold_together(out, "chk-320 lora-320 lora-LATEST", "chk-LATEST")
    for order in (files, files[::-1]):
        run(order, out, way, force=True)
        assert (out / "base-chk-LATEST.gguf").read_bytes() != (out / "base-chk-320.gguf").read_bytes()
        hold_together(out, "chk-320 lora-320 lora-LATEST", "chk-LATEST")


@pytest.mark.parametrize(
    "what", ["missing", "cut short", "no GGUF", "the base", "merged", "other norms", "older than the base", "right"]
)
def test_a_copy_is_known_by_its_keys_and_norms(what: str, tmp_path: Path) -> None:
    """It may have been changed since it was made, and so may the source have been."""
    source, path = trained(tmp_path / "a.ggcl"), tmp_path / "base-a.gguf"
    base = tmp_path / "base.gguf"
    base.write_bytes(BASE.read_bytes())
    ggcl_fast.convert(source, tmp_path / "a.gguf", to="adapter", base=base)
    if what == "missing":
        path.unlink()
    elif what in ("cut short", "no GGUF"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] if what == "cut short" else data[1:])
    elif what == "the base":
        path.write_bytes(base.read_bytes())
    elif what == "merged":
        ggcl_fast.convert(source, path, to="merged", base=base, force=True)
    elif what == "other norms":
        other = trained(tmp_path / "b.ggcl", 0.5)
        ggcl_fast.convert(other, tmp_path / "b.gguf", to="adapter", base=base, base_out=path, force=True)
    elif what == "older than the base":
        time.sleep(0.02)
        base.write_bytes(BASE.read_bytes())
    report = conversion.run(source, tmp_path / "out.gguf", Options(to="adapter", base=base), copied=path)
    own = tmp_path / "base-out.gguf"
    assert report.extra_outputs == (str(own),)
    assert (path.exists() and own.samefile(path)) == (what == "right")
    assert ("two names of one file" in report.notes[-1]) == (what == "right")
    ggcl_fast.convert(source, tmp_path / "alone" / "out.gguf", to="adapter", base=base, parents=True)
    whole = (tmp_path / "alone" / "base-out.gguf").read_bytes()
    assert own.read_bytes()[-100_000:] == whole[-100_000:]


@pytest.mark.parametrize("call", ["link", "rename", "open"])
def test_where_links_cannot_be_all_is_written(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(os, call)
    (tmp_path / "out").mkdir()

    def fails(one: Any, *more: Any, **options: Any) -> Any:
        if "base-a.gguf" in str(one) or (call == "rename" and "base-b" in str(more[0])):
            raise OSError(errno.EPERM, "no links here")
        return real(one, *more, **options)

    run([trained(tmp_path / "a.ggcl")], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        copied = tmp_path / "out" / "base-a.gguf"
        options = Options(to="adapter", base=BASE)
        report = conversion.run(trained(tmp_path / "b.ggcl"), tmp_path / "out" / "b.gguf", options, copied=copied)
    assert not any("one file" in note for note in report.notes)
    hold_together(tmp_path / "out", "a", "b")
    assert len(os.listdir(tmp_path / "out")) == 4 + (call == "rename")  # a second name that the next run removes
    run([tmp_path / "b.ggcl"], tmp_path / "out", force=True)
    assert len(os.listdir(tmp_path / "out")) == 4


def test_a_copy_that_a_rival_replaces_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, alone = folders(tmp_path, "out", "alone")
    run([trained(tmp_path / "a.ggcl")], out)
    real = copies.look_at_copy

    def then_replaced(*args: Any) -> object:
        seen = real(*args)
        run([trained(tmp_path / "a.ggcl", 0.5)], out, force=True)
        return seen

    monkeypatch.setattr(copies, "look_at_copy", then_replaced)
    options = Options(to="adapter", base=BASE)
    conversion.run(trained(tmp_path / "b.ggcl"), out / "b.gguf", options, copied=out / "base-a.gguf")
    run([tmp_path / "b.ggcl"], alone)
    hold_together(out, "a", "b")
    assert (out / "base-b.gguf").read_bytes() == (alone / "base-b.gguf").read_bytes()


def fail(_: object) -> None:
    raise OSError(errno.EIO, "no more")


def test_a_failure_gives_nothing_but_the_own_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    run([trained(tmp_path / "a.ggcl")], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(OutputFile, "sync", fail)
    copied = tmp_path / "out" / "base-a.gguf"
    with pytest.raises(OSError, match="no more"):
        conversion.run(
            trained(tmp_path / "b.ggcl"), tmp_path / "out" / "b.gguf", Options(to="adapter", base=BASE), copied=copied
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_copy_stays_beside_its_adapters(tmp_path: Path) -> None:
    sources = [trained(tmp_path / f"{name}.ggcl") for name in "abcd"]
    jobs = [(source, tmp_path / folder / f"{source.stem}.gguf") for source, folder in zip(sources, "1122")]
    results = list(convert_many(jobs, workers=1, to="adapter", base=BASE, parents=True))
    assert {result.status for result in results} == {"converted"}
    hold_together(tmp_path / "1", "a b")
    hold_together(tmp_path / "2", "c d")
    assert not (tmp_path / "1" / "base-a.gguf").samefile(tmp_path / "2" / "base-c.gguf")


def test_every_adapter_tells_what_is_wrong_with_the_norms(tmp_path: Path) -> None:
    sources = [trained(tmp_path / f"{name}.ggcl", math.nan) for name in "ab"]
    (tmp_path / "out").mkdir()
    reports = [result.report for result in run(sources, tmp_path / "out").values()]
    hold_together(tmp_path / "out", "a b")
    warnings = [report.warnings for report in reports if report is not None]
    assert warnings[0] == warnings[1]
    assert "NaN" in warnings[0][0]


@pytest.mark.parametrize("way", WAYS)
def test_who_waits_is_in_the_window_too(way: str, tmp_path: Path) -> None:
    """Jobs may come from somebody who goes on only as results come."""
    (tmp_path / "out").mkdir()
    room = threading.Semaphore(4)

    def jobs() -> Iterator[tuple[Path, Path]]:
        for i in range(12):
            assert room.acquire(timeout=20)
            yield trained(tmp_path / f"{i}.ggcl", i // 8), tmp_path / "out" / f"{i}.gguf"

    workers, make = WAYS[way]
    with make() or contextlib.nullcontext() as executor:
        for result in convert_many(
            jobs(), workers=workers, executor=executor, window=4, chunk=1, to="adapter", base=BASE
        ):
            assert result.status == "converted"
            room.release()
    hold_together(tmp_path / "out", " ".join(map(str, range(8))), " ".join(map(str, range(8, 12))))


DEADLY = """
import os, sys, ggcl_fast
import ggcl_fast.batch.pool as pool
one = pool.Work.one
def deadly(self, job, progress):
    if job.source.endswith("a.ggcl"):
        os._exit(7)
    return one(self, job, progress)
pool.Work.one = deadly
if __name__ == "__main__":
    base, source, out = sys.argv[1:]
    jobs = [(f"{source}/{name}.ggcl", f"{out}/{name}.gguf") for name in "abcd"]
    for result in ggcl_fast.convert_many(jobs, workers=2, chunk=1, to="adapter", base=base):
        print(result.job.source[-6:], result.status)
"""


def test_where_one_kills_its_worker_the_others_are_done(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DEADLY)
    (tmp_path / "out").mkdir()
    for name in "abcd":
        trained(tmp_path / f"{name}.ggcl")
    command = [sys.executable, str(tmp_path / "script.py"), str(BASE), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["a.ggcl failed", *(f"{name}.ggcl converted" for name in "bcd")]
    hold_together(tmp_path / "out", "b c d")
    assert len(os.listdir(tmp_path / "out")) == 6


def test_the_command_says_that_it_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    files = list(map(str, of_one_training(sources)))
    assert main(["--to", "adapter", "--base", str(BASE), *files, f"{tmp_path}/out/"]) == 0
    assert capsys.readouterr().err.count(" are two names of one file") == 3
    hold_together(tmp_path / "out", "chk-320 chk-LATEST lora-320 lora-LATEST")
