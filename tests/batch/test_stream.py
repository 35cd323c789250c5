"""Many files: every executor, one bad file among good ones, stops and restarts, and the command over folders."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import CheckpointError, Job, JobResult, TruncatedError, convert_many
from ggcl_fast.batch.pool import process_pool
from ggcl_fast.commands.convert import main
from ggcl_fast.storage import system
from ggcl_fast.targets.names import target_name
from ggcl_fast.targets.options import Options
from ggcl_fast.testing import SHAPE_7B, write_checkpoint

from ..mutations import GGCL
from ..reference import DATA

N_FILES = 24
BAD = (3, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several shapes, two bad ones among them."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(N_FILES):
        data = GGCL[i % len(GGCL)]
        (folder / f"{i}.ggcl").write_bytes(data[:-5] if i in BAD else data)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each becomes when it is converted alone."""
    out = tmp_path_factory.mktemp("alone")
    for i in range(N_FILES):
        if i not in BAD:
            ggcl_fast.convert(folder / f"{i}.ggcl", out / f"{i}.gguf")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def jobs(folder: Path, out: Path) -> list[Job]:
    return [Job(folder / f"{i}.ggcl", out / f"{i}.gguf") for i in range(N_FILES)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Immediately(Executor):
    """The least that an executor can be."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        work, arguments = pickle.loads(pickle.dumps((fn, args)))
        future.set_result(work(*arguments, **kwargs))
        return future


def _loky() -> Executor:
    loky = pytest.importorskip("loky")
    executor: Executor = loky.ProcessPoolExecutor(2)
    return executor


EXECUTORS: dict[str, Callable[[], Executor | None]] = {
    "made here": lambda: None,
    "processes": lambda: process_pool(2),
    "threads": lambda: ThreadPoolExecutor(3),
    "loky": _loky,
    "own": Immediately,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # loky's use of fork in a process with threads
@pytest.mark.parametrize("make", EXECUTORS.values(), ids=EXECUTORS)
def test_every_executor_gives_every_result_once(
    make: Callable[[], Executor | None], folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    executor = make()
    results = list(convert_many(jobs(folder, tmp_path), executor=executor, chunk=3, window=9))
    if executor is not None:
        executor.shutdown()
    assert sorted(result.job for result in results) == sorted(jobs(folder, tmp_path))
    failed = {Path(result.job.source).name: result.error for result in results if result.status == "failed"}
    assert {name: type(error) for name, error in failed.items()} == {f"{i}.ggcl": TruncatedError for i in BAD}
    assert all(isinstance(error, TruncatedError) and error.offset for error in failed.values())
    assert contents(tmp_path) == expected
    for result in results:
        assert (result.report is None) == (result.status == "failed")


MPI = """
import sys
from pathlib import Path
from mpi4py.futures import MPIPoolExecutor
import ggcl_fast
if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    jobs = [(path, out / f"{path.stem}.gguf") for path in folder.iterdir()]
    with MPIPoolExecutor() as executor:
        for result in ggcl_fast.convert_many(jobs, executor=executor, chunk=3, window=9):
            print(result.job.source.name, type(result.error).__name__)
"""


def test_mpi_is_an_executor_too(folder: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs mpi4py, of the dev extra")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("needs an MPI, such as mpich of the dev extra")
    (tmp_path / "script.py").write_text(MPI)
    out = tmp_path / "out"
    out.mkdir()
    command = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", str(tmp_path / "script.py"), folder, out]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=120)
    rows = dict(line.split() for line in done.stdout.splitlines())
    assert len(rows) == N_FILES
    assert {name for name, kind in rows.items() if kind == "TruncatedError"} == {f"{i}.ggcl" for i in BAD}
    assert contents(out) == expected


def test_jobs_are_taken_as_room_appears(folder: Path, tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[Job]:
        nonlocal taken
        while True:
            taken += 1
            yield Job(folder / "0.ggcl", tmp_path / f"{taken}.gguf")

    with ThreadPoolExecutor(2) as executor:
        results = convert_many(endless(), executor=executor, window=8, chunk=2)
        for n_results, _ in enumerate(results, 1):
            assert taken <= n_results + 8 + 2
            if n_results == 50:
                break
        results.close()  # type: ignore[attr-defined]
    assert taken < 70


def test_the_first_failure_can_be_raised(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(TruncatedError, match=r"3\.ggcl"):
        list(convert_many(jobs(folder, tmp_path), executor=executor, on_error="raise", chunk=1, window=2))
    assert len(list(tmp_path.iterdir())) < N_FILES


def test_wrong_arguments_are_told_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        list(convert_many(jobs(folder, tmp_path), no_such_option=1))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="on_error"):
        list(convert_many(jobs(folder, tmp_path), on_error="ignore"))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_options_go_to_every_conversion(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with ThreadPoolExecutor(2) as executor:
        for dry_run in (True, False):
            results = list(convert_many(jobs(folder, out), executor=executor, parents=True, dry_run=dry_run))
            assert Counter(result.status for result in results) == {"converted": N_FILES - 2, "failed": 2}
            assert out.exists() != dry_run
        again = list(convert_many(jobs(folder, out), executor=executor, skip_existing=True))
    assert Counter(result.status for result in again) == {"skipped": N_FILES - 2, "failed": 2}


def _die(*_: object) -> None:
    os._exit(7)


def test_a_broken_pool_of_the_callers_is_told_with_every_job(folder: Path, tmp_path: Path) -> None:
    with process_pool(1) as pool:
        with pytest.raises(BrokenExecutor):
            pool.submit(_die).result()
        results = list(convert_many(jobs(folder, tmp_path), executor=pool))
    assert all(isinstance(result.error, BrokenExecutor) for result in results)
    assert len(results) == N_FILES


KILLED = """
import os, sys, time, ggcl_fast, multiprocessing, signal
from ggcl_fast import Job
def jobs():
    for i in range(40):
        if i == 20:  # by now the pool is at work
            multiprocessing.active_children()[0].kill()
        yield Job(sys.argv[1], f"{sys.argv[2]}/{i}.gguf")
if __name__ == "__main__":
    results = list(ggcl_fast.convert_many(jobs(), workers=2, window=8, chunk=1))
    print(len(results), sum(r.status == "failed" for r in results))
    assert all("terminated abruptly" in str(r.error) for r in results if r.error)
"""


@pytest.mark.parametrize("n_workers", [1, 3])
def test_workers_share_the_processors(n_workers: int) -> None:
    """Or each of many that merge would have as many threads as there are processors, and room for each."""
    with process_pool(n_workers) as pool:
        assert pool.submit(system.n_cpus).result() == max(1, system.n_cpus() // n_workers)
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == os.getenv("OPENBLAS_NUM_THREADS", "1")


def test_a_pool_that_breaks_is_replaced(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(script), str(DATA / "adam.ggcl"), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    n_results, n_failed = map(int, done.stdout.split())
    assert n_results == 40
    assert n_failed == 0
    whole = [path for path in out.iterdir() if path.name.endswith(".gguf")]
    assert len([path for path in whole if path.stat().st_size == 96960]) == len(whole) == 40


KILLER = """
import os, sys, time, ggcl_fast
import ggcl_fast.batch.pool as pool
one = pool.Work.one
def deadly(self, job, progress):
    if job.source.endswith("13.ggcl"):
        progress(300)  # of what is done again, and again
        time.sleep(0.15)
        progress(300)
        os._exit(7)
    return one(self, job, progress)
pool.Work.one = deadly
if __name__ == "__main__":
    jobs = [(f"{sys.argv[1]}/{i:02}.ggcl", f"{sys.argv[2]}/{i:02}.gguf") for i in range(40)]
    told = []
    for result in ggcl_fast.convert_many(jobs, workers=2, chunk=4, progress=told.append):
        print(result.job.source[-7:], result.status, type(result.error).__name__)
    assert min(told) > 0 and sum(told) == 40 * os.path.getsize(jobs[0][0]), told
"""


def test_a_job_that_kills_its_worker_fails_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for i in range(40):
        (tmp_path / f"{i:02}.ggcl").write_bytes(GGCL[2])
    (tmp_path / "script.py").write_text(KILLER)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    rows = sorted(done.stdout.splitlines())
    assert rows == [
        f"{i:02}.ggcl failed BrokenProcessPool" if i == 13 else f"{i:02}.ggcl converted NoneType" for i in range(40)
    ]
    assert len(os.listdir(out)) == 39


IDLE = """
import os, sys, ggcl_fast, multiprocessing, time
def jobs():
    for i in range(12):
        if i == 6:  # all before are done: the pool breaks while it has nothing in hand
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.5)
        yield sys.argv[1], f"{sys.argv[2]}/{i}.gguf"
