"""What is handed out: a source distribution with all that its tests need, and a wheel that runs from elsewhere."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast

from .reference import DATA

ROOT = DATA.parents[1]
pytest.importorskip("build.__main__")  # and not a folder of this name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution and the wheel that was built from it, not from here."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True, env=environment,
    )  # fmt: skip
    return folder


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a clone")
    return {name for name in listed if not name.startswith((".ci/", ".git"))}


def test_the_source_distribution_has_everything(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() - names == set()
    assert not [name for name in names if "__pycache__" in name or ".hypothesis" in name]


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        times = {info.date_time for info in archive.infolist()}
    package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert package == {name for name in tracked() if name.startswith("ggcl_fast/")}
    assert len(times) == 1  # that of SOURCE_DATE_EPOCH


def test_the_wheel_runs_from_elsewhere(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(path)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import ggcl_fast; print(ggcl_fast.__file__)"
    run: dict[str, Any] = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    where = subprocess.run([sys.executable, "-c", code], **run).stdout
    assert where.startswith(str(tmp_path / "site"))
    done = subprocess.run([sys.executable, "-m", "ggcl_fast", DATA / "trained.ggcl", "out.gguf"], **run)
    assert "out.gguf: written, 44 tensors" in done.stdout
    version = subprocess.run([tmp_path / "site" / "bin" / "ggcl-fast", "--version"], **run).stdout
    assert version == f"ggcl_fast {ggcl_fast.__version__}\n"
