"""The command: arguments, exit statuses, what the terminal shows.  Nothing else knows that a terminal exists.

Exit status 0: done.  1: it failed, one line on standard error says why.  2: wrong usage.  130, 143: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from . import __version__, targets
from .errors import CheckpointError, printable
from .terminal import (
    ENGINES,
    LONG_WORK,
    Stopped,
    fail,
    leave,
    line_of,
    options_of,
    signals_as_exceptions,
    warn,
    words_of,
)

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .payload import Progress

__all__ = ["main", "run"]

_EXAMPLES: Final = """\
examples:
  python -m ggcl_fast checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --to adapter --base model.gguf checkpoint.ggcl adapter.gguf
  python -m ggcl_fast --to merged --base model.gguf checkpoint.ggcl merged.gguf
  python -m ggcl_fast --to peft --base model.gguf checkpoint.ggcl adapter-folder
  python -m ggcl_fast --dry-run --verbose checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --json --force checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --recursive --skip-existing runs/ converted/
  python -m ggcl_fast --input checkpoint.ggcl --output checkpoint.gguf --ff 11008
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ggcl-fast",
        usage="%(prog)s [options] IN OUT\n       %(prog)s [options] IN... OUT_FOLDER",
        description="Convert checkpoints and adapters of llama.cpp's finetune to GGUF, and to what loads today.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", metavar="IN... OUT", nargs="*",
        help="checkpoints to read, or folders of them, and the file or folder to write; URLs too",
    )  # fmt: skip
    parser.add_argument("-i", "--input", metavar="IN", help="the same as IN")
    parser.add_argument("-o", "--output", metavar="OUT", help="the same as OUT")
    what = "; ".join(f"{name}, {target.what}" for name, target in targets.TARGETS.items())
    parser.add_argument(
        "--to", choices=targets.TARGETS, help=f"what to write: {what} (default: checkpoint for ggcl, adapter otherwise)"
    )
    parser.add_argument("--base", metavar="GGUF", help="the model that the checkpoint was trained on")
    parser.add_argument(
        "--base-out", metavar="GGUF",
        help="with --to adapter --base: where the base model with changed norms goes (default: beside OUT)",
    )  # fmt: skip
    parser.add_argument(
        "--outtype", choices=targets.OUTTYPES, default=targets.OUTTYPES[0], help="type of an adapter's tensors"
    )
    parser.add_argument(
        "--no-token-embd", dest="token_embd", action="store_false",
        help="leave the token embeddings out of an adapter: what llama.cpp needs where they are tied",
    )  # fmt: skip
    parser.add_argument(
        "--ff",
        type=int,
        metavar="N",
        help="fail unless the feed-forward length is N; the file's tensors tell it anyway",
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("-n", "--dry-run", action="store_true", help="read and check everything, write nothing")
    many = parser.add_argument_group("several files")
    many.add_argument("-r", "--recursive", action="store_true", help="search folders within folders, and keep them")
    many.add_argument("--skip-existing", action="store_true", help="leave what has its output: to go on after a stop")
    many.add_argument("-j", "--jobs", type=_positive, metavar="N", help="work on N at a time (default: the processors)")
    many.add_argument("--fail-fast", action="store_true", help="stop at the first that fails")
    many.add_argument("--keep-going", action="store_false", dest="fail_fast", help="do all the others (the default)")
    many.add_argument("--dask", metavar="ADDRESS", help="let a Dask cluster do it: its scheduler, tcp://host:8786")
    parser.add_argument("--fsync", action="store_true", help="make the result survive a power failure before returning")
    parser.add_argument("--check-finite", action="store_true", help="fail where a tensor has NaN or infinite values")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="what walks the file; auto (the default) takes what pays"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-v", "--verbose", action="store_true", help="also tell on standard error what the file holds")
    parser.add_argument("--version", action="version", version=f"ggcl_fast {__version__}")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a number of 1 or more: {text!r}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    sources: list[str] = args.paths
    target: str | None = args.output
    if target is None and sources:
        target = sources.pop()
    if args.input is not None:
        if sources:
            parser.error("IN is given twice: as an argument and with --input")
        sources = [args.input]
    if not sources or target is None:
        parser.error("IN and OUT are needed")
    args.sources, args.target = sources, target
    _check_target_options(parser, args)
    return args


def _check_target_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error where options do not fit what is to be written."""
    given = {"base": args.base is not None, "base_out": args.base_out is not None, "token_embd": not args.token_embd}
    if args.to is None:
        if any(given.values()) or args.outtype != targets.OUTTYPES[0]:
            parser.error("--base, --base-out, --no-token-embd and --outtype need --to")
        return
    try:
        targets.check_options(args.to, args.outtype, given)
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    args = _arguments(argv)
    try:
        with signals_as_exceptions():
            return _run(args)
    except Stopped as stop:
        return fail(f"interrupted by {stop.signal.name}; no part of a file is left behind", 128 + stop.signal)
    except (CheckpointError, ModuleNotFoundError, OSError) as error:
        return fail(words_of(error))


def run() -> NoReturn:
    """Be the process: run the command and leave."""
    leave(main)


def _run(args: argparse.Namespace) -> int:
    from .discovery import is_folder, target_name

    if args.dask or len(args.sources) > 1 or is_folder(args.sources[0]):
        from .batch_cli import run_many

        return run_many(args)
    to_folder = args.to is not None and targets.TARGETS[args.to].folder
    if is_folder(args.target) and not to_folder:
        args.target = os.path.join(args.target, target_name(args.sources[0]))
    return _run_one(args)


def _run_one(args: argparse.Namespace) -> int:
    from .conversion import convert, target_exists
    from .readers import open_checkpoint
    from .sources import is_url

    if args.skip_existing and target_exists(args.target):
        if not args.quiet:
            print(f"{printable(args.target, longest=4096)}: skipped, it exists")
        return 0
    with open_checkpoint(args.sources[0], engine=args.engine) as checkpoint:
        if args.verbose:
            _describe(checkpoint)
        base_size = os.path.getsize(args.base) if args.base and not is_url(args.base) else 0
        with _progress(args, checkpoint.source.size + base_size) as progress:
            report = convert(checkpoint, args.target, progress=progress, **options_of(args))
    if not args.quiet:
        warn(report)
    if args.json:
        print(json.dumps(report._asdict()))
    elif not args.quiet:
        print(line_of(report))
    return 0


def _describe(checkpoint: Checkpoint) -> None:
    """Print what the checkpoint holds, a line a subject."""
    for subject, value in (
        ("model", checkpoint.parameters),
        ("ranks", dict(checkpoint.ranks)),
        ("training", checkpoint.training),
        ("optimizer", checkpoint.optimizer),
    ):
        facts = value if isinstance(value, dict) else value._asdict() if value is not None else {"name": None}
        print(f"{subject + ':':<10} {', '.join(f'{key} {fact}' for key, fact in facts.items())}", file=sys.stderr)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, nbytes: int) -> Iterator[Progress | None]:
    """Give a progress bar for long work at a terminal, None otherwise."""
    if args.quiet or nbytes < LONG_WORK or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=0.5) as bar:
        yield bar.update
