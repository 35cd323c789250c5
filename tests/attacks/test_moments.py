"""Others at the same place at the same time, and executors that go; see also tests/test_failures.py."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import Job, convert_many
from ggcl_fast.commands.convert import main

from ..mutations import GGCL
from ..reference import DATA


def _convert_often(target: Path, results: "multiprocessing.Queue[Counter[str]]") -> None:
    said: Counter[str] = Counter()
    for _ in range(40):
        try:
            ggcl_fast.convert(DATA / "trained.ggcl", target, to="peft", force=True)
            said["done"] += 1
        except Exception as error:
            said[repr(error)] += 1
    results.put(said)


def test_converters_to_one_folder_at_once(tmp_path: Path) -> None:
    """Every one succeeds, the folder is whole at any moment, and nothing else is left."""
    context = multiprocessing.get_context("fork")
    target, results = tmp_path / "folder", context.Queue()
    ggcl_fast.convert(DATA / "trained.ggcl", target, to="peft")
    whole = {name: (target / name).read_bytes() for name in os.listdir(target)}
    processes = [context.Process(target=_convert_often, args=(target, results)) for _ in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and results.qsize() < len(processes):
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)  # it is there at any time
        os.close(fd)
    said = sum((results.get() for _ in processes), Counter[str]())
    for process in processes:
        process.join()
    assert said == {"done": 160}
    assert {name: (target / name).read_bytes() for name in os.listdir(target)} == whole
    assert os.listdir(tmp_path) == ["folder"]


class _Forgets(ThreadPoolExecutor):
    """Gives up by itself what it had to do, as one does that has lost its scheduler."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


class _Closed(ThreadPoolExecutor):
    """Takes nothing any more."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        raise RuntimeError("cannot schedule new futures after shutdown")


class _Client:
    status = "closed"


class _Silent(ThreadPoolExecutor):
    """Has futures of which nothing more is heard, and a client that is closed."""

    _client = _Client()

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        return Future()


@pytest.mark.parametrize("kind", [_Forgets, _Closed, _Silent])
def test_an_executor_that_is_lost_is_an_error_and_no_silence(kind: Callable[[], Executor], tmp_path: Path) -> None:
    jobs = [Job(DATA / "adam.ggcl", tmp_path / f"{i}.gguf") for i in range(20)]
    with kind() as executor, pytest.raises(BrokenExecutor, match="the executor "):
        list(convert_many(jobs, executor=executor))


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_what_fails_in_the_search_ends_a_run_that_is_to_fail_fast(
    n_jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "closed").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02}.ggcl").write_bytes(GGCL[2])
    scandir = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    command = [str(folder), str(tmp_path / "out"), "--recursive", "--jobs", n_jobs]
    assert main([*command, "--fail-fast"]) == 1
    assert "0 converted, 1 failed, 20 not begun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 1
    assert "20 converted, 1 failed" in capsys.readouterr().err
