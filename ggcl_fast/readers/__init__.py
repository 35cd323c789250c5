"""What is read: one module for each kind of file, each of which gives a `Checkpoint`.

To add a kind, write its module with a function ``read(source, engine)``, and name it in `_READERS`.
"""

from __future__ import annotations

import importlib
from typing import Final

from .. import kinds
from ..checkpoint import Checkpoint
from ..errors import NotACheckpointError
from ..sources import Source, SourceFile, StrPath, is_url, read_at
from ..sweep import Engine, pick_engine

__all__ = ["open_checkpoint", "open_source", "read"]

_READERS: Final = {kinds.GGCL: "ggcl", kinds.GGUF: "gguf_checkpoint", kinds.GGLA: "ggla"}


def open_checkpoint(path: StrPath, *, engine: Engine = "auto") -> Checkpoint:
    """Open a checkpoint, in the ggcl or the GGUF form, or the ggla adapter that was written beside it.

    Its first bytes tell the kind.  Reads what says where the tensors are; tensor data only where it is asked for.

    Parameters
    ----------
    path
        A file on a local disk, or a URL that fsspec knows (extra ``remote``).
    engine
        What runs the pass over the records of a ggcl file: see `sweep.pick_engine`.

    Raises
    ------
    CheckpointError
        The file is not a checkpoint, or not a sound one.
    OSError
        It cannot be opened or read.

    Examples
    --------
    >>> with open_checkpoint("checkpoint.ggcl") as checkpoint:  # doctest: +SKIP
    ...     delta = checkpoint.tensors["output.weight.lora_b"] @ checkpoint.tensors["output.weight.lora_a"].T
    """
    source = open_source(path)
    try:
        return read(source, engine)
    except BaseException:
        source.close()
        raise


def open_source(path: StrPath) -> Source:
    """Return the bytes at `path`, a file on a local disk or a URL; raises `OSError`."""
    if is_url(path):
        from ..remote import SourceRemote

        return SourceRemote(str(path))
    return SourceFile(path)


def read(source: Source, engine: Engine = "auto") -> Checkpoint:
    """Read the checkpoint that `source` holds, whatever its kind; raises as `open_checkpoint` does."""
    pick_engine(engine, 0)  # refuses what is none, whether the kind of file needs one or not
    start = bytes(read_at(source, 0, kinds.LONGEST_SIGNATURE))
    kind = kinds.recognise(start)
    if kind not in _READERS:
        found = f"{start[:4]!r}" if start else "an empty file"
        if kind is not None:
            found += f", {kind.name}"
        raise NotACheckpointError(
            source=source.name, field="magic", offset=0,
            expected=" or ".join(f"{known.signature!r}" for known in _READERS), found=found,
            hint=kind.hint if kind is not None else None,
        )  # fmt: skip
    reader = importlib.import_module(f"{__name__}.{_READERS[kind]}")
    checkpoint: Checkpoint = reader.read(source, engine)
    return checkpoint
