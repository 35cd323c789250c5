"""A GGUF model, in one file or in several, opened as one.

llama.cpp's gguf-split names the files ``NAME-00001-of-00003.gguf`` and so on; the first has the keys, and all have
``split.no``, ``split.count`` and ``split.tensors.count``.  Whichever of them is named, all are opened.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final

import gguf
import numpy as np

from ..errors import CheckpointError
from ..storage.joined import Joined
from ..storage.opening import open_source
from ..storage.sources import Source
from ..storage.urls import StrPath, located
from .gguf_header import GGUFHeader, read_header
from .gguf_keys import GGUFKeys
from .gguf_tensors import no_twins

__all__ = ["open_model"]

_K = gguf.Keys.Split
_COUNT, _NUMBER, _TENSORS = _K.LLM_KV_SPLIT_COUNT, _K.LLM_KV_SPLIT_NO, _K.LLM_KV_SPLIT_TENSORS_COUNT
_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)


def open_model(path: StrPath) -> tuple[Source, GGUFHeader]:
    """Open the model at `path`; return its bytes, and a header whose tensors are where they are in them.

    Raises
    ------
    CheckpointError
        It is no sound GGUF file, or one of several that do not belong together.
    OSError
        It, or another file of the model, cannot be opened or read.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(open_source(path)))
        header = read_header(source)
        n_files = GGUFKeys(source.name, header).count(_COUNT)
        if n_files <= 1:
            stack.pop_all()
            return source, header
    name = located(path)
    match = _NAME.fullmatch(name)
    if match is None or int(match[3]) != n_files or not 1 <= int(match[2]) <= n_files:
        raise CheckpointError(
            f"one of {n_files} files, and its name does not tell those of the others", source=source.name, field=_COUNT,
            expected=f"a name that ends in -00001-of-{n_files:05}.gguf", found=n_files,
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        sources: list[Source] = []
        headers: list[GGUFHeader] = []
        for number in range(n_files):
            place = f"{match[1]}-{number + 1:05}-of-{n_files:05}.gguf"
            one = stack.enter_context(contextlib.closing(open_source(place)))
            sources.append(one)
            headers.append(read_header(one))
            for key, expected in (_NUMBER, number), (_COUNT, n_files):
                if (found := GGUFKeys(one.name, headers[-1]).count(key)) != expected:
                    raise CheckpointError(
                        "not the file that its name says", source=one.name, field=key, expected=expected, found=found
                    )
        joined = Joined(sources)
        header = _joined(joined, headers)
        stack.pop_all()
    return joined, header


def _joined(source: Joined, headers: list[GGUFHeader]) -> GGUFHeader:
    """Return the header of the first file with the tensors of all."""
    first = headers[0]
    names = tuple(name for header in headers for name in header.names)
    n_tensors = GGUFKeys(source.name, first).count(_TENSORS)
    if n_tensors != len(names):
        raise CheckpointError(
            "the files do not belong together", source=source.name, field=_TENSORS, expected=n_tensors, found=len(names)
        )
    no_twins(source, names)
    tables = [header.table.copy() for header in headers]
    for table, start in zip(tables, source.starts):
        table["offset"] += start
    return first._replace(names=names, table=np.concatenate(tables))
