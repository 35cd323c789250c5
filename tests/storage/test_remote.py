"""Object stores: a real S3 endpoint on loopback, and fsspec's own memory."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import SourceChangedError, TruncatedError
from ggcl_fast.commands import info
from ggcl_fast.commands.convert import main
from ggcl_fast.storage.outputs import Outputs
from ggcl_fast.storage.remote import SourceRemote
from ggcl_fast.storage.uploads import OutputRemote
from ggcl_fast.storage.urls import public_name
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..mutations import GGCL
from ..reference import DATA

fsspec = pytest.importorskip("fsspec", reason="needs the remote extra")
pytest.importorskip("s3fs", reason="needs the remote extra")
moto = pytest.importorskip("moto.server", reason="needs moto, of the dev extra")

LARGE = Shape(n_layer=20, n_embd=64, n_vocab=90_000, n_ff=250)  # 13 MB: streamed, and n_ff is not the written one


@pytest.fixture(scope="module")
def large() -> bytes:
    return checkpoint_bytes(LARGE)


@pytest.fixture(scope="module")
def large_whole(large: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "out.gguf"
    with ggcl_fast.open_checkpoint(large) as checkpoint:
        ggcl_fast.convert(checkpoint, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    yield f"http://{host}:{port}"
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    """A file system and the name of a fresh bucket."""
    assert endpoint
    fs = fsspec.filesystem("s3")
    name = f"bucket{abs(hash(request.node.name)) % 10**9}"
    fs.mkdir(name)
    yield fs, name
    fs.rm(name, recursive=True)


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of botocore and moto among themselves
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_a_small_object_becomes_an_object(bucket: tuple[Any, str], tmp_path: Path) -> None:
    fs, name = bucket
    fs.pipe(f"{name}/in.ggcl", (DATA / "adam.ggcl").read_bytes())
    report = ggcl_fast.convert(f"s3://{name}/in.ggcl", f"s3://{name}/deep/out.gguf")
    assert (report.source, report.target) == (f"s3://{name}/in.ggcl", f"s3://{name}/deep/out.gguf")
    ggcl_fast.convert(DATA / "adam.ggcl", tmp_path / "local.gguf")
    assert fs.cat(f"{name}/deep/out.gguf") == (tmp_path / "local.gguf").read_bytes()


def test_a_large_object_is_streamed_both_ways(
    bucket: tuple[Any, str], large: bytes, large_whole: bytes, tmp_path: Path
) -> None:
    fs, name = bucket
    fs.pipe(f"{name}/in.ggcl", large)
    ggcl_fast.convert(f"s3://{name}/in.ggcl", f"s3://{name}/out.gguf")
    assert fs.cat(f"{name}/out.gguf") == large_whole
    ggcl_fast.convert(f"s3://{name}/in.ggcl", tmp_path / "down.gguf")
    assert (tmp_path / "down.gguf").read_bytes() == large_whole
    (tmp_path / "up.ggcl").write_bytes(large)
    ggcl_fast.convert(tmp_path / "up.ggcl", f"s3://{name}/up.gguf")
    assert fs.cat(f"{name}/up.gguf") == large_whole


def test_an_existing_object_needs_force(bucket: tuple[Any, str]) -> None:
    fs, name = bucket
    fs.pipe(f"{name}/out.gguf", b"precious")
    with pytest.raises(FileExistsError, match="--force"):
        ggcl_fast.convert(DATA / "adam.ggcl", f"s3://{name}/out.gguf")
    assert fs.cat(f"{name}/out.gguf") == b"precious"
    ggcl_fast.convert(DATA / "adam.ggcl", f"s3://{name}/out.gguf", force=True)
    assert fs.cat(f"{name}/out.gguf")[:4] == b"GGUF"


def uploads(fs: Any, name: str) -> list[Any]:
    found: list[Any] = fs.call_s3("list_multipart_uploads", Bucket=name).get("Uploads", [])
    return found


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_failed_upload_leaves_no_object(
    stop: type[BaseException], bucket: tuple[Any, str], large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, name = bucket
    fs.pipe(f"{name}/old.gguf", b"precious")
    monkeypatch.setattr("ggcl_fast.storage.uploads._PART", 5 << 20)
    n_moved = 0

    def progress(nbytes: int) -> None:
        nonlocal n_moved
        n_moved += nbytes
        if n_moved > 7 << 20:
            assert uploads(fs, name)
            raise stop

    with ggcl_fast.open_checkpoint(large) as checkpoint:
        checkpoint.source.memory, memory = None, checkpoint.source.memory  # as if it were read in blocks
        monkeypatch.setattr(checkpoint.source, "map", lambda: memory)
        for target in ("new.gguf", "old.gguf"):
            n_moved = 0
            with pytest.raises(stop):
                ggcl_fast.convert(checkpoint, f"s3://{name}/{target}", force=True, progress=progress)
    fs.invalidate_cache()
    assert fs.ls(name, detail=False) == [f"{name}/old.gguf"]
    assert fs.cat(f"{name}/old.gguf") == b"precious"
    assert uploads(fs, name) == []


def test_a_truncated_object_gives_the_usual_error(bucket: tuple[Any, str], large: bytes) -> None:
    fs, name = bucket
    for data in (GGCL[0][:-1], large[:-1]):
        fs.pipe(f"{name}/in.ggcl", data)
        with pytest.raises(TruncatedError, match="the file's end fits no optimizer") as caught:
            ggcl_fast.convert(f"s3://{name}/in.ggcl", f"s3://{name}/out.gguf")
        assert caught.value.source == f"s3://{name}/in.ggcl"
    assert not fs.exists(f"{name}/out.gguf")


def test_an_object_that_changes_is_an_error(bucket: tuple[Any, str], large: bytes) -> None:
    fs, name = bucket
    fs.pipe(f"{name}/in.ggcl", large)
    with ggcl_fast.open_checkpoint(f"s3://{name}/in.ggcl") as checkpoint:
        fs.pipe(f"{name}/in.ggcl", large[:-4] + b"else")
        with pytest.raises(SourceChangedError):
            ggcl_fast.convert(checkpoint, f"s3://{name}/out.gguf")
    assert not fs.exists(f"{name}/out.gguf")


def test_missing_objects_and_stores_are_os_errors(bucket: tuple[Any, str]) -> None:
    _, name = bucket
    for source in (f"s3://{name}/missing.ggcl", "s3://no-such-bucket/x", "memory://missing"):
        with pytest.raises(FileNotFoundError, match="No such file"):
            ggcl_fast.convert(source, f"s3://{name}/out.gguf")
    with pytest.raises(OSError, match="no-such-bucket"):
        ggcl_fast.convert(DATA / "adam.ggcl", "s3://no-such-bucket/out.gguf")
    with pytest.raises(OSError, match="Protocol not known"):
        ggcl_fast.convert("nosuch://x/y", "memory://out")


def test_a_folder_of_objects_becomes_one(bucket: tuple[Any, str], capsys: pytest.CaptureFixture[str]) -> None:
    fs, name = bucket
    for key in ("in/a.ggcl", "in/deep/b.bin"):
        fs.pipe(f"{name}/{key}", GGCL[0])
    fs.pipe(f"{name}/in/notes.txt", b"no")
    command = [f"s3://{name}/in/", f"s3://{name}/out/", "--recursive", "--jobs", "1"]
    assert main(command) == 0
    assert sorted(fs.find(f"{name}/out")) == [f"{name}/out/a.gguf", f"{name}/out/deep/b.gguf"]
    assert main([*command, "--skip-existing"]) == 0
    assert "0 converted, 2 skipped, 1 other files passed over" in capsys.readouterr().err


def test_records_are_read_with_few_requests(large: bytes, large_whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """366 records in 13 MB: requests are counted that wait for each other, and bytes that come for nothing."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/in.ggcl", large)
    n_requests = n_bytes = 0
    real_cat, real_ranges = type(memory).cat_file, type(memory).cat_ranges

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        nonlocal n_requests, n_bytes
        n_requests += 1
        n_bytes += (end or 0) - (start or 0)
        return real_cat(self, path, start=start, end=end, **options)

    def cat_ranges(self: Any, paths: Any, starts: Any, ends: Any, **options: Any) -> Any:
        nonlocal n_requests
        before = n_requests
        found = real_ranges(self, paths, starts, ends, **options)
        n_requests = before + 1  # they go out together
        return found

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    monkeypatch.setattr(type(memory), "cat_ranges", cat_ranges)
    with ggcl_fast.open_checkpoint("memory://in.ggcl") as checkpoint:
        assert len(checkpoint.names) == 368
        assert checkpoint.parameters.n_ff == 250
        assert n_requests <= 8
        assert n_bytes < len(large) / 2
        ggcl_fast.convert(checkpoint, "memory://out.gguf", force=True)
        a = checkpoint.tensors["blk.3.ffn_up.weight.lora_b"]
    assert memory.cat("/out.gguf") == large_whole
    with ggcl_fast.open_checkpoint(large) as local:
        assert (local.tensors["blk.3.ffn_up.weight.lora_b"] == a).all()


