"""The copy of a base model that several jobs would write alike: written once, and every adapter says which it is."""

import contextlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import JobResult, convert_many
from ggcl_fast.commands.convert import main
from ggcl_fast.targets.base_model import BaseModel
from ggcl_fast.targets.copies import copy_fingerprint

from ..reference import DATA

BASE = DATA / "base.gguf"
WAYS: dict[str, tuple[int | None, Callable[[], Executor | None]]] = {
    "here": (1, lambda: None), "pool": (2, lambda: None), "threads": (None, lambda: ThreadPoolExecutor(3)),
}  # fmt: skip


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


def note_of(result: JobResult) -> str:
    assert result.report is not None, result.error
    (note,) = (note for note in result.report.notes if "norm deltas" in note)
    return note


@pytest.mark.parametrize("way", WAYS)
def test_what_is_the_same_is_written_once(way: str, tmp_path: Path) -> None:
    sources, out, alone = tmp_path / "sources", tmp_path / "out", tmp_path / "alone"
    for folder in (sources, out, alone):
        folder.mkdir()
    same = of_one_training(sources)
    others = [trained(sources / "norms.ggcl", 0.5), trained(sources / "weights.ggcl", 0.5, norm=False)]
    results = run([*same, *others], out, way)
    ggcl_fast.convert(sources / "chk-320.ggcl", alone / "chk-320.gguf", to="adapter", base=BASE)
    first = "base-chk-320.gguf"
    names = {f"{source.stem}.gguf" for source in [*same, *others]}
    assert {path.name for path in out.iterdir()} == names | {first, "base-norms.gguf", "base-weights.gguf"}
    for name in (first, "chk-320.gguf"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert (out / first).read_bytes() != (out / "base-norms.gguf").read_bytes()
    for source in same:
        assert str(out / first) in note_of(results[source.stem])
        report = results[source.stem].report
        assert report is not None
        assert report.extra_outputs == ((str(out / first),) if source.stem == "chk-320" else ())
    for source in others:
        assert str(out / f"base-{source.stem}.gguf") in note_of(results[source.stem])


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
def test_where_one_fails_the_next_writes_its_own(way: str, tmp_path: Path) -> None:
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    out.mkdir()
    (out / "chk-320.gguf").write_bytes(b"somebody's")
    results = run(of_one_training(sources), out, way)
    assert {name for name, result in results.items() if result.status == "failed"} == {"chk-320"}
    made = {path.name for path in out.iterdir()} - {f"{name}.gguf" for name in results}
    assert made == {"base-chk-LATEST.gguf"}
    for name in ("chk-LATEST", "lora-320", "lora-LATEST"):
        assert str(out / "base-chk-LATEST.gguf") in note_of(results[name])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_there_is_left_and_what_is_missing_made_again(way: str, tmp_path: Path) -> None:
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    out.mkdir()
    files = of_one_training(sources)
    run(files, out, way)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}

    def again() -> dict[str, str]:
        results = run(files, out, way, skip_existing=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
        return {name: result.status for name, result in results.items()}

    assert set(again().values()) == {"skipped"}
    for name, job in (("base-chk-320.gguf", "chk-320"), ("lora-320.gguf", "lora-320"), ("chk-320.gguf", "chk-320")):
        (out / name).unlink()
        assert {of for of, status in again().items() if status == "converted"} == {job}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_whichever_file_it_was_that_wrote_the_copy(way: str, tmp_path: Path) -> None:
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    out.mkdir()
    files = of_one_training(sources)
    run(files, out, way)
    inodes = {path.name: path.stat().st_ino for path in out.iterdir()}
    for some in (files[1:], files[::-1], files[2:3]):
        assert {result.status for result in run(some, out, way, skip_existing=True).values()} == {"skipped"}
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == inodes


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_other_norms_is_not_taken(way: str, tmp_path: Path) -> None:
    """What is there under the right name may be of another training: of another day."""
    sources, out, alone = tmp_path / "sources", tmp_path / "out", tmp_path / "alone"
    for folder in (sources, out, alone):
        folder.mkdir()
    run([trained(sources / "a.ggcl")], out, way)
    old = (out / "base-a.gguf").read_bytes()
    for add, norm in ((0.5, True), (0.25, False)):
        files = [trained(sources / f"{name}.ggcl", add, norm=norm) for name in "abc"]
        results = run(files, out, way, skip_existing=True)
        assert {name: result.status for name, result in results.items()} == {
            "a": "skipped", "b": "converted", "c": "converted"
        }  # fmt: skip
        assert (out / "base-a.gguf").read_bytes() == old
        ggcl_fast.convert(files[1], alone / "b.gguf", to="adapter", base=BASE)
        for file in ("b.gguf", "base-b.gguf"):
            assert (out / file).read_bytes() == (alone / file).read_bytes()
        assert str(out / "base-b.gguf") in note_of(results["b"])
        assert str(out / "base-b.gguf") in note_of(results["c"])
        for path in (out / "b.gguf", out / "base-b.gguf", out / "c.gguf", alone / "b.gguf", alone / "base-b.gguf"):
            path.unlink()


@pytest.mark.parametrize("way", WAYS)
def test_an_old_copy_under_the_own_name_is_replaced_or_in_the_way(way: str, tmp_path: Path) -> None:
    """It would be loaded with the new adapter, by its name."""
    out = tmp_path / "out"
    out.mkdir()
    run([trained(tmp_path / "b.ggcl", 0.5)], out, way)
    old = (out / "base-b.gguf").read_bytes()
    (out / "b.gguf").unlink()
    files = [trained(tmp_path / f"{name}.ggcl") for name in "ab"]
    results = run(files, out, way)
    assert isinstance(results["b"].error, FileExistsError)
    assert (out / "base-b.gguf").read_bytes() == old
    results = run(files, out, way, force=True)
    assert str(out / "base-b.gguf") in note_of(results["b"])
    assert (out / "base-b.gguf").read_bytes() != old


@pytest.mark.parametrize(
    "what", ["missing", "cut short", "no GGUF", "the base", "merged", "other norms", "of another base", "right"]
)
def test_a_copy_is_known_by_its_keys_and_tensors(what: str, tmp_path: Path) -> None:
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
    elif what == "of another base":
        with BaseModel(base) as model:
            tensor = model.named("blk.1.ffn_up.weight")
        changed = bytearray(base.read_bytes())
        changed[tensor.offset + tensor.nbytes // 2] ^= 1
        base.write_bytes(changed)
    report = ggcl_fast.convert(source, tmp_path / "out.gguf", to="adapter", base=base)
    own = tmp_path / "base-out.gguf"
    assert report.extra_outputs == (() if what == "right" else (str(own),))
    assert own.exists() == (what != "right")
    assert str(path if what == "right" else own) in next(note for note in report.notes if "norm deltas" in note)
    assert (tmp_path / "out.gguf").read_bytes()[-1000:] == (tmp_path / "a.gguf").read_bytes()[-1000:]


def test_a_copy_stays_beside_its_adapters(tmp_path: Path) -> None:
    sources = [trained(tmp_path / f"{name}.ggcl") for name in "abcd"]
    jobs = [(source, tmp_path / folder / f"{source.stem}.gguf") for source, folder in zip(sources, "1122")]
    results = list(convert_many(jobs, workers=1, to="adapter", base=BASE, parents=True))
    assert {result.status for result in results} == {"converted"}
    assert sorted(os.listdir(tmp_path / "1")) == ["a.gguf", "b.gguf", "base-a.gguf"]
    assert sorted(os.listdir(tmp_path / "2")) == ["base-c.gguf", "c.gguf", "d.gguf"]


def test_every_adapter_tells_what_is_wrong_with_the_norms(tmp_path: Path) -> None:
    sources = [trained(tmp_path / f"{name}.ggcl", math.nan) for name in "ab"]
    (tmp_path / "out").mkdir()
    reports = [result.report for result in run(sources, tmp_path / "out").values()]
    assert len(os.listdir(tmp_path / "out")) == 3
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
            yield trained(tmp_path / f"{i}.ggcl"), tmp_path / "out" / f"{i}.gguf"

    workers, make = WAYS[way]
    with make() or contextlib.nullcontext() as executor:
        for result in convert_many(
            jobs(), workers=workers, executor=executor, window=4, chunk=1, to="adapter", base=BASE
        ):
            assert result.status == "converted"
            room.release()
    assert len(os.listdir(tmp_path / "out")) == 12 + 1


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
    assert sorted(os.listdir(tmp_path / "out")) == ["b.gguf", "base-b.gguf", "c.gguf", "d.gguf"]


def test_the_command_says_which_copy_an_adapter_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    files = list(map(str, of_one_training(sources)))
    assert main(["--to", "adapter", "--base", str(BASE), *files, f"{tmp_path}/out/"]) == 0
    told = capsys.readouterr().err
    assert told.count(f"the norm deltas are in {tmp_path}/out/base-chk-320.gguf: load the adapter upon that") == 4
