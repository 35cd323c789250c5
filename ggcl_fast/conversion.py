"""One file: open a source, hand it to a target, put the output in place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import finite
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .files import OutputFile, check_target
from .payload import Progress
from .readers import open_checkpoint
from .sources import Source, StrPath, is_url
from .sweep import Engine
from .targets import checkpoint as finetune_gguf

if TYPE_CHECKING:
    from .remote import RemoteOutput

__all__ = ["ConversionReport", "convert", "target_exists"]

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
    """Bytes of the GGUF file."""
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


class _Nowhere:
    """An output that only counts: what a dry run writes to."""

    nbytes = 0

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        self.nbytes += sum(map(len, pieces))


def _output(source: Source, target: StrPath, *, force: bool, fsync: bool, parents: bool) -> OutputFile | RemoteOutput:
    """Return the output that `target` names; nothing is made before its ``with`` block."""
    if is_url(target):
        from .remote import RemoteOutput

        return RemoteOutput(str(target), source, force=force)
    return OutputFile(check_target(source, target, force=force, parents=parents), fsync=fsync, parents=parents)


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
    ff: int | None = None,
    force: bool = False,
    parents: bool = False,
    dry_run: bool = False,
    fsync: bool = False,
    check_finite: bool = False,
    engine: Engine = "auto",
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a ggcl checkpoint to a GGUF finetune checkpoint.

    The target is complete or absent: it appears under its name in one step when all bytes are written.  An existing
    target stays as it is until then, and for good if anything fails.

    Parameters
    ----------
    source
        A file in any form that `readers.open_checkpoint` reads, by path or URL, or an open `Checkpoint`.
    target
        The GGUF file to write, or a URL.  A symbolic link is followed, as `cp` does.
    ff
        The feed-forward length that the file must have.  Not needed: its tensors tell it, or in a file without
        layers the header does.
    force
        Replace an existing target.
    parents
        Make the folders above the target where they are missing.
    dry_run
        Read and check everything, and write nothing.
    fsync
        Make the result survive a power failure before returning; without it that is left to the system.  Stores
        behind URLs have their own rules.
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
        than `targets.checkpoint.write` can write.
    FileExistsError
        There is a target and `force` is false.
    OSError
        The source cannot be read or the target cannot be written.
    """
    begin = time.perf_counter()
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source, engine=engine) as checkpoint:
            report = convert(
                checkpoint, target, ff=ff, force=force, parents=parents, dry_run=dry_run, fsync=fsync,
                check_finite=check_finite, progress=progress,
            )  # fmt: skip
        return report._replace(seconds=time.perf_counter() - begin)
    checkpoint = source
    n_ff = checkpoint.parameters.n_ff
    if ff is not None and ff != n_ff:
        raise CheckpointError(
            "the feed-forward length asked for is not the file's", source=checkpoint.source.name, field="n_ff",
            expected=ff, found=n_ff, hint="leave it out: the tensors tell it",
        )  # fmt: skip
    output = _output(checkpoint.source, target, force=force, fsync=fsync, parents=parents)
    if check_finite:
        finite.check_finite(checkpoint)
    if dry_run:
        nowhere = _Nowhere()
        finetune_gguf.write(checkpoint, nowhere, progress)
        nbytes = nowhere.nbytes
    else:
        with output:
            if checkpoint.source.size >= _PREALLOCATED:
                output.preallocate(checkpoint.source.size)
            finetune_gguf.write(checkpoint, output, progress)
            checkpoint.source.check_unchanged()
        nbytes = output.nbytes
    return ConversionReport(
        source=checkpoint.source.name,
        target=output.path if is_url(target) else os.fspath(target),
        n_tensors=len(checkpoint.names),
        source_bytes=checkpoint.source.size,
        target_bytes=nbytes,
        optimizer=checkpoint.optimizer.name if checkpoint.optimizer is not None else None,
        n_ff=n_ff,
        seconds=time.perf_counter() - begin,
        dry_run=dry_run,
        warnings=checkpoint.warnings,
    )
