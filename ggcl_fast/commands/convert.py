"""``ggcl-fast``: its arguments, its exit statuses, and which jobs they ask for.

Exit status 0: done.  1: something failed, one line on standard error for each says why.  2: wrong usage.  130, 143:
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import textwrap
from collections.abc import Sequence
from typing import Final, NoReturn

from .. import __version__
from ..errors import CheckpointError
from ..storage.streams import STDIN, STDOUT, is_stream
from ..storage.urls import StrPath, below, is_folder, is_url, located
from ..targets import OUTTYPES, TARGETS
from ..targets.names import target_name
from ..targets.options import ROWS, Options
from .many import Task, run_jobs
from .terminal import ENGINES, Stopped, complete, fail, leave, shown, signals_as_exceptions, without_keywords, words_of

__all__ = ["argument_parser", "main", "run"]

_WIDTH: Final = 79  # characters, as argparse has it where no terminal says more

_EPILOG: Final = """\
what each output cannot hold, or cannot do without:
{limits}

examples, with files of the source distribution:
  ggcl-fast tests/data/trained.ggcl checkpoint.gguf
  ggcl-fast --to adapter --base tests/data/base.gguf tests/data/trained.ggcl adapter.gguf
  ggcl-fast --to merged --base tests/data/base.gguf tests/data/trained.ggcl merged.gguf
  ggcl-fast --to peft --base tests/data/base.gguf tests/data/trained.ggcl adapter-folder
  ggcl-fast --dry-run --verbose tests/data/adam.ggcl checkpoint.gguf
  ggcl-fast --json --force tests/data/adam.ggcl checkpoint.gguf
  ggcl-fast --recursive --skip-existing tests/data/*.ggcl converted/
  ggcl-fast --input tests/data/adam.ggcl --output adam.gguf --ff 96
  ggcl-fast - - < tests/data/lbfgs.ggcl > lbfgs.gguf

exit status: 0, done; 1, something failed, one line for each says why; 2, wrong usage; 130 or 143, interrupted
"""


def _limits() -> str:
    """Return the limits of the targets, a paragraph each."""
    return "\n".join(
        textwrap.fill(target.limits, _WIDTH, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        for name, target in TARGETS.items()
    )


def argument_parser() -> argparse.ArgumentParser:
    """Return what reads the arguments; help, completion and the man page are made of it."""
    parser = argparse.ArgumentParser(
        prog="ggcl-fast",
        usage="%(prog)s [options] IN OUT\n       %(prog)s [options] IN... OUT_FOLDER",
        description="Convert checkpoints and adapters of llama.cpp's finetune to GGUF, and to what loads today.",
        epilog=_EPILOG.format(limits=_limits()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", metavar="IN... OUT", nargs="*",
        help="checkpoints to read, or folders of them, and the file or folder to write; URLs too",
    )  # fmt: skip
    parser.add_argument("-i", "--input", metavar="IN", help="the same as IN")
    parser.add_argument("-o", "--output", metavar="OUT", help="the same as OUT")
    what = "; ".join(f"{name}, {target.what}" for name, target in TARGETS.items())
    parser.add_argument(
        "--to", choices=TARGETS, help=f"what to write: {what} (default: checkpoint for ggcl, adapter otherwise)"
    )
    parser.add_argument("--base", metavar="GGUF", help="the model that the checkpoint was trained on")
    parser.add_argument(
        "--base-out", metavar="GGUF",
        help="with --to adapter --base: where the base model with changed norms goes (default: beside OUT)",
    )  # fmt: skip
    parser.add_argument(
        "--outtype", choices=OUTTYPES, default=OUTTYPES[0],
        help="type of an adapter's tensors, bf16 for llama.cpp alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-token-embd", dest="token_embd", action="store_false",
        help="leave the token embeddings out of an adapter: what llama.cpp needs where they are tied",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=_heads, metavar="N[,N_KV]",
        help="attention heads of the base model, and those of keys and values, where no --base tells them",
    )  # fmt: skip
    parser.add_argument(
        "--rows", choices=ROWS, default=ROWS[0],
        help="gguf: take rows of q and k as they stand, as llama.cpp did in 2023; auto (the default): put those of an "
        "adapter that was converted from Hugging Face's into order",
    )  # fmt: skip
    parser.add_argument("--name", help="what the output calls itself (default: names of the base model and of IN)")
    parser.add_argument(
        "--base-model-id", metavar="ID", help="the base model's id at Hugging Face, for the output to tell"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of the base model, where nothing else tells it")
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
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a file: status, outputs, warnings, notes, error"
    )
    parser.add_argument(
        "--progress", dest="is_watched", action="store_true", help="show a bar also where nobody seems to watch"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-v", "--verbose", action="store_true", help="also tell on standard error what the file holds")
    parser.add_argument("--version", action="version", version=f"ggcl_fast {__version__}")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a number of 1 or more: {text!r}")
    return int(text)


def _heads(text: str) -> tuple[int, int]:
    n_head, _, n_head_kv = text.partition(",")
    return _positive(n_head), _positive(n_head_kv or n_head)


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    parser = argument_parser()
    complete(parser)
    args = parser.parse_intermixed_args(argv)  # options may stand between IN and OUT
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
    args.sources = [STDIN if source == "-" else source for source in sources]
    args.target = STDOUT if target == "-" else target
    if args.json and args.target == STDOUT:
        parser.error("standard output has room for the file or for --json, not for both")
    try:
        return args, Options(**{name: value for name, value in vars(args).items() if name in _OPTIONS})
    except ValueError as error:
        parser.error(without_keywords(str(error)))


_OPTIONS: Final = {field.name for field in dataclasses.fields(Options)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    args, options = _arguments(argv)
    try:
        with signals_as_exceptions("ggcl-fast") as signals:
            tasks = _tasks(args, options)
            status = run_jobs(tasks, args, signals) if isinstance(tasks, Task) else tasks
        if not signals.number:
            return status
        number = signals.number
    except Stopped as stop:
        number = stop.signal
    except (CheckpointError, ModuleNotFoundError, OSError) as error:
        return fail(words_of(error))
    return fail(f"interrupted by {signal.Signals(number).name}; no part of a file is left behind", 128 + number)


def run() -> NoReturn:
    """Be the process: run the command and leave."""
    leave(main)


def _tasks(args: argparse.Namespace, options: Options) -> Task | int:
    """Return what is to be done, or the exit status where that is nothing."""
    sources, target = args.sources, args.target
    if not (args.dask or len(sources) > 1 or is_folder(sources[0])):
        is_new = target.endswith("/") and not is_folder(target)
        if (is_new or is_folder(target)) and not options.folder:
            target = below(target.rstrip("/") or "/", target_name(sources[0], options))
        return Task.of_one(sources[0], target, dataclasses.replace(options, parents=options.parents or is_new))
    place = located(target)
    if not is_url(place) and os.path.exists(place) and not os.path.isdir(place):
        return fail(f"{shown(target)}: Not a folder")
    if is_stream(place):
        return fail(f"{shown(target)}: A stream has room for one file")
    if options.base_out is not None:
        return fail("--base-out is for one file; several have theirs beside their adapters")
    if args.dask:  # whose workers are in other folders
        sources, target = list(map(_absolute, sources)), _absolute(target)
        options = dataclasses.replace(options, base=_absolute(options.base) if options.base else None)
    if options.base is not None and not args.dask:
        from ..targets.base_model import BaseModel

        BaseModel(options.base).source.close()  # what is wrong with it is told once, before anything
    from ..batch.search import find_jobs

    search = find_jobs(sources, target, options, recursive=args.recursive)
    if not search.jobs and not search.failed:
        return fail(f"no checkpoints found, {search.n_others:,} other files passed over{_of_hugging_face(sources)}")
    return Task(search.jobs, search.sizes, dataclasses.replace(options, parents=True), search.n_others, search.failed)


def _of_hugging_face(folders: Sequence[str]) -> str:
    """Say what serves a folder of Hugging Face's, where there is one."""
    for name, script in ("adapter_config.json", "convert_lora_to_gguf.py"), ("config.json", "convert_hf_to_gguf.py"):
        if any(os.path.exists(os.path.join(located(folder), name)) for folder in folders):
            return f" (a folder of Hugging Face's: llama.cpp's {script} makes a GGUF file of it)"
    return ""


def _absolute(path: StrPath) -> str:
    return str(path) if is_url(path) else os.path.abspath(path)
