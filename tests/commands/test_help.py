"""What is made of the commands' own help: completion in a shell, and man pages."""

import os
import subprocess
import sys

import pytest

from ggcl_fast.commands import convert, info

PARSERS = {"convert": convert.argument_parser(), "info": info.argument_parser()}


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
    assert epilog.count(f"\n  {parser.prog} ") >= 5
    assert {line for line in epilog.splitlines() if line.replace("\\", "") not in page} == set()
