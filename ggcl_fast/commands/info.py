"""The second command, ``ggcl-info``: what is inside checkpoints, and which of them is the good one.

One file is shown whole; several are shown a row each, so that a folder of checkpoints reads as a training curve.
Exit statuses and errors are those of `convert`: 0, done; 1, a file could not be shown, one line says why, the others
are shown all the same; 2, wrong usage; 3, a verdict of ``--fail-on``; 130 or 143, interrupted; 141, nobody reads what
is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .. import __version__
from ..errors import CheckpointError
from ..storage.streams import is_pipe
from .terminal import (
    ENGINES,
    GONE,
    LONG_WORK,
    Advance,
    Stopped,
    complete,
    fail,
    leave,
    shown,
    signals_as_exceptions,
    words_of,
)

if TYPE_CHECKING:
    from ..inspection.made import Made
    from ..inspection.summary import Summary

__all__ = ["argument_parser", "main", "run"]

_PICTURES: Final = (".png", ".svg", ".pdf")
_ORDERS: Final = ("name", "loss", "iterations")  # `tables.SORTED`, which --help does not need
_VERDICTS: Final = ("diverged", "untrained", "incomplete")  # of `summary.Verdict`, all but healthy
_UNWANTED: Final = 3
_EXAMPLES: Final = """\
examples, with files of the source distribution:
  ggcl-info tests/data/trained.ggcl
  ggcl-info --no-tensors --sort loss tests/data/*.ggcl
  ggcl-info --json tests/data/adam.ggcl
  ggcl-info --plot deltas.png tests/data/trained.ggcl
  ggcl-info --fail-on diverged,untrained tests/data/trained.ggcl

exit status: 0, done; 1, a file could not be shown; 2, wrong usage; 3, a verdict of --fail-on; 130 or 143, interrupted
"""


def _picture(path: str) -> str:
    if not path.lower().endswith(_PICTURES):  # before a forgotten argument costs a checkpoint its life
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(_PICTURES)}, not {path!r}")
    return path


def _verdicts(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if other := [one for one in found if one not in _VERDICTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(_VERDICTS)}, not {other[0]!r}")
    return found


def argument_parser() -> argparse.ArgumentParser:
    """Return what reads the arguments, as `convert.argument_parser` does."""
    parser = argparse.ArgumentParser(
        prog="ggcl-info",
        description="Show what is inside finetune checkpoints, and whether their training is sound.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="checkpoint or adapter to read, several are shown a row each; of models and folders made of them, a line",
    )
    parser.add_argument("--no-tensors", action="store_true", help="leave out the table of tensors")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object a file, each on a line of its own")
    shown.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--sort", choices=_ORDERS,
        help="order of several files, those last that do not tell it (default: as they are given)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=_picture, metavar="OUT", help="draw the deltas, or the training of several files, as a picture"
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace the picture where it exists")
    parser.add_argument(
        "--fail-on", type=_verdicts, default=(), metavar="VERDICT,...",
        help=f"exit with {_UNWANTED} where a file is one of these: {', '.join(_VERDICTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="what reads the values; auto (the default) takes what pays"
    )
    parser.add_argument("--version", action="version", version=f"ggcl_fast {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    parser = argument_parser()
    complete(parser)
    args = parser.parse_args(argv)
    try:
        with signals_as_exceptions("ggcl-info"):
            return _run(args)
    except Stopped as stop:
        return _fail(f"interrupted by {stop.signal.name}", 128 + stop.signal)
    except (ModuleNotFoundError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not args.plot:  # whoever reads the lines has what he wanted
            return GONE
        return _fail(words_of(error))


def run() -> NoReturn:
    """Be the process, as `convert.run` is."""
    leave(main, command="ggcl-info")


def _fail(message: str, status: int = 1) -> int:
    return fail(message, status, command="ggcl-info")


def _run(args: argparse.Namespace) -> int:
    from ..inspection import plot
    from ..inspection.summary import Summary
    from .tables import SORTED, json_lines, markdown, text

    if args.plot:
        plot.check(args.plot, force=args.force)  # before the files are read
    read = [_look_at(path, args.engine) for path in args.files]
    known = [one for one in read if one is not None]
    if args.sort:
        known.sort(key=SORTED[args.sort])
    summaries = [one for one in known if isinstance(one, Summary)]
    for one in summaries:
        for warning in one.warnings:
            print(f"ggcl-info: warning: {shown(one.source)}: {warning}", file=sys.stderr)
    show: Callable[..., Iterator[str]] = json_lines if args.json else markdown if args.markdown else text
    for line in show(known, tensors=not args.no_tensors, alone=len(args.files) == 1):
        print(line)
    if args.plot and summaries:
        plot.draw(summaries, args.plot, force=args.force)
        print(f"ggcl-info: {shown(args.plot)}: drawn", file=sys.stderr)
    elif args.plot:
        _fail(f"{shown(args.plot)}: not drawn, there is no checkpoint or adapter to draw")
    if None in read or (args.plot and not summaries):
        return 1
    return _UNWANTED if any(one.verdict in args.fail_on for one in summaries) else 0


def _look_at(path: str, engine: Any) -> Summary | Made | None:
    """Return what there is to know of one file; None where that is nothing, and a line has said why."""
    try:
        return _read(path, engine)
    except (CheckpointError, OSError) as error:
        from ..inspection.made import look_at_made

        is_worth_it = isinstance(error, CheckpointError | IsADirectoryError) and not is_pipe(path)
        made = look_at_made(path) if is_worth_it else None
        if made is None:
            _fail(words_of(error))
        return made


def _read(path: str, engine: Any) -> Summary:
    from ..inspection.summarise import summarise
    from ..readers import open_checkpoint

    with open_checkpoint(path, engine=engine) as checkpoint:
        if checkpoint.source.size < LONG_WORK or not sys.stderr.isatty():
            return summarise(checkpoint, engine=engine)
        from tqdm import tqdm

        with tqdm(total=checkpoint.source.size, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
            return summarise(checkpoint, engine=engine, progress=Advance(bar))


if __name__ == "__main__":
    run()
