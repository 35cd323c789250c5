"""The commands' own help: its examples run, it tells defaults and limits, and more is made of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggcl_fast.commands import convert, info
from ggcl_fast.targets import TARGETS

from ..reference import DATA

PARSERS = {"convert": convert.argument_parser(), "info": info.argument_parser()}


def examples(name: str) -> list[str]:
    """Every example of a command's help."""
    parser = PARSERS[name]
    return [line.strip() for line in (parser.epilog or "").splitlines() if line.startswith(f"  {parser.prog} ")]


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in PARSERS for line in examples(name)])
def test_an_example_can_be_pasted_into_a_clone(name: str, line: str, tmp_path: Path) -> None:
    if "--plot" in line:
        pytest.importorskip("matplotlib", reason="needs the extra plot")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "data").symlink_to(DATA)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path)) > 1 or name == "info" or "--dry-run" in line


@pytest.mark.parametrize("name", PARSERS)
def test_help_tells_every_default(name: str) -> None:
    """Of options that have one and take something."""
    for action in PARSERS[name]._actions:
        if action.default not in (None, (), "==SUPPRESS==") and action.nargs != 0:
            assert "default" in (action.help or ""), action.option_strings


def test_help_tells_the_limits_of_every_output() -> None:
    told = " ".join(PARSERS["convert"].format_help().split())
    for name, target in TARGETS.items():
        assert f"{name} {target.limits}" in told


def completed(module: str, line: str, *before: str) -> list[str]:
    """What a shell is told that could stand next."""
    theirs, ours = os.pipe()
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }  # fmt: skip
    code = f"import os; os.dup2({ours}, 8); {''.join(before)}from ggcl_fast.commands import {module}; {module}.run()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, pass_fds=[ours], capture_output=True, timeout=60
    )
    os.close(ours)
    with open(theirs, "rb") as file:
        said = file.read().decode()
    assert done.stdout == b""
    assert b"usage" not in done.stderr
    return said.split()


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("convert", "ggcl-fast --to m", ["merged"]),
        ("convert", "ggcl-fast in.ggcl --out", ["--output", "--outtype"]),
        ("convert", "ggcl-fast --outtype f", ["f32", "f16"]),
        ("info", "ggcl-info --sort ", ["name", "loss", "iterations"]),
    ],
)
def test_a_shell_is_told_what_could_stand_next(module: str, line: str, expected: list[str]) -> None:
    pytest.importorskip("argcomplete", reason="needs the extra complete")
    assert set(completed(module, line)) == set(expected)


def test_a_shell_is_told_nothing_where_the_extra_is_missing() -> None:
    assert completed("info", "ggcl-info --s", "import sys; sys.modules['argcomplete'] = None; ") == []


@pytest.mark.parametrize("name", PARSERS)
def test_a_man_page_has_every_option_and_example(name: str) -> None:
    manpage = pytest.importorskip("build_manpages.manpage", reason="needs the extra docs")
    parser = PARSERS[name]
    page = str(manpage.Manpage(parser)).replace("\\-", "-").replace("\\", "")
    options = {option for action in parser._actions for option in action.option_strings}
    assert {option for option in options - {"-h", "--help"} if option not in page} == set()
    epilog = parser.epilog or ""
    assert len(examples(name)) >= 5
    assert {line for line in epilog.splitlines() if line.replace("\\", "") not in page} == set()
