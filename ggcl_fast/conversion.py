"""One job: from a source to its outputs, of which all are in place at the end, or none.

Nothing here knows what is in a file; `readers` and `targets` do.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .readers import open_checkpoint
from .readers.engine import Engine
from .storage import outputs
from .storage.creating import new_outputs
from .storage.files import OutputFile
from .storage.identity import Claims, is_one_file
from .storage.outputs import Nowhere, Output, Outputs, Progress, Told, Writer
from .storage.sources import Source
from .storage.urls import StrPath, located, public_name
from .targets import DEFAULT, OUTTYPES, names
from .targets.options import ROWS, Options
from .targets.plan import Plan, planner

if TYPE_CHECKING:
    from .targets.base_model import BaseModel

__all__ = ["ConversionReport", "convert", "run"]

_log = logging.getLogger(__name__)
logging.getLogger(__package__).addHandler(logging.NullHandler())  # silent unless somebody asks
_PREALLOCATED = 16 << 20  # bytes; smaller outputs gain nothing by it


class ConversionReport(NamedTuple):
    """What a conversion did."""

    source: str
    target: str
    n_tensors: int
    """Tensors written."""
    source_bytes: int
    """Bytes of the checkpoint."""
    target_bytes: int
    """Bytes of all files written."""
    optimizer: Literal["adam", "lbfgs"] | None
    """None where the source has no optimizer state."""
    n_ff: int
    """Feed-forward length that the tensors have."""
    seconds: float
    """Wall time of the call."""
    dry_run: bool
    """True where everything was read and checked and nothing was written."""
    warnings: tuple[str, ...]
    """What is unusual about the source."""
    to: str = DEFAULT
    """What was written: a name in `targets.TARGETS`."""
    notes: tuple[str, ...] = ()
    """What was left out of the target, or could not be kept as it was."""
    extra_outputs: tuple[str, ...] = ()
    """Files written beside the target."""


def convert(
    source: StrPath | Checkpoint,
    target: StrPath,
    *,
    to: str | None = None,
    base: StrPath | None = None,
    base_out: StrPath | None = None,
    outtype: str = OUTTYPES[0],
    token_embd: bool = True,
    heads: tuple[int, int] | None = None,
    rows: str = ROWS[0],
    arch: str | None = None,
    name: str | None = None,
    base_model_id: str | None = None,
    ff: int | None = None,
    force: bool = False,
    parents: bool = False,
    dry_run: bool = False,
    fsync: bool = False,
    check_finite: bool = False,
    engine: Engine = "auto",
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a finetune checkpoint to a GGUF checkpoint, or to what today's programs load.

    The target is complete or absent: it appears under its name in one step when all bytes are written.  An existing
    target stays as it is until then, and for good if anything fails.  Several outputs appear together or not at all.

    Parameters
    ----------
    source
        Anything that `readers.open_checkpoint` reads, or an open `Checkpoint`.
    target
        The GGUF file to write, or for PEFT the folder.  A symbolic link is followed, as `cp` does.  One file may also
        go to a URL.  It is none of the files that are read, under whatever name.
    to
        What to write: ``"checkpoint"`` (the default for a ggcl file), the GGUF finetune checkpoint; ``"adapter"``
        (the default for all others), a GGUF LoRA adapter for llama.cpp; ``"merged"``, the base model with every delta
        added; ``"peft"``, a folder for Hugging Face's PEFT.
    base
        The GGUF model that the checkpoint was trained on.  An adapter comes with a copy of it in which only the norms
        are changed, since llama.cpp ignores their deltas in adapters; PEFT gets whole norm weights from it; and it is
        what is merged with.
    base_out
        Where the copy goes; beside the adapter, named after both, unless told otherwise.
    outtype
        Type of an adapter's tensors: ``"f32"``, ``"f16"``, and for llama.cpp ``"bf16"``.
    token_embd
        Whether an adapter has the delta of the token embeddings.  llama.cpp cannot load it upon a model whose
        embeddings are tied.
    heads
        n_head and n_head_kv of the base model, where none is given: by them rows of q and k are put into order.
    rows
        ``"auto"``: rows of q and k are put into the order that the target has; ``"gguf"``: they are taken as if they
        were in the order of GGUF's models.  That matters for ggla files that finetune did not write.
    arch
        Architecture of the base model, as GGUF files name it, where nothing else tells it.
    name
        What the output calls itself; by default the names of base model and source.
    base_model_id
        The base model's id at Hugging Face, such as ``meta-llama/Llama-2-7b-hf``, for the output to tell.
    ff
        The feed-forward length that the file must have.  Not needed: its tensors tell it, or in a file without
        layers the header does.
    force
        Replace existing targets.  Without it nothing is replaced, not even what appears meanwhile.  A folder that holds
        other files than a PEFT adapter's never is.
    parents
        Make the folders above the targets where they are missing.
    dry_run
        Read and check everything, and write nothing.
    fsync
        Make the result survive a power failure before returning; without it that is left to the system.
    check_finite
        Fail where a tensor has NaN or infinite values.  Without it they are carried over like all others.
    engine
        What runs the pass over the records: see `engine.pick_engine`.  An open `Checkpoint` has had its pass.
    progress
        Called now and then with the number of bytes written since its last call.  If it has a method ``begin``, that is
        called once before, with the number of all that will be.

    Raises
    ------
    CheckpointError
        The source is not a sound checkpoint, or not one with `ff`, or changed while it was read, or holds less or more
        than the target can; or the base model is not sound, or not the one that it was trained on.
    FileExistsError
        There is a target and `force` is false.
    shutil.SameFileError
        A target is the source or the base, or there are two and they are one file.
    ModuleNotFoundError
        What the target needs is not installed; the message names the extra.
    OSError
        The source or the base model cannot be read or the target cannot be written.
    ValueError
        There is no such target, or it has no use for an option, or needs another.
    """
    options = Options(
        to, base, base_out, outtype, token_embd, heads, rows, arch, name, base_model_id, ff, force, parents, dry_run,
        fsync, check_finite, engine, progress,
    )  # fmt: skip
    return run(source, target, options)


