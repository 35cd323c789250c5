"""Other people's programs, where they are installed."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def hugging_face() -> tuple[Any, Any, Any]:
    """The modules peft, torch and transformers."""
    found = []
    for name in ("peft", "torch", "transformers"):
        reason = f"{name} is not installed: pip install -e '.[clients]'"
        found.append(pytest.importorskip(name, reason=reason, exc_type=ImportError))
    return found[0], found[1], found[2]
