"""The copy of a base model that several jobs would write alike: written once, and every adapter says which it is."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import JobResult, conversion, convert_many
from ggcl_fast.batch import copies
from ggcl_fast.commands.convert import main
from ggcl_fast.targets.about import copy_fingerprint
from ggcl_fast.targets.options import Options

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
        for name in "bc":
            ggcl_fast.convert(sources / f"{name}.ggcl", alone / f"{name}.gguf", to="adapter", base=BASE)
            assert str(out / f"base-{name}.gguf") in note_of(results[name])
            for file in (f"{name}.gguf", f"base-{name}.gguf"):
                assert (out / file).read_bytes() == (alone / file).read_bytes()
                (out / file).unlink()
                (alone / file).unlink()


@pytest.mark.parametrize(
    "what", ["missing", "cut short", "no GGUF", "the base itself", "merged", "other norms", "right"]
)
def test_a_copy_is_known_by_its_keys_and_norms(what: str, tmp_path: Path) -> None:
    source = trained(tmp_path / "a.ggcl")
    ggcl_fast.convert(source, tmp_path / "a.gguf", to="adapter", base=BASE, base_out=tmp_path / "copy.gguf")
    path = tmp_path / "copy.gguf"
    if what == "missing":
        path.unlink()
    elif what in ("cut short", "no GGUF"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] if what == "cut short" else data[1:])
    elif what == "the base itself":
        path.write_bytes(BASE.read_bytes())
    elif what == "merged":
        ggcl_fast.convert(source, path, to="merged", base=BASE, force=True)
    elif what == "other norms":
        other = trained(tmp_path / "b.ggcl", 0.5)
        ggcl_fast.convert(other, tmp_path / "b.gguf", to="adapter", base=BASE, base_out=path, force=True)
    report = conversion.run(source, tmp_path / "out.gguf", Options(to="adapter", base=BASE), copied=path)
    own = str(tmp_path / "base-out.gguf")
    assert report.extra_outputs == (() if what == "right" else (own,))
    assert os.path.exists(own) == (what != "right")
    assert (tmp_path / "out.gguf").read_bytes()[-1000:] == (tmp_path / "a.gguf").read_bytes()[-1000:]


@pytest.mark.parametrize("way", WAYS)
def test_no_more_wait_than_there_is_room_for(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MOST", 2)
    sources = [trained(tmp_path / f"{i}.ggcl", i // 5) for i in range(15)]
    (tmp_path / "out").mkdir()
    results = run(sources, tmp_path / "out", way)
    assert {result.status for result in results.values()} == {"converted"}
    assert len(os.listdir(tmp_path / "out")) == 15 + 3


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