def run(
    source: StrPath | Checkpoint, target: StrPath, options: Options, *, copied: StrPath | None = None
) -> ConversionReport:
    """Do what `convert` does, with its keywords as `options`.

    `copied` is a copy of the base model that another job of the run has made: where this one would write the same, it
    gives that file another name.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if isinstance(source, Checkpoint):
            checkpoint = source
        else:
            checkpoint = stack.enter_context(open_checkpoint(source, engine=options.engine))
        options = options.for_format(checkpoint.format, checkpoint.source.name)
        base = stack.enter_context(_base_model(options.base)) if options.base is not None else None
        report = _convert(checkpoint, base, target, options, copied)
    report = report._replace(seconds=time.perf_counter() - begin)
    _log.info("%s: %s made of it, %d bytes, %.3f s", report.source, report.target, report.target_bytes, report.seconds)
    return report


def _base_model(path: StrPath) -> BaseModel:
    from .targets.base_model import BaseModel

    return BaseModel(path)


def _trains_norms(checkpoint: Checkpoint) -> bool:
    from .targets.deltas import trains_norms

    return trains_norms(checkpoint)


def _convert(
    checkpoint: Checkpoint, base: BaseModel | None, target: StrPath, options: Options, copied: StrPath | None
) -> ConversionReport:
    _check_ff(checkpoint, options.ff)
    sources = [checkpoint.source] if base is None else [checkpoint.source, base.source]
    norms = base is not None and _trains_norms(checkpoint)
    written = names.outputs(target, options, norms=norms)
    Claims().add(sources, names.taken(target, options, norms=norms))
    outputs = new_outputs(
        written, folder=options.folder, together=options.base_out is None, force=options.force, fsync=options.fsync,
        parents=options.parents,
    )  # fmt: skip
    if options.check_finite:
        from .inspection.values import check_finite

        check_finite(checkpoint, engine=options.engine)
    assert options.to is not None  # `Options.for_format` has seen to it
    plan = planner(options.to)(checkpoint, options, base, written)
    copy = None
    if copied is not None and len(written) > 1 and base is not None and not options.dry_run:
        from .targets.copies import look_at_copy

        copy = look_at_copy(checkpoint, base, copied)
        plan = plan.with_copy(located(copied), copy.identity) if copy is not None else plan
    told = _told(options.progress, sum(file.nbytes for file in plan.files if file.same_as is None))
    nbytes = _count(plan, told) if options.dry_run else _write(sources, plan, outputs, told)
    notes = plan.notes
    if copied is not None and copy is not None and is_one_file(written[0], copied):
        notes = (*notes, f"{public_name(written[0])} and {public_name(copied)} are two names of one file")
    return ConversionReport(
        source=checkpoint.source.name,
        target=public_name(target),
        n_tensors=plan.n_tensors,
        source_bytes=checkpoint.source.file_size,
        target_bytes=nbytes,
        optimizer=checkpoint.optimizer.name if checkpoint.optimizer is not None else None,
        n_ff=checkpoint.parameters.n_ff,
        seconds=0.0,
        dry_run=options.dry_run,
        warnings=(*checkpoint.warnings, *plan.late(), *(copy.warnings if copy is not None else ())),
        to=options.to,
        notes=notes,
        extra_outputs=tuple(public_name(name) for name in written if name != target),
    )


def _check_ff(checkpoint: Checkpoint, ff: int | None) -> None:
    """Hold that the feed-forward length is `ff`."""
    n_ff = checkpoint.parameters.n_ff
    if ff is not None and ff != n_ff:
        raise CheckpointError(
            "the feed-forward length asked for is not the file's", source=checkpoint.source.name, field="n_ff",
            expected=ff, found=n_ff, hint="leave it out: the tensors tell it",
        )  # fmt: skip


def _told(progress: Progress | None, total: int) -> Callable[[Writer], Writer]:
    """Return what makes a writer tell `progress` how much of `total` bytes it has taken."""
    if progress is None:
        return lambda writer: writer
    outputs.begin(progress, total)
    return functools.partial(Told, progress)


def _count(plan: Plan, told: Callable[[Writer], Writer]) -> int:
    """Do everything but write, and return the bytes that there would be."""
    nowhere = Nowhere()
    for file in plan.files:
        file.write(told(nowhere))
    return nowhere.nbytes


def _write(sources: Sequence[Source], plan: Plan, outputs: Sequence[Output], told: Callable[[Writer], Writer]) -> int:
    """Write the files of `plan`, and return how many bytes they have."""
    nbytes = 0
    with Outputs(outputs):
        of_files = outputs if len(outputs) == len(plan.files) else [*outputs] * len(plan.files)
        for output, file in zip(of_files, plan.files):
            with output.file(file.name) as writer:
                if file.same_as is not None and isinstance(writer, OutputFile) and writer.become(*file.same_as):
                    nbytes += writer.nbytes
                    continue
                if file.nbytes >= _PREALLOCATED:
                    writer.preallocate(file.nbytes)
                file.write(told(writer))
                nbytes += writer.nbytes
        for source in sources:
            source.check_unchanged()
    return nbytes
