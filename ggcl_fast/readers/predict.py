"""Where the records of a ggcl file are, from its shape alone, and the proof that a file has them there.

A record's data starts at a multiple of 32 and has a known length, so the next record starts at a known distance from
one: nothing depends on what was found before.  Offsets, sizes and all words of heads and names follow from the layers,
the dims, the ranks and n_ff, which stands in the first record of w1 at a place that does not depend on it.  They are
computed once a shape; a file is proved by one gather of these words and one comparison.

Records that are not all as predicted, up to 128 layers of them at a time, are swept instead, see `sweep`: that alone
says what is wrong, and takes what is odd and can be read.  The answer is the same either way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..formats.layout import ALIGNMENT, RECORD, TENSOR
from ..formats.schema import MODULES, N_FF, OPTIMIZER_TENSORS, Schema, smallest_size
from ..storage.sources import Source, read_at

__all__ = [
    "RANKS", "Prediction", "Shape", "joined", "known", "place_of_n_ff", "predict", "predict_in", "predict_state",
    "prove", "smallest",
]  # fmt: skip

_HEAD_WORDS: Final = RECORD.itemsize // 4 + 2  # with two dims
_NE1_WORD: Final = _HEAD_WORDS - 1
_KEPT: Final = 4  # predictions; one of 128 layers takes 0.7 MB

RANKS: Final = tuple(module.rank for module in MODULES)
"""Fields of `layout.HEADER` with the ranks, in the order of `schema.MODULES`."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Records that follow each other.  Equal to itself alone, so that it can be a key of a cache."""

    table: npt.NDArray[np.void]
    """(n,) `layout.TENSOR`, read-only."""
    words: npt.NDArray[np.uint32]
    """What stands in all heads and names, one after the other; names end with zeros, as padding does."""
    places: npt.NDArray[np.int64]
    """Where each of `words` stands, in words from the start of the file."""
    begins: npt.NDArray[np.int64]
    """(n + 1,) where each record's words begin in `words`, and where they end."""
    position: int
    """Byte offset of what follows."""
    gguf: int
    """Offset in the GGUF data section of what follows."""
    n_ff: int = 0
    """Feed-forward length that they have."""

    @functools.cached_property
    def as_bytes(self) -> bytes:
        """`words`, which are compared faster so."""
        return self.words.tobytes()


class Shape(NamedTuple):
    """What decides where records are, besides the layers and n_ff."""

    n_vocab: int
    n_embd: int
    ranks: tuple[int, ...]
    """In the order of `RANKS`."""

    @property
    def ranks_by_name(self) -> dict[str, int]:
        """The ranks as `schema.Schema.expected` takes them."""
        return dict(zip(RANKS, self.ranks))

    @property
    def dims(self) -> dict[str, int]:
        """The dims as `schema.Schema.expected` takes them."""
        return {"n_vocab": self.n_vocab, "n_embd": self.n_embd}

    def expected(self, schema: Schema) -> npt.NDArray[np.int64]:
        """Return what `schema.Schema.expected` gives for it."""
        return schema.expected(self.ranks_by_name, self.dims)


@functools.lru_cache(maxsize=8 * _KEPT)
def smallest(shape: Shape, n_layer: int, n_ff: int = 1) -> int:
    """Return the bytes that the records of `n_layer` layers take at least, see `schema.smallest_size`."""
    return smallest_size(n_layer, shape.ranks_by_name, {**shape.dims, "n_ff": n_ff})


@functools.lru_cache(maxsize=_KEPT)
def place_of_n_ff(schema: Schema, shape: Shape, position: int) -> int | None:
    """Return the byte offset of the first dim that is n_ff, of records from `position` on; None where none is."""
    expected = shape.expected(schema)
    told = np.flatnonzero(expected[:, 2] == N_FF)[:1]
    if not len(told):
        return None
    before = expected[: int(told[0])]
    _, end = _records(before, 4 * before[:, 1] * before[:, 2], position)
    return end + 4 * _NE1_WORD


