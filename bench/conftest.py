"""Options of the suite, for `pytest bench` and for `python -m bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .comparisons import Sizes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option for each size."""
    parser.addoption("--large", type=lambda text: int(float(text)), default=Sizes.large, help="bytes of the large file")
    parser.addoption("--bench-folder", type=Path, help="where to make the inputs (default: pytest's temporary folder)")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """How much work to do."""
    return Sizes(large=request.config.getoption("--large"))


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where inputs and outputs are."""
    given: Path | None = request.config.getoption("--bench-folder")
    if given is None:
        return tmp_path_factory.mktemp("bench")
    given.mkdir(parents=True, exist_ok=True)
    return given
