"""What is read: one module for each format of files, each of which gives a `Checkpoint`.

What affects reading one format lives in its module: ``read(source, engine)``, which puts the tensors into the
schema's order.  Nothing in this wing knows who asked, or what becomes of the checkpoint.  To add a format, write its
module, and name it in `_READERS`.

============  =====================================================================
`sweep`       the pass over the records of a ggcl file
`engine`      what runs it
`predict`     where the records are by the file's shape, and the proof that they are there
`ggcl`        finetune checkpoints
`by_name`     what formats share whose tensors are known by their names
`gguf`        finetune checkpoints in GGUF form
`gguf_lora`   LoRA adapters in GGUF form
`ggla`        the adapters that finetune wrote beside its checkpoints, and those of Hugging Face's that were converted
`ggla_order`  where their records will be
`tail`        files that end in zeros
============  =====================================================================
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Final

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, NotACheckpointError
from ..formats import signatures
from ..storage.opening import open_source
from ..storage.sources import Buffer, Source, SourceBuffer, read_at
from ..storage.urls import StrPath
from .engine import Engine, check_engine
from .tail import with_tail_noted, with_tail_told

__all__ = ["open_checkpoint", "read"]

_READERS: Final = {signatures.GGCL: "ggcl", signatures.GGUF: "gguf", signatures.GGLA: "ggla"}


def open_checkpoint(source: StrPath | Buffer, *, name: str = "<buffer>", engine: Engine = "auto") -> Checkpoint:
    """Open a checkpoint, in the ggcl or the GGUF form, or the ggla adapter that was written beside it.

    Its first bytes tell the format.  Reads what says where the tensors are; tensor data only where it is asked for.

    Parameters
    ----------
    source
        A file on a local disk; a URL that fsspec knows (extra ``remote``); or a whole file in memory: anything with a
        contiguous buffer, such as bytes, a memory map or a numpy array.  That is shared and not copied, and must not
        change while the checkpoint is in use.  Bytes are never a path.
    name
        What messages call a buffer.
    engine
        What runs the pass over the records of a ggcl file: see `engine.pick_engine`.

    Raises
    ------
    CheckpointError
        The file is not a checkpoint, or not a sound one.
    OSError
        It cannot be opened or read.
    TypeError
        `source` is none of these, or its buffer is not contiguous.

    Examples
    --------
    >>> with open_checkpoint("checkpoint.ggcl") as checkpoint:  # doctest: +SKIP
    ...     delta = checkpoint.tensors["output.weight.lora_b"] @ checkpoint.tensors["output.weight.lora_a"].T
    """
    # A path is what os.fspath takes, bytes apart.
    is_path = isinstance(source, str) or hasattr(source, "__fspath__")
    opened: Source = open_source(source) if is_path else SourceBuffer(source, name)  # type: ignore[arg-type]
    try:
        return read(opened, engine)
    except BaseException:
        opened.close()
        raise


def read(source: Source, engine: Engine = "auto") -> Checkpoint:
    """Read the checkpoint that `source` holds, whatever its format; raises as `open_checkpoint` does."""
    check_engine(engine)  # whether the format has a use for it or not
    start = bytes(read_at(source, 0, signatures.LONGEST_SIGNATURE))
    format = signatures.recognise(start)
    if format not in _READERS:
        found, hint = signatures.found(start)
        problem = f"this is neither a finetune checkpoint nor an adapter: it is {found}"
        raise NotACheckpointError(problem, source=source.name, found=found, hint=hint)
    try:
        checkpoint = _reader(_READERS[format])(source, engine)
    except CheckpointError as error:
        raise with_tail_told(error, source) from None
    return with_tail_noted(checkpoint, source)


@functools.cache
def _reader(module: str) -> Callable[[Source, Engine], Checkpoint]:
    """Return the function ``read`` of a module, importing it."""
    read: Callable[[Source, Engine], Checkpoint] = importlib.import_module(f"{__name__}.{module}").read
    return read
