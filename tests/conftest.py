"""Options of the tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--rounds", type=int, default=1, help="rounds of processes that start cold at once (default: 1)")
