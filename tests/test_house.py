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
    "__main__", "info", "cli", "batch_cli", "terminal", "plot", "discovery", "batch", "conversion", "targets",
    "targets.checkpoint", "targets.adapter", "targets.merged", "targets.peft", "targets.plan", "finite", "gguf_writer",
    "health", "payload", "files", "base_model", "deltas", "readers", "readers.gguf_checkpoint", "readers.ggla",
    "readers.by_name", "readers.ggcl", "models", "remote", "checkpoint", "gguf_reader", "sources", "schema", "survey",
    "sweep", "kinds", "layout", "errors",
)  # fmt: skip
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def test_every_module_has_its_place() -> None:
    assert set(PATHS) == {*ORDER, "__init__", "testing"}


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports."""
    here = module.split(".")[: -1 if PATHS[module].name != "__init__.py" else None]
    found = set()
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [".".join(filter(None, [base, alias.name])) for alias in node.names]
            found |= {name if name in PATHS else base for name in names}
    return found


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_downward(module: str) -> None:
    # Checkpoint.from_buffer and Checkpoint.summary, the two doors back up; payload only lends health's a type.
    up = {"readers", "health", "payload"} if module == "checkpoint" else set()
    assert imports(module) - up <= {*ORDER[ORDER.index(module) + 1 :], ""}


@pytest.mark.parametrize("module", [*ORDER[1:], "testing"])
def test_every_public_name_is_documented(module: str) -> None:
    home = importlib.import_module(f"ggcl_fast.{module}")
    assert home.__doc__
    for name in getattr(home, "__all__", ()):
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
