"""The command: arguments, exit statuses, what the terminal shows.  Nothing else knows that a terminal exists.

Exit status 0: done.  1: it failed, one line on standard error says why.  2: wrong usage.  130, 143: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

from . import __version__, targets
from .errors import CheckpointError, printable

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .conversion import ConversionReport
    from .payload import Progress

__all__ = ["main", "run"]

_LONG_WORK: Final = 64 << 20  # bytes from which on a terminal sees progress
_ENGINES: Final = ("auto", "numba", "python")  # of sweep.ENGINES, which would bring numpy along for --help

_EXAMPLES: Final = """\
examples:
  python -m ggcl_fast checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --to adapter --base model.gguf checkpoint.ggcl adapter.gguf
  python -m ggcl_fast --to merged --base model.gguf checkpoint.ggcl merged.gguf
  python -m ggcl_fast --to peft --base model.gguf checkpoint.ggcl adapter-folder
  python -m ggcl_fast --dry-run --verbose checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --json --force checkpoint.ggcl checkpoint.gguf
  python -m ggcl_fast --input checkpoint.ggcl --output checkpoint.gguf --ff 11008
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ggcl-fast",
        description="Convert a finetune checkpoint of August 2023 (magic ggcl) to GGUF, or to what loads today.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", nargs="?", help="ggcl checkpoint to read")
    parser.add_argument("target", metavar="OUT", nargs="?", help="GGUF file to write; for PEFT a folder")
    parser.add_argument("-i", "--input", metavar="IN", help="the same as IN")
    parser.add_argument("-o", "--output", metavar="OUT", help="the same as OUT")
    parser.add_argument(
        "--to",
        choices=targets.TARGETS,
        default=targets.DEFAULT,
        help="what to write: " + "; ".join(f"{name}, {target.what}" for name, target in targets.TARGETS.items()),
    )
    parser.add_argument("--base", metavar="GGUF", help="the model that the checkpoint was trained on")
    parser.add_argument(
        "--base-out",
        metavar="GGUF",
        help="with --to adapter --base: where the base model with changed norms goes (default: beside OUT)",
    )
    parser.add_argument(
        "--outtype", choices=targets.OUTTYPES, default=targets.OUTTYPES[0], help="type of an adapter's tensors"
    )
    parser.add_argument(
        "--no-token-embd",
        dest="token_embd",
        action="store_false",
        help="leave the token embeddings out of an adapter: what llama.cpp needs where they are tied",
    )
    parser.add_argument(
        "--ff",
        type=int,
        metavar="N",
        help="fail unless the feed-forward length is N; the file's tensors tell it anyway",
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("-n", "--dry-run", action="store_true", help="read and check everything, write nothing")
    parser.add_argument("--fsync", action="store_true", help="make the result survive a power failure before returning")
    parser.add_argument("--check-finite", action="store_true", help="fail where a tensor has NaN or infinite values")
    parser.add_argument(
        "--engine", choices=_ENGINES, default="auto", help="what walks the file; auto (the default) takes what pays"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-v", "--verbose", action="store_true", help="also tell on standard error what the file holds")
    parser.add_argument("--version", action="version", version=f"ggcl_fast {__version__}")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    positional = [args.source, args.target]
    for name in ("input", "output"):
        value = getattr(args, name)
        if value is not None:
            # What an option names no longer stands among the positional arguments.
            positional.insert(0 if name == "input" else 1, value)
            if positional.pop() is not None:
                parser.error(f"OUT or IN is given twice: as an argument and with --{name}")
    args.source, args.target = positional
    if args.source is None or args.target is None:
        parser.error("IN and OUT are needed")
    given = {"base": args.base is not None, "base_out": args.base_out is not None, "token_embd": not args.token_embd}
    try:
        targets.check_options(args.to, args.outtype, given)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    args = _arguments(argv)
    try:
        with _signals_as_exceptions():
            return _run(args)
    except _Stopped as stop:
        return _fail(f"interrupted by {stop.signal.name}; no part of a file is left behind", 128 + stop.signal)
    except (CheckpointError, ModuleNotFoundError) as error:
        return _fail(str(error))
    except OSError as error:
        names = [printable(os.fsdecode(name), longest=4096) for name in (error.filename, error.filename2) if name]
        return _fail(": ".join([*names, error.strerror or str(error)]))


def run() -> NoReturn:
    """Be the process: run the command and leave.

    Half of a small conversion's time is Python's own.  Collecting garbage while gguf is imported takes a tenth of the
    whole, and taking everything down again at the end a sixth; a process that ends after one file needs neither.
    """
    gc.disable()
    status = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read our output has gone
        status = status or 1
    os._exit(status)


def _fail(message: str, status: int = 1) -> int:
    print(f"ggcl-fast: error: {message}", file=sys.stderr)
    return status


def _run(args: argparse.Namespace) -> int:
    from .conversion import convert
    from .readers import open_checkpoint

    with open_checkpoint(args.source, engine=args.engine) as checkpoint:
        if args.verbose:
            _describe(checkpoint)
        with _progress(args, checkpoint.source.size + (os.path.getsize(args.base) if args.base else 0)) as progress:
            report = convert(
                checkpoint,
                args.target,
                to=args.to,
                base=args.base,
                base_out=args.base_out,
                outtype=args.outtype,
                token_embd=args.token_embd,
                ff=args.ff,
                force=args.force,
                dry_run=args.dry_run,
                fsync=args.fsync,
                check_finite=args.check_finite,
                progress=progress,
            )
    if not args.quiet:
        for warning in report.warnings:
            print(f"ggcl-fast: warning: {printable(report.source, longest=4096)}: {warning}", file=sys.stderr)
        for note in report.notes:
            print(f"ggcl-fast: note: {printable(note, longest=4096)}", file=sys.stderr)
    if args.json:
        print(json.dumps(report._asdict()))
    elif not args.quiet:
        print(_line(report))
    return 0


def _line(report: ConversionReport) -> str:
    done = "would be written" if report.dry_run else "written"
    names = " and ".join(printable(name, longest=4096) for name in (report.target, *report.extra_outputs))
    what = f"optimizer {report.optimizer}" if report.to == targets.DEFAULT else report.to
    return f"{names}: {done}, {report.n_tensors} tensors, {report.target_bytes:,} bytes, {what}, {report.seconds:.3f} s"


def _describe(checkpoint: Checkpoint) -> None:
    """Print what the checkpoint holds, a line a subject."""
    for subject, value in (
        ("model", checkpoint.parameters),
        ("ranks", dict(checkpoint.ranks)),
        ("training", checkpoint.training),
        ("optimizer", checkpoint.optimizer),
    ):
        facts = value if isinstance(value, dict) else value._asdict()
        print(f"{subject + ':':<10} {', '.join(f'{key} {fact}' for key, fact in facts.items())}", file=sys.stderr)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, nbytes: int) -> Iterator[Progress | None]:
    """Give a progress bar for long work at a terminal, None otherwise."""
    if args.quiet or nbytes < _LONG_WORK or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=0.5) as bar:
        yield bar.update


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `_Stopped`, so that what was begun is undone; the second one is ignored."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {each: signal.signal(each, stop) for each in handled}
    except ValueError:  # not in the main thread: signals are its business
        yield
        return
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