if __name__ == "__main__":
    print(sum(r.status == "converted" for r in ggcl_fast.convert_many(jobs(), workers=2, window=1, chunk=1)))
"""


def test_a_pool_that_breaks_with_nothing_in_hand_loses_no_job(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IDLE)
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(tmp_path / "script.py"), str(DATA / "adam.ggcl"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) == len(os.listdir(tmp_path / "out")) == 12


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("a.ggcl", "a.gguf"),
        ("checkpoint-10.bin", "checkpoint-10.gguf"),
        ("checkpoint-LATEST", "checkpoint-LATEST.gguf"),
        ("model.v1", "model.v1.gguf"),
        ("A.BIN", "A.gguf"),
        (".ggcl", ".ggcl.gguf"),
        ("some/where/a.bin", "a.gguf"),
        ("https://host/a.bin?signature=x/y", "a.gguf"),
    ],
)
def test_targets_are_named_after_their_sources(name: str, becomes: str) -> None:
    assert target_name(name, Options()) == becomes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Checkpoints under any name, other files, and folders within folders."""
    tree = tmp_path / "in"
    (tree / "deep" / "deeper").mkdir(parents=True)
    for name in ("a.ggcl", "checkpoint-10.bin", "deep/b", "deep/deeper/a.ggcl"):
        (tree / name).write_bytes(GGCL[2])
    (tree / "bad.bin").write_bytes(GGCL[2][:-1])
    for name in ("notes.txt", "empty.ggcl", "deep/model.gguf"):
        (tree / name).write_bytes(b"" if "empty" in name else b"something else")
    return tree


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_a_folder_becomes_a_folder(n_jobs: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(tree), str(out), "--jobs", n_jobs]) == 1
    captured = capsys.readouterr()
    assert below(out) == ["a.gguf", "checkpoint-10.gguf"]
    assert captured.out.count(": written, ") == 2
    assert f"error: {tree}/bad.bin: optimizer state" in captured.err
    assert "2 converted, 1 failed, 2 other files passed over" in captured.err
    (tree / "bad.bin").unlink()
    assert main([str(tree), str(out), "--recursive", "--skip-existing", "--jobs", n_jobs]) == 0
    assert below(out) == ["a.gguf", "checkpoint-10.gguf", "deep/b.gguf", "deep/deeper/a.gguf"]
    assert "2 converted, 2 skipped, 3 other files passed over" in capsys.readouterr().err


