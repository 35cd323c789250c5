"""Plain web servers, which give all of a file or nothing."""

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast.commands.convert import main
from ggcl_fast.storage.sources import SMALL
from ggcl_fast.testing import SHAPE_7B, write_checkpoint

from ..reference import DATA

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from ggcl_fast.storage import remote


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Counter[str]]]:
    """A folder with a small and a large checkpoint, its URL, and how often each was asked for by GET."""
    folder, asked = tmp_path / "served", Counter[str]()
    folder.mkdir()
    (folder / "small.ggcl").write_bytes((DATA / "trained.ggcl").read_bytes())
    with (folder / "large.ggcl").open("wb") as file:
        write_checkpoint(file, replace(SHAPE_7B, n_embd=256, n_vocab=512, n_mult=8))
    (folder / "page.txt").write_text("no checkpoint")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that has seen enough

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", asked
        server.shutdown()
        thread.join()


def test_a_file_is_read_once(served: tuple[str, Counter[str]], tmp_path: Path) -> None:
    url, asked = served
    for name in ("small", "large"):
        ggcl_fast.convert(f"{url}{name}.ggcl", tmp_path / f"{name}.gguf")
        ggcl_fast.convert(tmp_path / "served" / f"{name}.ggcl", tmp_path / "here.gguf", force=True)
        assert (tmp_path / f"{name}.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
        assert asked[f"/{name}.ggcl"] == 1
    assert (tmp_path / "served" / "large.ggcl").stat().st_size > SMALL


def test_a_folder_is_searched_by_first_bytes(served: tuple[str, Counter[str]], tmp_path: Path) -> None:
    url, asked = served
    assert main(["-q", "-j", "1", url, str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["large.gguf", "small.gguf"]
    assert max(asked.values()) == 2  # the look at how it begins was broken off


def test_what_is_too_large_to_be_read_at_once_is_told(
    served: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = served
    monkeypatch.setattr(remote, "_LONGEST_WHOLE", 1 << 20)
    with pytest.raises(OSError, match="tells of no byte ranges"):
        ggcl_fast.convert(f"{url}large.ggcl", tmp_path / "out.gguf")
    assert asked["/large.ggcl"] == 0


def test_what_cannot_be_reached_or_written_is_told_as_that(
    served: tuple[str, Counter[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = served
    source = str(DATA / "trained.ggcl")
    assert main(["--to", "merged", "--base", "http://127.0.0.1:1/b.gguf", source, str(tmp_path / "out")]) == 1
    assert "http://127.0.0.1:1/b.gguf: Connection refused" in capsys.readouterr().err
    assert main([source, f"{url}out.gguf"]) == 1
    assert "out.gguf: URLs of this kind cannot do that" in capsys.readouterr().err