def test_a_file_that_is_not_as_expected_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of another length put every record elsewhere than it is looked for."""
    monkeypatch.setattr("ggcl_fast.storage.remote.SMALL", 0)
    data = bytearray(GGCL[0])
    data[96:100] = (60).to_bytes(4, "little")  # the first name's length, and all behind it by 32 bytes
    moved = bytes(data[:160]) + bytes(32) + bytes(data[160:])
    fsspec.filesystem("memory").pipe("/odd.ggcl", moved)
    with ggcl_fast.open_checkpoint("memory://odd.ggcl") as remote, ggcl_fast.open_checkpoint(moved) as local:
        assert remote.table.tobytes() == local.table.tobytes()
        assert len(remote.warnings) == 1


def test_credentials_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_name("https://user:secret@host/a/b.ggcl?sig=secret#frag") == "https://host/a/b.ggcl"
    assert public_name("s3://bucket/key") == "s3://bucket/key"
    for url in ("http://user:secret@127.0.0.1:9/x.ggcl?X-Signature=hidden", "s3://key:secret@bucket/x"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"127\.0\.0\.1|bucket") as caught:
            ggcl_fast.open_checkpoint(url)
        said = str(caught.value) + repr(caught.value.args) + str(caught.value.__cause__)
        assert "secret" not in said
        assert "hidden" not in said


class Ranges(http.server.BaseHTTPRequestHandler):
    """The least of a web server that answers ranged requests."""

    content = GGCL[1] + b""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        start, stop = 0, len(self.content)
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.content)}")
        self.end_headers()
        if body:
            self.wfile.write(self.content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


def test_https_is_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggcl_fast.storage.remote.SMALL", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/in.ggcl"
        ggcl_fast.convert(url, tmp_path / "out.gguf")
        server.shutdown()
    with ggcl_fast.open_checkpoint(Ranges.content) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "local.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_stores_without_unfinished_files_get_a_temporary_name(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.delattr("fsspec.implementations.memory.MemoryFile.commit")
    monkeypatch.setattr(
        type(memory), "_open", lambda fs, path, mode="rb", **_: _Plain(fs, path) if "r" not in mode else None
    )  # fmt: skip
    output = OutputRemote("memory://out")
    with pytest.raises(ValueError, match="stop"), Outputs([output]):
        output.writev([b"half"])
        raise ValueError("stop")
    assert list(memory.store) == []
    output = OutputRemote("memory://out")
    with Outputs([output]):
        output.writev([b"who", memoryview(b"le")])
    assert {name: file.getvalue() for name, file in memory.store.items()} == {"/out": b"whole"}


class _Plain:
    """A file that is there as soon as it is opened."""

    def __init__(self, fs: Any, path: str) -> None:
        from fsspec.implementations.memory import MemoryFile

        self._file = fs.store[path] = MemoryFile(fs, path)

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def close(self) -> None:
        pass


def test_what_fsspec_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(OSError, match=r"pip install 'fsspec\[http\]'"):
        SourceRemote("s3://bucket/x")


def test_adapters_go_to_stores_and_what_comes_in_pieces_does_not() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("trained.ggla", "base.gguf"):
        memory.pipe(f"/{name}", (DATA / name).read_bytes())
    report = ggcl_fast.convert("memory://trained.ggla", "memory://lora.gguf", to="adapter")
    assert memory.cat("/lora.gguf")[:4] == b"GGUF"
    assert (report.to, report.target_bytes) == ("adapter", memory.size("/lora.gguf"))
    ggcl_fast.convert("memory://trained.ggla", "memory://merged.gguf", to="merged", base="memory://base.gguf")
    assert memory.size("/merged.gguf") > memory.size("/base.gguf")
    before = set(memory.store)
    for target, to in (("memory://other.gguf", "adapter"), ("memory://folder", "peft")):
        with pytest.raises(OSError, match="files on a local disk"):
            ggcl_fast.convert(DATA / "trained.ggcl", target, to=to, base=DATA / "base.gguf")
    assert set(memory.store) == before


def test_what_is_inside_objects_can_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    fsspec.filesystem("memory").pipe("/trained.ggcl", (DATA / "trained.ggcl").read_bytes())
    assert info.main(["memory://trained.ggcl", "--no-tensors"]) == 0
    assert "healthy" in capsys.readouterr().out