def test_several_files_go_into_a_folder(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    files = [str(tree / "a.ggcl"), str(tree / "checkpoint-10.bin"), str(tree / "notes.txt")]
    out.write_bytes(b"precious")
    assert main([*files, str(out)]) == 1
    assert capsys.readouterr().err == f"ggcl-fast: error: {out}: Not a folder\n"
    out.unlink()
    assert main([*files, str(out)]) == 1  # and makes it
    assert below(out) == ["a.gguf", "checkpoint-10.gguf"]
    assert "notes.txt: this is neither" in capsys.readouterr().err
    assert main(["-f", "-q", "--output", str(out), *files[:2]]) == 0
    assert capsys.readouterr() == ("", "")


def test_one_file_goes_into_a_folder_under_its_name(tree: Path, tmp_path: Path) -> None:
    assert main([str(tree / "checkpoint-10.bin"), str(tmp_path)]) == 0
    assert (tmp_path / "checkpoint-10.gguf").exists()
    assert main(["--skip-existing", str(tree / "checkpoint-10.bin"), str(tmp_path)]) == 0


def test_a_folder_may_be_converted_within_itself(tree: Path) -> None:
    (tree / "bad.bin").unlink()
    for _ in range(2):
        assert main([str(tree), str(tree / "deep"), "--recursive", "--force"]) == 0
    assert (tree / "deep" / "a.gguf").exists()


def test_two_sources_of_one_target_are_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "a.bin").write_bytes(GGCL[2])
    assert main([str(tree), str(tree.parent / "out")]) == 1
    assert f"It would become of both {tree}/a.bin and {tree}/a.ggcl" in capsys.readouterr().err
    assert not (tree.parent / "out").exists()


def test_a_folder_without_checkpoints_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "ggcl-fast: error: no checkpoints found, 1 other files passed over\n"


