"""A cluster: a scheduler and workers as processes of their own, one of which dies in the middle."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast import Job, TruncatedError, convert_many

from ..mutations import GGCL

distributed = pytest.importorskip("distributed", reason="needs the dask extra")

N_FILES = 200
BAD = {18, 90, 150}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dask and tornado among themselves
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """The address of a scheduler, and its two workers; the scheduler is behind them."""
    address = f"tcp://127.0.0.1:{_free_port()}"
    dask = [sys.executable, "-m", "dask"]
    log = (tmp_path / "cluster.log").open("wb")
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"],
        stdout=log, stderr=log,
    )  # fmt: skip
    workers = [
        subprocess.Popen(
            [*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
             "--local-directory", tmp_path],
            stdout=log, stderr=log,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, [*workers, scheduler]
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
        log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for i in range(N_FILES):
        data = GGCL[i % len(GGCL)]
        (folder / f"{i}.ggcl").write_bytes(data[:-5] if i in BAD else data)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local")
    for i in set(range(N_FILES)) - BAD:
        ggcl_fast.convert(folder / f"{i}.ggcl", out / f"{i}.gguf")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_good_file_is_converted_though_a_worker_dies(
    cluster: tuple[str, list["subprocess.Popen[bytes]"]], folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    address, workers = cluster
    out = tmp_path / "out"
    out.mkdir()
    jobs = [Job(str(folder / f"{i}.ggcl"), str(out / f"{i}.gguf")) for i in range(N_FILES)]
    with distributed.Client(address, set_as_default=False) as client:
        executor = client.get_executor(pure=False, retries=3)
        results = []
        for result in convert_many(jobs, executor=executor, force=True, window=60, chunk=2):
            results.append(result)
            if len(results) == 40:
                workers[0].send_signal(signal.SIGKILL)
    assert sorted(result.job for result in results) == sorted(jobs)
    failed = {int(Path(result.job.source).stem): result.error for result in results if result.status == "failed"}
    assert set(failed) == BAD
    assert all(type(error) is TruncatedError for error in failed.values())
    left = {name for name in contents(out) if name.endswith("-part")}  # of the worker that was killed, at most
    assert len(left) <= 1
    assert {name: data for name, data in contents(out).items() if name not in left} == expected


def test_the_command_hands_its_work_to_a_cluster(
    cluster: tuple[str, list["subprocess.Popen[bytes]"]], folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    address, workers = cluster
    command = [sys.executable, "-m", "ggcl_fast", "--dask", address, os.path.relpath(folder, tmp_path), "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/1*.gguf")):
            time.sleep(0.01)
        workers[1].kill()
        said, complained = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.count(": written, ") == N_FILES - len(BAD)
    assert sorted(line.split(": ")[2] for line in complained.splitlines() if "error: " in line) == sorted(
        str(folder / f"{i}.ggcl") for i in BAD
    )
    assert "197 converted, 3 failed" in complained
    assert {name: data for name, data in contents(tmp_path / "out").items() if name.endswith(".gguf")} == expected
    again = {"--skip-existing": "0 converted, 197 skipped, 3 failed", "--quiet": "out/0.gguf: The target exists"}
    for option, outcome in again.items():
        done = subprocess.run([*command, option], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert outcome in done.stderr


def test_no_such_cluster_is_one_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ggcl_fast", "--dask", f"tcp://127.0.0.1:{_free_port()}", str(folder), "out"]
    environment = {**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("ggcl-fast: error: ")
    assert "Traceback" not in done.stderr


def test_a_lost_scheduler_is_one_line_and_a_summary(
    cluster: tuple[str, list["subprocess.Popen[bytes]"]], folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    address, processes = cluster
    command = [sys.executable, "-m", "ggcl_fast", "--dask", address, str(folder), "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/1*.gguf")):
            time.sleep(0.01)
        processes[-1].kill()
        _, complained = process.communicate(timeout=120)
    assert process.returncode == 1, complained
    lost, summary = [line for line in complained.splitlines() if ".ggcl: " not in line]
    assert lost.startswith(f"ggcl-fast: error: {address}: the executor ")
    assert summary.endswith("; --skip-existing goes on from here")
    rest = [sys.executable, "-m", "ggcl_fast", str(folder), "out", "--skip-existing"]
    done = subprocess.run(rest, cwd=tmp_path, capture_output=True, text=True)
    assert f"{len(BAD)} failed" in done.stderr
    assert {name: data for name, data in contents(tmp_path / "out").items() if name.endswith(".gguf")} == expected


def test_a_lost_scheduler_is_an_error_of_the_library(
    cluster: tuple[str, list["subprocess.Popen[bytes]"]], folder: Path, tmp_path: Path
) -> None:
    address, processes = cluster
    jobs = [Job(str(folder / f"{i}.ggcl"), str(tmp_path / f"{i}.gguf")) for i in range(N_FILES)]
    with distributed.Client(address, set_as_default=False) as client:
        results = convert_many(jobs, executor=client.get_executor(pure=False), force=True, window=8, chunk=1)
        next(results)
        processes[-1].kill()
        with pytest.raises(BrokenExecutor, match="executor"):
            list(results)
