"""What a web server says is told as what it is; see also tests/storage/test_remote.py."""

import errno
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import SourceChangedError
from ggcl_fast.commands.convert import main
from ggcl_fast.testing import Shape, checkpoint_bytes


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path asks for."""

    def do_HEAD(self) -> None:
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


class Replaced(Answers):
    """An object that becomes another one of the same size after some requests; only Last-Modified tells."""

    versions: tuple[bytes, bytes] = (b"", b"")
    after = 0
    n_requests = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        kind = type(self)
        kind.n_requests += 1
        which = kind.n_requests > kind.after
        data = kind.versions[which]
        start, stop = 0, len(data)
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        self.send_response(206 if asked else 200)
        for name, value in (
            ("Content-Length", stop - start), ("Accept-Ranges", "bytes"),
            ("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"),
            ("Last-Modified", f"Wed, 21 Oct 2015 07:28:0{int(which)} GMT"),
        ):  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[start:stop])


Serve = Callable[[type[http.server.BaseHTTPRequestHandler]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server and returns its address."""
    pytest.importorskip("fsspec", reason="needs the extra remote")
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(handler: type[http.server.BaseHTTPRequestHandler]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


STATUSES: dict[int, tuple[type[OSError], int | None]] = {
    401: (PermissionError, errno.EACCES), 403: (PermissionError, errno.EACCES), 404: (FileNotFoundError, errno.ENOENT),
    429: (OSError, None), 500: (OSError, None), 502: (OSError, None), 503: (OSError, None),
}  # fmt: skip


@pytest.mark.parametrize(("status", "expected"), STATUSES.items(), ids=map(str, STATUSES))
def test_a_status_is_told_as_what_it_is(
    status: int, expected: tuple[type[OSError], int | None], serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{serve(Answers)}{status}"
    with pytest.raises(OSError, match=url.replace(".", r"\.")) as caught:
        ggcl_fast.open_checkpoint(url)
    assert isinstance(caught.value, expected[0])
    assert isinstance(caught.value, FileNotFoundError) == (status == 404)
    if expected[1] is None:
        assert str(status) in str(caught.value)
    assert main([url, "out.gguf"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ggcl-fast: error: ")
    assert said.count("\n") == 1


def test_two_versions_of_an_object_are_never_mixed(serve: Serve, tmp_path: Path) -> None:
    shape = Shape(n_vocab=90_000)
    Replaced.versions = checkpoint_bytes(shape), checkpoint_bytes(shape, seed=9)
    whole = []
    for data in Replaced.versions:
        with ggcl_fast.open_checkpoint(data) as checkpoint:
            ggcl_fast.convert(checkpoint, tmp_path / "whole.gguf", force=True)
        whole.append((tmp_path / "whole.gguf").read_bytes())
    url, told = serve(Replaced), 0
    for after in range(14):
        Replaced.after, Replaced.n_requests = after, 0
        try:
            ggcl_fast.convert(f"{url}x", tmp_path / "out.gguf", force=True)
        except SourceChangedError:
            told += 1
        else:
            assert (tmp_path / "out.gguf").read_bytes() in whole
    assert told