def _records(
    expected: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64], position: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the byte offset of each record, and of what follows; the first is at `position`."""
    heads = 4 * _HEAD_WORDS + expected[:, 4]
    before = np.concatenate([[position], nbytes[:-1]])[: len(nbytes)]  # all that matters of it is modulo 32
    lengths = heads + -(before + heads) % ALIGNMENT + nbytes
    ends = position + np.cumsum(lengths)
    return ends - lengths, int(ends[-1]) if len(ends) else position


@functools.lru_cache(maxsize=_KEPT)
def predict(schema: Schema, shape: Shape, *, position: int, gguf: int, n_ff: int) -> Prediction:
    """Predict records, whose sizes were found to fit into a file; the last few answers are kept.

    Parameters
    ----------
    schema, shape
        The records.
    position, gguf, n_ff
        Byte offset of the first record in the file, and of its data in the GGUF data section; the feed-forward length.
    """
    expected = shape.expected(schema)
    ne1 = np.where(expected[:, 2] == N_FF, n_ff, expected[:, 2])
    nbytes = 4 * expected[:, 1] * ne1
    table = np.zeros(len(expected), TENSOR)
    records, end = _records(expected, nbytes, position)
    padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
    ends = np.append(records[1:], end)
    for field, column in (
        ("record", records), ("offset", ends - nbytes), ("nbytes", nbytes), ("ne0", expected[:, 1]), ("ne1", ne1),
        ("n_dims", expected[:, 0]), ("gguf_offset", gguf + np.cumsum(padded) - padded),
    ):  # fmt: skip
        table[field] = column
    table.flags.writeable = False

    name_words = -(-expected[:, 4] // 4)
    counts = _HEAD_WORDS + name_words
    begins = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(int(begins[-1])) - np.repeat(begins[:-1], counts)
    places = np.repeat(records // 4, counts) + within
    words = schema.name_words[np.maximum(np.repeat(expected[:, 3] - _HEAD_WORDS, counts) + within, 0)]
    for i, column in enumerate((expected[:, 0], expected[:, 4], np.zeros_like(ne1), expected[:, 1], ne1)):
        words[begins[:-1] + i] = column
    return Prediction(table, words, places, begins, end, gguf + int(padded.sum()), n_ff)


def _words(window: memoryview) -> npt.NDArray[np.uint32]:
    return np.frombuffer(window, "<u4", len(window) // 4)


def predict_in(
    source: Source, schema: Schema, shape: Shape, n_layer: int, *, position: int, gguf: int, n_ff: int
) -> Prediction | None:
    """Predict records of `source`, a file of `n_layer` layers, as `predict` does; None where it cannot have them.

    Where `n_ff` is 0 it is not known yet, and read from its place.
    """
    if not n_ff and (place := place_of_n_ff(schema, shape, position)) is not None:
        n_ff = int.from_bytes(read_at(source, place, 4), "little")
        if not n_ff:
            return None
    # In Python's integers, so that nothing that follows can be too large for an int64.
    if smallest(shape, n_layer, n_ff or 1) > source.size:
        return None
    return predict(schema, shape, position=position, gguf=gguf, n_ff=n_ff)


@functools.lru_cache(maxsize=_KEPT)
def predict_state(dims: tuple[tuple[int, ...], ...], *, position: int, gguf: int) -> Prediction:
    """Predict the optimizer's records, which have no names: of these dims, none for an absent one."""
    table = np.zeros(len(dims), TENSOR)
    words: list[int] = []
    places: list[int] = []
    begins = [0]
    for row, ne in zip(table, dims):
        words += (len(ne), 0, 0, *ne)
        places += range(position // 4, position // 4 + RECORD.itemsize // 4 + len(ne))
        begins.append(len(words))
        ne0, ne1 = (*ne, 1, 1)[:2] if ne else (0, 1)
        offset = -(-(position + RECORD.itemsize + 4 * len(ne)) // ALIGNMENT) * ALIGNMENT
        nbytes = 4 * ne0 * ne1
        for field, value in (
            ("record", position), ("offset", offset), ("nbytes", nbytes), ("ne0", ne0), ("ne1", ne1),
            ("n_dims", len(ne)), ("gguf_offset", gguf),
        ):  # fmt: skip
            row[field] = value
        position, gguf = offset + nbytes, gguf + -(-nbytes // ALIGNMENT) * ALIGNMENT
    table.flags.writeable = False
    some = np.array(words, np.uint32), np.array(places, np.int64), np.array(begins, np.int64)
    return Prediction(table, *some, position, gguf)


def joined(
    pieces: Sequence[tuple[tuple[str, ...], npt.NDArray[np.void]]], optimizer: str, state: npt.NDArray[np.void]
) -> tuple[tuple[str, ...], npt.NDArray[np.void]]:
    """Return names and rows of all tensors that are there: LoRA tensors, then those of the optimizer's state."""
    present = state["n_dims"] > 0
    of_state = [f"optimizer.{optimizer}.{name}" for name, _ in OPTIMIZER_TENSORS[optimizer]]
    names = itertools.chain(*(names for names, _ in pieces), itertools.compress(of_state, present))
    # As plain bytes: numpy copies structured rows field by field.
    raw = f"V{TENSOR.itemsize}"
    tables = [table.view(raw) for _, table in pieces]
    return tuple(names), np.concatenate([*tables, state[present].view(raw)]).view(TENSOR)


@functools.lru_cache(maxsize=_KEPT)
def known(
    schema: Schema, prediction: Prediction, optimizer: str, state: Prediction
) -> tuple[tuple[str, ...], npt.NDArray[np.void]]:
    """Return what `joined` does where all was predicted, the same objects for the next file of the shape."""
    names, table = joined([(schema.names, prediction.table)], optimizer, state.table)
    table.flags.writeable = False
    return names, table


def prove(source: Source, prediction: Prediction) -> bool:
    """Tell whether all records of `prediction` were found in `source` as they are predicted."""
    if prediction.position > source.size:
        return False
    if source.memory is not None and (words := _words(source.memory)).flags.aligned:
        # All places are in the file: with "clip" numpy need not make sure of it, which takes as long as the rest.
        return words.take(prediction.places, mode="clip").tobytes() == prediction.as_bytes
    records = prediction.table["record"]
    stops = 4 * prediction.places[prediction.begins[1:] - 1] + 4
    first = 0
    while first < len(records):
        start, window = source.window(int(records[first]))
        last = int(np.searchsorted(stops, start + len(window), "right"))
        some = slice(prediction.begins[first], prediction.begins[last])
        found = _words(window).take(prediction.places[some] - start // 4)
        if last <= first or not np.array_equal(found, prediction.words[some]):
            return False
        first = last
    return True
