"""One file: open a source, hand it to a target, put the output in place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import finite, targets
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .files import OutputFile, OutputFiles, OutputFolder, check_folder, check_target
from .payload import Progress
from .readers import open_checkpoint
from .sources import Source, StrPath
from .sweep import Engine
from .targets.plan import File, Options, Plan

if TYPE_CHECKING:
    from .base_model import BaseModel
__all__ = ["ConversionReport", "convert"]

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
    optimizer: Literal["adam", "lbfgs"]
    n_ff: int
    """Feed-forward length that the tensors have."""
    seconds: float
    """Wall time of the call."""
    dry_run: bool
    """True where everything was read and checked and nothing was written."""
    warnings: tuple[str, ...]
    """What is unusual about the source."""
    to: str = targets.DEFAULT
    """What was written: a name in `targets.TARGETS`."""
    notes: tuple[str, ...] = ()
    """What was left out of the target, or could not be kept as it was."""
    extra_outputs: tuple[str, ...] = ()
    """Files written beside the target."""


class _Nowhere:
    """An output that only counts: what a dry run writes to."""

    nbytes = 0

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        self.nbytes += sum(map(len, pieces))


def convert(
    source: StrPath | Checkpoint,
    target: StrPath,
    *,
    to: str | None = None,
    base: StrPath | None = None,
    base_out: StrPath | None = None,
    outtype: str = targets.OUTTYPES[0],
    token_embd: bool = True,
    ff: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    fsync: bool = False,
    check_finite: bool = False,
    engine: Engine = "auto",
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a finetune checkpoint to a GGUF checkpoint, or to what today's programs load.

    The target is complete or absent: it appears under its name in one step when all bytes are written.  An existing
    target stays as it is until then, and for good if anything fails.

    Parameters
    ----------
    source
        A ggcl file, or a `Checkpoint` that is open.
    target
        The GGUF file to write, or for PEFT the folder.  A symbolic link is followed, as `cp` does.
    to
        What to write: ``"checkpoint"`` (the default), the GGUF finetune checkpoint; ``"adapter"``, a GGUF LoRA
        adapter for llama.cpp; ``"merged"``, the base model with every delta added; ``"peft"``, a folder for Hugging
        Face's PEFT, which needs the extra ``peft``.
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
    ff
        The feed-forward length that the file must have.  Not needed: its tensors tell it, or in a file without
        layers the header does.
    force
        Replace existing targets.  A folder that holds other files than a PEFT adapter's is never replaced.
    dry_run
        Read and check everything, and write nothing.
    fsync
        Make the result survive a power failure before returning; without it that is left to the system.
    check_finite
        Fail where a tensor has NaN or infinite values.  Without it they are carried over like all others.
    engine
        What runs the pass over the records: see `sweep.pick_engine`.  An open `Checkpoint` has had its pass.
    progress
        Called now and then with the number of bytes moved since its last call.

    Raises
    ------
    CheckpointError
        The source is not a sound checkpoint, or not one with `ff`, or changed while it was read; or the base model is
        not sound, or not the one that it was trained on.
    FileExistsError
        There is a target and `force` is false.
    ModuleNotFoundError
        What the target needs is not installed; the message names the extra.
    OSError
        The source or the base model cannot be read or the target cannot be written.
    ValueError
        There is no such target, or it has no use for an option, or needs another.
    """
    begin = time.perf_counter()
    to = to or targets.DEFAULT
    given = {"base": base is not None, "base_out": base_out is not None, "token_embd": not token_embd}
    targets.check_options(to, outtype, given)
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source, engine=engine) as checkpoint:
            report = convert(
                checkpoint, target, to=to, base=base, base_out=base_out, outtype=outtype, token_embd=token_embd, ff=ff,
                force=force, dry_run=dry_run, fsync=fsync, check_finite=check_finite, progress=progress,
            )  # fmt: skip
        return report._replace(seconds=time.perf_counter() - begin)
    checkpoint = source
    _check_ff(checkpoint, ff)
    with _base_model(base) as model:
        options = Options(
            os.fspath(target), model, os.fspath(base_out) if base_out is not None else None, outtype, token_embd
        )
        sources = [checkpoint.source, *([model.source] if model is not None else [])]
        names = targets.TARGETS[to].folder
        if names:
            path = check_folder(sources, target, names, force=force)
        else:
            path = _check_targets(sources, [target], force)[0]
        if check_finite:
            finite.check_finite(checkpoint)
        plan = targets.planner(to)(checkpoint, options)
        if dry_run:
            nbytes = _count(plan, progress)
        elif names:
            nbytes = _write_folder(sources, plan, path, fsync, progress)
        else:
            paths = [path] if len(plan.files) == 1 else _check_targets(sources, plan.names(target), force)
            nbytes = _write(sources, plan, paths, fsync, progress)
    return ConversionReport(
        source=checkpoint.source.name,
        target=os.fspath(target),
        n_tensors=plan.n_tensors,
        source_bytes=checkpoint.source.size,
        target_bytes=nbytes,
        optimizer=checkpoint.optimizer.name,
        n_ff=checkpoint.parameters.n_ff,
        seconds=time.perf_counter() - begin,
        dry_run=dry_run,
        warnings=checkpoint.warnings,
        to=to,
        notes=plan.notes,
        extra_outputs=tuple(file.name for file in plan.files if file.name and not targets.TARGETS[to].folder),
    )


