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
from .sources import Source, StrPath, is_url, public_name
from .sweep import Engine
from .targets.plan import File, Options, Plan

if TYPE_CHECKING:
    from .base_model import BaseModel
    from .remote import RemoteOutput

__all__ = ["ConversionReport", "convert", "target_exists"]

_LOCAL = "Where there are several outputs, they are files on a local disk"
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
    to: str = targets.DEFAULT
    """What was written: a name in `targets.TARGETS`."""
    notes: tuple[str, ...] = ()
    """What was left out of the target, or could not be kept as it was."""
    extra_outputs: tuple[str, ...] = ()
    """Files written beside the target."""


class _Place(NamedTuple):
    """What holds for every output of a conversion; see `convert`."""

    force: bool
    parents: bool
    fsync: bool


class _Nowhere:
    """An output that only counts: what a dry run writes to."""

    nbytes = 0

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        self.nbytes += sum(map(len, pieces))


def target_exists(target: StrPath) -> bool:
    """Tell whether there is something at `target`, a path or a URL; what is there is whole."""
    if is_url(target):
        from .remote import remote_exists

        return remote_exists(str(target))
    return os.path.exists(target)


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
    parents: bool = False,
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
        A file in any form that `readers.open_checkpoint` reads, by path or URL, or an open `Checkpoint`.
    target
        The GGUF file to write, or for PEFT the folder.  A symbolic link is followed, as `cp` does.  One file may also
        go to a URL.
    to
        What to write: ``"checkpoint"`` (the default for a ggcl file), the GGUF finetune checkpoint; ``"adapter"``
        (the default for all others), a GGUF LoRA adapter for llama.cpp; ``"merged"``, the base model with every delta
        added; ``"peft"``, a folder for Hugging Face's PEFT, which needs the extra ``peft``.
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
    parents
        Make the folders above the targets where they are missing.
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
        The source is not a sound checkpoint, or not one with `ff`, or changed while it was read, or holds less or more
        than the target can; or the base model is not sound, or not the one that it was trained on.
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
    given = {"base": base is not None, "base_out": base_out is not None, "token_embd": not token_embd}
    if to is not None:
        targets.check_options(to, outtype, given)
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source, engine=engine) as checkpoint:
            report = convert(
                checkpoint, target, to=to, base=base, base_out=base_out, outtype=outtype, token_embd=token_embd, ff=ff,
                force=force, parents=parents, dry_run=dry_run, fsync=fsync, check_finite=check_finite,
                progress=progress,
            )  # fmt: skip
        return report._replace(seconds=time.perf_counter() - begin)
    checkpoint = source
    if to is None:
        to = targets.default_for(checkpoint.kind)
        targets.check_options(to, outtype, given)
    _check_ff(checkpoint, ff)
    place = _Place(force, parents, fsync)
    with _base_model(base) as model:
        options = Options(
            os.fspath(target), model, os.fspath(base_out) if base_out is not None else None, outtype, token_embd
        )
        sources = [checkpoint.source, *([model.source] if model is not None else [])]
        names = targets.TARGETS[to].folder
        path = _check_folder(sources, target, names, place) if names else ""
        outputs = [] if names else _outputs(sources, [target], place)
        if check_finite:
            finite.check_finite(checkpoint)
        plan = targets.planner(to)(checkpoint, options)
        if not names and len(plan.files) > 1:
            outputs = _outputs(sources, plan.names(target), place)
        if dry_run:
            nbytes = _count(plan, progress)
        elif names:
            nbytes = _write_folder(sources, plan, path, place, progress)
        else:
            nbytes = _write(sources, plan, outputs, place, progress)
    return ConversionReport(
        source=checkpoint.source.name,
        target=outputs[0].path if is_url(target) else os.fspath(target),
        n_tensors=plan.n_tensors,
        source_bytes=checkpoint.source.size,
        target_bytes=nbytes,
        optimizer=checkpoint.optimizer.name if checkpoint.optimizer is not None else None,
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


def _outputs(sources: Sequence[Source], names: Sequence[StrPath], place: _Place) -> list[OutputFile | RemoteOutput]:
    """Return the outputs that `names` name, checked; no two may be the same.  Nothing is made before they are entered.

    Only one that is alone can be a URL: stores have nothing that makes two objects appear together.
    """
    urls = [str(name) for name in names if is_url(name)]
    if urls and len(names) > 1:
        raise OSError(errno.EOPNOTSUPP, _LOCAL, public_name(urls[0]))
    if urls:
        from .remote import RemoteOutput

        return [RemoteOutput(urls[0], sources[0], force=place.force)]
    outputs: list[OutputFile | RemoteOutput] = []
    for name in names:
        for source in sources:
            path = check_target(source, name, force=place.force, parents=place.parents)
        if path in (output.path for output in outputs):
            raise shutil.SameFileError(errno.EINVAL, "Two outputs are the same file", os.fspath(name))
        outputs.append(OutputFile(path, fsync=place.fsync, parents=place.parents))
    return outputs


def _check_folder(sources: Sequence[Source], target: StrPath, names: Sequence[str], place: _Place) -> str:
    """Return the path of the folder `target`."""
    if is_url(target):
        raise OSError(errno.EOPNOTSUPP, _LOCAL, public_name(str(target)))
    path = os.path.realpath(target)
    if place.parents and not os.path.exists(os.path.dirname(path)):
        return path
    return check_folder(sources, target, names, force=place.force)


def _count(plan: Plan, progress: Progress | None) -> int:
    """Do everything but write, and return the bytes that there would be."""
    nowhere = _Nowhere()
    for file in plan.files:
        file.write(nowhere, progress)
    return nowhere.nbytes


def _write(
    sources: Sequence[Source],
    plan: Plan,
    outputs: Sequence[OutputFile | RemoteOutput],
    place: _Place,
    progress: Progress | None,
) -> int:
    """Write the files of `plan`, and return how many bytes they have."""
    if len(outputs) == 1:
        with outputs[0] as output:
            _fill(sources, output, plan.files[0], progress)
        return output.nbytes
    with OutputFiles([each.path for each in outputs], fsync=place.fsync, parents=place.parents) as files:
        for file, each in zip(files, plan.files):
            _fill(sources, file, each, progress)
    return sum(file.nbytes for file in files)


def _write_folder(sources: Sequence[Source], plan: Plan, path: str, place: _Place, progress: Progress | None) -> int:
    """Write the files of `plan` into a new folder `path`, and return how many bytes they have."""
    with OutputFolder(path, fsync=place.fsync, parents=place.parents) as folder:
        for file in plan.files:
            with folder.file(file.name) as output:
                _fill(sources, output, file, progress)
    return folder.nbytes


def _fill(sources: Sequence[Source], output: OutputFile | RemoteOutput, file: File, progress: Progress | None) -> None:
    """Write one file, and hold that nothing it came from changed meanwhile."""
    if file.about >= _PREALLOCATED:
        output.preallocate(file.about)
    file.write(output, progress)
    for source in sources:
        source.check_unchanged()
