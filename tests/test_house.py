"""The house itself: imports run one way, every room has its place and one job, everything public is documented."""

import ast
import graphlib
import importlib
import inspect
import types
from pathlib import Path

import pytest

import ggcl_fast

PACKAGE = Path(ggcl_fast.__file__).parent
# Downward: a wing or room may import only from those on floors below its own.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("batch",),
    ("conversion",),
    ("targets", "inspection"),
    ("readers",),
    ("checkpoint",),
    ("formats",),
    ("storage",),
    ("errors",),
)
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
ROOMS = sorted(PATHS.keys() - {"__init__", "testing"})
WINGS = sorted(room for room in ROOMS if PATHS[room].name == "__init__.py")
LONGEST_ROOM = 300  # lines


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, at its beginning or within a function."""
    here = module.split(".")[: -1 if PATHS[module].name != "__init__.py" else None]
    found = set()
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [".".join(filter(None, [base, alias.name])) for alias in node.names]
            found |= {name if name in PATHS else base for name in names}
    return found - {""}


def wing(module: str) -> str:
    return module.partition(".")[0]


def test_every_wing_and_room_has_its_place() -> None:
    assert {wing(room) for room in ROOMS} == set(FLOOR_OF)
    assert len(FLOORS) <= 11


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room: str) -> None:
    floor = FLOOR_OF[wing(room)]
    assert {other for other in imports(room) if wing(other) != wing(room) and FLOOR_OF[wing(other)] <= floor} == set()


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_has_one_direction_too(name: str) -> None:
    graph = {room: {other for other in imports(room) if wing(other) == name} for room in ROOMS if wing(room) == name}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_one_job(room: str) -> None:
    assert len(PATHS[room].read_text().splitlines()) < LONGEST_ROOM


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_names_its_rooms(name: str) -> None:
    words = (importlib.import_module(f"ggcl_fast.{name}").__doc__ or "").split("`")
    rooms = {room.removeprefix(f"{name}.") for room in ROOMS if room.startswith(f"{name}.")}
    assert rooms <= set(words[1::2])
    assert (Path(__file__).parent / name / "__init__.py").exists()


@pytest.mark.parametrize("module", [*ROOMS, "testing"])
def test_every_public_name_is_documented(module: str) -> None:
    if module == "__main__":
        return
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
