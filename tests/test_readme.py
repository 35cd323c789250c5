"""The README: what it shows of Python is sound, and runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .reference import DATA

ROOT = DATA.parents[1]
README = (ROOT / "README.md").read_text()
SAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_a_link_leads_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
