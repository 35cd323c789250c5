"""How far many jobs are: every byte of every source is told once, and within a file too."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import tqdm

from ggcl_fast import Job, JobResult, convert_many
from ggcl_fast.batch import progress
from ggcl_fast.batch.progress import Share, Tally, Teller, read_told
from ggcl_fast.commands.convert import main
from ggcl_fast.testing import Shape, write_checkpoint

from ..mutations import GGCL
from .test_stream import EXECUTORS


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Several files, of which one is no checkpoint and one is cut short."""
    paths = [tmp_path / f"{i}.ggcl" for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes({3: b"something else", 5: GGCL[0][:-5]}.get(i, GGCL[i % len(GGCL)]))
    return paths


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # loky's use of fork in a process with threads
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("make", [*EXECUTORS.values(), None], ids=[*EXECUTORS, "here"])
def test_every_byte_is_told_once(
    make: Callable[[], Executor | None] | None, force: bool, sources: list[Path], tmp_path: Path
) -> None:
    """Be it converted, skipped, refused beforehand, or failed."""
    executor = make() if make is not None else None
    out = [*(tmp_path / f"{i}.gguf" for i in range(8)), tmp_path / "0.gguf"]  # two of one name
    out[1].write_bytes(b"there")
    told: list[int] = []
    results = list(
        convert_many(
            [Job(*paths) for paths in zip(sources, out)],
            executor=executor,
            workers=1 if make is None else 2,
            chunk=2,
            skip_existing=True,
            force=force,
            progress=told.append,
        )
    )
    if executor is not None:
        executor.shutdown()
    assert {result.status for result in results} == {"converted", "failed", "skipped"}
    assert sum(told) == sum(path.stat().st_size for path in sources)
    assert min(told) > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_are_told_while_a_file_is_in_work(workers: int, tmp_path: Path) -> None:
    """The target is a pipe of which half is read, and the other half when that half was told."""
    source, pipe, told = tmp_path / "in.ggcl", tmp_path / "pipe", list[int]()
    with source.open("wb") as file:
        write_checkpoint(file, Shape(n_vocab=100_000))
    size, is_half_told, is_over = source.stat().st_size, threading.Event(), threading.Event()
    os.mkfifo(pipe)
    theirs = open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115

    def read() -> None:
        n, step = 0, 1 << 20
        while not is_over.wait(0.005 if n < size // 2 else 0):
            if n >= size // 2 and not is_half_told.wait(0.05):
                step = size // 100  # a worker tells when it does something
            n += len(theirs.read(step) or b"")

    def tell(nbytes: int) -> None:
        told.append(nbytes)
        if sum(told) >= size * 4 // 10:
            is_half_told.set()

    reader = threading.Thread(target=read)
    reader.start()
    [result] = convert_many([Job(source, pipe)], workers=workers, progress=tell)
    is_over.set()
    reader.join()
    theirs.close()
    assert result.error is None
    assert is_half_told.is_set()
    assert len(told) > 1
    assert sum(told) == size


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_the_bar_of_a_batch_moves_within_files_and_ends_full(
    n_jobs: str, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.updates: list[float] = []
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            self.updates.append(n or 0)
            return super().update(n)

    with (tmp_path / "large.ggcl").open("wb") as file:
        write_checkpoint(file, Shape(n_vocab=100_000))
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    wanted = [str(path) for path in (tmp_path / "large.ggcl", *sources)]
    assert main(["--progress", "-j", n_jobs, *wanted, str(tmp_path / "out")]) == 1
    assert bars[0].n == bars[0].total == sum(map(os.path.getsize, wanted))
    if n_jobs == "1":
        assert len(bars[0].updates) > len(wanted) + 5


def test_a_share_is_as_large_as_what_was_written(tmp_path: Path) -> None:
    told: list[int] = []
    (tmp_path / "in").write_bytes(bytes(1000))
    share = Share(tmp_path / "in", told.append)
    share.begin(50)
    for nbytes in (10, 15, 0, 25, 100):  # more than was said is all
        share(nbytes)
    assert told == [200, 300, 500]
    failed = JobResult(Job(tmp_path / "in", "out"), "failed", None, OSError())
    share.finish(failed)
    assert told == [200, 300, 500]
    Share(tmp_path / "in", told.append).finish(failed)
    assert told == [200, 300, 500, 1000]
    Share("https://somewhere/in", told.append).finish(failed._replace(job=Job("https://somewhere/in", "out")))
    assert told == [200, 300, 500, 1000]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [iter, list])
def test_jobs_that_cannot_be_are_failures_here_too(
    kind: Any, workers: int, sources: list[Path], tmp_path: Path
) -> None:
    told: list[int] = []
    jobs = [(None, "a"), (5, "b"), (["a"], "c"), (sources[0], tmp_path / "out")]
    results = list(convert_many(kind(jobs), workers=workers, progress=told.append))
    assert sorted(result.status for result in results) == ["converted", "failed", "failed", "failed"]
    assert sum(told) == sources[0].stat().st_size


@pytest.mark.parametrize("workers", [1, 2])
def test_what_progress_raises_ends_the_run(workers: int, sources: list[Path], tmp_path: Path) -> None:
    told: list[int] = []

    def tell(nbytes: int) -> None:
        told.append(nbytes)
        raise RuntimeError("nobody listens")

    jobs = [Job(source, tmp_path / f"{source.stem}.gguf") for source in sources]
    with pytest.raises(RuntimeError, match="nobody listens"):
        list(convert_many(jobs, workers=workers, progress=tell))
    assert len(told) == 1
    assert not [name for name in os.listdir(tmp_path) if "-part" in name]


@pytest.mark.parametrize("n_there", [0, 2, 3])
def test_the_bar_of_a_batch_of_objects_ends_full(
    n_there: int, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    bars: list[Any] = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    memory = fsspec.filesystem("memory")
    for i, source in enumerate(sources[:3]):
        memory.pipe(f"/bar-{n_there}/{i}.ggcl", source.read_bytes())
        if i < n_there:
            (tmp_path / f"{i}.gguf").write_bytes(b"there")
    assert main(["--progress", "-j1", "--skip-existing", f"memory://bar-{n_there}/", str(tmp_path)]) == 0
    assert bars[0].n == bars[0].total == sum(source.stat().st_size for source in sources[:3])


def test_what_is_lost_is_not_told_again() -> None:
    told: list[int] = []
    tally = Tally(told.append)
    tally.share(100)
    tally.lose()
    for _ in range(3):
        tally.share(50)
    assert told == [100, 50]


def test_a_full_pipe_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    theirs, ours = os.pipe()
    os.set_blocking(theirs, False)
    teller, n = Teller(ours), 100_000
    for _ in range(n):
        teller(1)
    first = read_told(theirs)
    teller(1)
    assert 0 < first < n
    assert first + read_told(theirs) == n + 1
    os.close(theirs)
    teller(1)  # nobody is there any more
    os.close(ours)
