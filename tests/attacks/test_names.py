"""Names in another's hands: they are escaped, bounded, and lead nowhere; see also tests/storage/test_urls.py."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.commands.convert import main

from ..mutations import GGCL

DEEP = 1500


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """Folders within each other, deeper than Python calls functions and than a path may be long."""
    top = tmp_path / "in"
    top.mkdir()
    (top / "a.ggcl").write_bytes(GGCL[2])
    before = os.getcwd()
    os.chdir(top)
    for _ in range(DEEP):
        os.mkdir("deeper")
        os.chdir("deeper")
    Path("b.ggcl").write_bytes(GGCL[2])
    os.chdir(before)
    yield top
    os.chdir(top)
    for _ in range(DEEP):  # from where a path still reaches
        if os.path.isdir("deeper/deeper/deeper"):
            os.rename("deeper/deeper", "next")
            shutil.rmtree("deeper")
            os.rename("next", "deeper")
    os.chdir(before)


def test_folders_of_any_depth_are_searched_or_told(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(deep), str(tmp_path / "out"), "--recursive", "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert "1 converted, 1 failed" in said
    assert "File name too long" in said
    assert (tmp_path / "out" / "a.gguf").exists()


def _as_source(name: str, folder: Path) -> None:
    ggcl_fast.convert(name, folder / "out.gguf")


def _as_target(name: str, folder: Path) -> None:
    ggcl_fast.convert(folder / "in.ggcl", name)


def _as_base(name: str, folder: Path) -> None:
    ggcl_fast.convert(folder / "in.ggcl", folder / "out.gguf", to="merged", base=name)


def _as_folder(name: str, folder: Path) -> None:
    ggcl_fast.convert(folder / "in.ggcl", name, to="peft", base=folder / "in.ggcl")


@pytest.mark.parametrize("use", [_as_source, _as_target, _as_base, _as_folder])
@pytest.mark.parametrize("name", ["{}/a\0b", "{}/" + "a" * 300, "{}/" + "a/" * 3000, ""])
def test_names_that_cannot_be_are_an_os_error(use: Callable[[str, Path], None], name: str, tmp_path: Path) -> None:
    (tmp_path / "in.ggcl").write_bytes(GGCL[2])
    with pytest.raises((OSError, CheckpointError)):
        use(name.format(tmp_path), tmp_path)
    assert os.listdir(tmp_path) == ["in.ggcl"]


def test_a_name_with_a_nul_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.ggcl").write_bytes(GGCL[2])
    for argv in ([f"{tmp_path}/a\0b", "out"], [f"{tmp_path}/in.ggcl", f"{tmp_path}/o\0p"]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.rstrip("\n").isprintable()
