"""The README and the documentation: what they show runs, and links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .reference import DATA

ROOT = DATA.parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SAMPLES = [
    sample
    for page in (ROOT / "README.md", ROOT / "docs" / "many-files.md")
    for sample in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]


def test_there_are_samples() -> None:
    assert len(SAMPLES) >= 2


def test_samples_are_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    paths = [tmp_path / f"sample_{number}.py" for number in range(len(SAMPLES))]
    for path, sample in zip(paths, SAMPLES):
        path.write_text(sample)
    said, errors, status = api.run(["--strict", "--cache-dir", str(ROOT / ".mypy_cache"), *map(str, paths)])
    assert (status, errors) == (0, ""), said


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_runs(sample: str, tmp_path: Path) -> None:
    """With real files under its names."""
    for name in re.findall(r'"([a-z]+\.ggcl)"', sample):
        (tmp_path / name).write_bytes((DATA / "trained.ggcl").read_bytes())
    (tmp_path / "sample.py").write_text(sample)
    done = subprocess.run([sys.executable, "sample.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists() or link in BUILT


BUILT = {"security.md", "changelog.md", "api.md"}
"""Pages that take in what stands elsewhere."""


BLOCKS = [
    block for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if "pip install" not in block
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_commands_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    """In a folder that looks like a fresh clone with its virtual environment."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "data").symlink_to(DATA)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_documentation_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    page = (tmp_path / "api.html").read_text()
    for name in ("convert", "open_checkpoint", "Checkpoint", "convert_many", "CheckpointError"):
        assert f'id="ggcl_fast.{name}"' in page or f".{name}" in page
    outside = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "index.html").read_text())
    assert [link for link in outside if not link.startswith("https://www.mkdocs.org")] == []