def _base_model(path: StrPath | None) -> contextlib.AbstractContextManager[BaseModel | None]:
    """Open the base model where there is one."""
    if path is None:
        return contextlib.nullcontext()
    from .base_model import BaseModel

    return BaseModel(path)


def _check_ff(checkpoint: Checkpoint, ff: int | None) -> None:
    """Hold that the feed-forward length is `ff`."""
    n_ff = checkpoint.parameters.n_ff
    if ff is not None and ff != n_ff:
        raise CheckpointError(
            "the feed-forward length asked for is not the file's", source=checkpoint.source.name, field="n_ff",
            expected=ff, found=n_ff, hint="leave it out: the tensors tell it",
        )  # fmt: skip


def _check_targets(sources: Sequence[Source], names: Sequence[StrPath], force: bool) -> list[str]:
    """Return the path of each of the files `names`, as `files.check_target` does; no two may be the same."""
    paths: list[str] = []
    for name in names:
        for source in sources:
            path = check_target(source, name, force=force)
        if path in paths:
            raise shutil.SameFileError(errno.EINVAL, "Two outputs are the same file", os.fspath(name))
        paths.append(path)
    return paths


def _count(plan: Plan, progress: Progress | None) -> int:
    """Do everything but write, and return the bytes that there would be."""
    nowhere = _Nowhere()
    for file in plan.files:
        file.write(nowhere, progress)
    return nowhere.nbytes


def _write(sources: Sequence[Source], plan: Plan, paths: Sequence[str], fsync: bool, progress: Progress | None) -> int:
    """Write the files of `plan` to `paths`, and return how many bytes they have."""
    if len(paths) == 1:
        with OutputFile(paths[0], fsync=fsync) as output:
            _fill(sources, output, plan.files[0], progress)
        return output.nbytes
    with OutputFiles(paths, fsync=fsync) as outputs:
        for output, file in zip(outputs, plan.files):
            _fill(sources, output, file, progress)
    return sum(output.nbytes for output in outputs)


def _write_folder(sources: Sequence[Source], plan: Plan, path: str, fsync: bool, progress: Progress | None) -> int:
    """Write the files of `plan` into a new folder `path`, and return how many bytes they have."""
    with OutputFolder(path, fsync=fsync) as folder:
        for file in plan.files:
            with folder.file(file.name) as output:
                _fill(sources, output, file, progress)
    return folder.nbytes


def _fill(sources: Sequence[Source], output: OutputFile, file: File, progress: Progress | None) -> None:
    """Write one file, and hold that nothing it came from changed meanwhile."""
    if file.about >= _PREALLOCATED:
        output.preallocate(file.about)
    file.write(output, progress)
    for source in sources:
        source.check_unchanged()