def test_fail_fast_stops_at_the_first(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(60):
        (tree / f"x{i}.ggcl").write_bytes(GGCL[2][:-1])
    assert main([str(tree), str(tmp_path / "out"), "--fail-fast", "--jobs", "1"]) == 1
    assert capsys.readouterr().err.count("error: ") == 1


def test_json_lines_tell_everything(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tree), str(tmp_path / "out"), "--json"]) == 1
    rows = {Path(row["source"]).name: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.ggcl": "converted", "bad.bin": "failed", "checkpoint-10.bin": "converted",
    }  # fmt: skip
    assert rows["bad.bin"]["error"]["type"] == "TruncatedError"
    assert rows["a.ggcl"]["target_bytes"] == (tmp_path / "out" / "a.gguf").stat().st_size


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_batch_leaves_whole_files_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    tree, out = tmp_path / "in", tmp_path / "out"
    tree.mkdir()
    with (tree / "0.ggcl").open("wb") as file:
        write_checkpoint(file, SHAPE_7B)
    for i in range(1, 16):
        os.link(tree / "0.ggcl", tree / f"{i}.ggcl")
    command = [sys.executable, "-m", "ggcl_fast", "--skip-existing", "--jobs", "2", str(tree), str(out)]
    rng = random.Random(number)
    size = 0
    for _ in range(2):
        before = len(list(out.glob("*.gguf"))) if out.exists() else 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None and (not out.exists() or len(list(out.glob("*.gguf"))) < before + 2):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(number)
            said = process.stderr.read().decode() if process.stderr else ""
        if number != signal.SIGKILL:
            assert process.returncode in (0, 128 + number)
            assert [path.name for path in out.iterdir() if not path.name.endswith(".gguf")] == []
            assert "converted" in said
            assert "Traceback" not in said
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert sorted(path.name for path in out.glob("*.gguf")) == sorted(f"{i}.gguf" for i in range(16))
    size = (out / "0.gguf").stat().st_size
    assert {path.stat().st_size for path in out.glob("*.gguf")} == {size}
    assert "skipped" in done.stderr


def test_results_and_jobs_survive_pickling() -> None:
    result = JobResult(Job("a", "b"), "failed", None, CheckpointError("bad", source="a", offset=4))
    again = pickle.loads(pickle.dumps(result))
    assert again[:3] == result[:3]
    assert str(again.error) == str(result.error)


# --- what holds for all jobs together -------------------------------------------------------------------------------


