"""The house itself: imports run one way, everything public is documented."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest

import ggcl_fast

PACKAGE = Path(ggcl_fast.__file__).parent
# Downward: each module may import only from those after it.
ORDER = (
    "__main__", "cli", "conversion", "finite", "finetune_gguf", "gguf_writer", "payload", "files", "ggcl", "checkpoint",
    "sources", "schema", "sweep", "kinds", "layout", "errors",
)  # fmt: skip


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__", "testing"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_downward(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    top_level = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    imported = {name for node in top_level for name in ([node.module] if node.module else [a.name for a in node.names])}
    if module == "checkpoint":
        imported.discard("ggcl")  # Checkpoint.from_buffer, the one door back up
    allowed = {*ORDER[ORDER.index(module) + 1 :], "__version__"}
    assert imported <= allowed


@pytest.mark.parametrize("module", [*ORDER[1:], "testing"])
def test_every_public_name_is_documented(module: str) -> None:
    home = importlib.import_module(f"ggcl_fast.{module}")
    assert home.__doc__
    for name in home.__all__:
        value = getattr(home, name)
        if isinstance(value, types.GenericAlias):  # a class to Python 3.10
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name}"


def test_the_public_face_is_complete() -> None:
    assert set(ggcl_fast.__all__) - {"__version__"} == set(ggcl_fast._HOMES)
    for name in ggcl_fast.__all__:
        assert getattr(ggcl_fast, name) is not None
    assert dir(ggcl_fast) == sorted(ggcl_fast.__all__)
    with pytest.raises(AttributeError):
        ggcl_fast.no_such_name  # noqa: B018