def test_arguments_are_checked_when_it_is_called(folder: Path, tmp_path: Path) -> None:
    for options, error in (
        ({"no_such_option": 1}, TypeError), ({"to": "peft", "outtype": "bf16"}, ValueError),
        ({"to": "merged"}, ValueError), ({"base_out": "x"}, ValueError), ({"on_error": "ignore"}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            convert_many(jobs(folder, tmp_path), **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_never_takes_what_is_another_jobs(workers: int, tmp_path: Path) -> None:
    """The copy of the base model that one job writes is called as the adapter of the other."""
    for name in ("a", "base-a"):
        shutil.copy(DATA / "trained.ggcl", tmp_path / f"{name}.ggcl")
    shutil.copy(DATA / "base.gguf", tmp_path / "base.gguf")
    out = tmp_path / "out"
    todo = [Job(tmp_path / f"{name}.ggcl", out / f"{name}.gguf") for name in ("a", "base-a")]
    results = list(convert_many(todo, workers=workers, to="adapter", base=tmp_path / "base.gguf", parents=True))
    assert {str(result.error).rpartition(": ")[0] for result in results if result.error} == {
        "[Errno 22] The target is what another job of this run writes"
    }
    assert (out / "base-a.gguf").stat().st_size > (tmp_path / "base.gguf").stat().st_size
    todo = [Job(tmp_path / "a.ggcl", tmp_path / "base-a.ggcl"), Job(tmp_path / "base-a.ggcl", tmp_path / "x.gguf")]
    before = (tmp_path / "base-a.ggcl").read_bytes()
    results = list(convert_many(todo, workers=workers, force=True))
    assert Counter(result.status for result in results) == {"failed": 1, "converted": 1}
    assert (tmp_path / "base-a.ggcl").read_bytes() == before


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_fail_fast_counts_what_is_done(n_jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "in"
    tree.mkdir()
    for i in range(40):
        (tree / f"{i:02}.ggcl").write_bytes(GGCL[2][:-1] if i == 20 else GGCL[2])
    assert main([str(tree), str(tmp_path / "out"), "--fail-fast", "--jobs", n_jobs]) == 1
    captured = capsys.readouterr()
    n_done = len(list((tmp_path / "out").iterdir()))
    assert f"{n_done} converted, 1 failed" in captured.err
    assert captured.out.count(": written, ") == n_done
    assert n_done >= 8
    if n_jobs == "1":
        assert n_done == 20


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_a_signal_stops_between_files_and_says_so(n_jobs: str, tmp_path: Path) -> None:
    tree, out = tmp_path / "in", tmp_path / "out"
    tree.mkdir()
    (tree / "0.ggcl").write_bytes(GGCL[0])
    for i in range(1, 4000):
        os.link(tree / "0.ggcl", tree / f"{i}.ggcl")
    command = [sys.executable, "-m", "ggcl_fast", "--jobs", n_jobs, str(tree), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        shown, said = process.stdout.read(), process.stderr.read() if process.stderr else ""
    assert process.returncode == 130
    lines = said.splitlines()
    assert lines[0] == "ggcl-fast: SIGINT: stops when the files in work are done; once more, and they are undone"
    n_done = len(list(out.iterdir()))
    assert 0 < n_done < 4000
    assert shown.count(": written, ") + 1 == n_done
    assert lines[-2].startswith(f"ggcl-fast: {n_done:,} converted, {4000 - n_done:,} not begun or undone")
    assert lines[-1] == "ggcl-fast: error: interrupted by SIGINT; no part of a file is left behind"


def test_names_in_a_listing_do_not_lead_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    memory = fsspec.filesystem("memory")
    names = ("a.ggcl", "../../escaped.ggcl", "/abs/x.ggcl", "b/../../c.ggcl", "d//e.ggcl", "./f.ggcl", "g\0.ggcl")
    for name in names:
        memory.store[f"/in/{name}"] = memory._open(f"/x{names.index(name)}", "wb", data=GGCL[2])
    monkeypatch.setattr("ggcl_fast.storage.stores.list_objects", lambda *_, **__: [(name, 1) for name in names])
    monkeypatch.setattr("ggcl_fast.storage.stores.first_bytes", lambda *_: GGCL[2][:4])
    monkeypatch.setattr("ggcl_fast.conversion.open_checkpoint", lambda *_, **__: ggcl_fast.open_checkpoint(GGCL[2]))
    out = tmp_path / "deep" / "out"
    assert main(["memory://in/", str(out), "--recursive", "--jobs", "1"]) == 1
    assert below(tmp_path) == ["deep/out/a.gguf"]
    assert capsys.readouterr().err.count("could lead out of the output folder") == len(names) - 1


def test_a_folder_or_file_that_cannot_be_read_is_one_failure(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "bad.bin").unlink()
    scandir, real_open = os.scandir, open

    def unreadable(path: str) -> Any:
        if str(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    def vanished(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith("checkpoint-10.bin"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real_open(path, *args, **options)

    monkeypatch.setattr(os, "scandir", unreadable)
    monkeypatch.setattr("builtins.open", vanished)
    assert main([str(tree), str(tmp_path / "out"), "--recursive", "--jobs", "1"]) == 1
    captured = capsys.readouterr()
    assert below(tmp_path / "out") == ["a.gguf", "deep/b.gguf"]
    assert "2 converted, 2 failed" in captured.err
    assert f"{tree}/deep/deeper: Permission denied" in captured.err


def test_what_is_missing_of_two_outputs_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is whole is left, with a copy of the base or without one where no norm was trained."""
    for name in ("trained.ggcl", "base.gguf", "wild/peft-qkv.ggla", "wild/peft-qkv-base.gguf"):
        (tmp_path / Path(name).name).write_bytes((DATA / name).read_bytes())
    trained = ["--to", "adapter", "--base", f"{tmp_path}/base.gguf", f"{tmp_path}/trained.ggcl", f"{tmp_path}/a.gguf"]
    again = [*trained, "--skip-existing", "--json"]
    assert main(trained) == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "a.gguf", tmp_path / "base-a.gguf")}

    def status(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 0
        return str(json.loads(capsys.readouterr().out)["status"])

    assert status(again) == "skipped"
    for path, data in whole.items():
        path.unlink()
        assert status(again) == "converted"
        assert path.read_bytes() == data
        assert status(again) == "skipped"
    base = f"{tmp_path}/peft-qkv-base.gguf"
    others = ["--to", "adapter", "--base", base, f"{tmp_path}/peft-qkv.ggla", f"{tmp_path}/b.gguf", "--skip-existing"]
    assert status([*others, "--json"]) == "converted"
    assert status([*others, "--json"]) == "skipped"
    merged = ["--to", "merged", "--base", f"{tmp_path}/base-a.gguf", f"{tmp_path}/trained.ggcl", f"{tmp_path}/c.gguf"]
    assert main(merged) == 1
    assert "same training already" in capsys.readouterr().err
