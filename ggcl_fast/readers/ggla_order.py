"""Where the records of a far ggla file will be, by the order in which finetune wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..formats.layout import ALIGNMENT, RECORD
from ..formats.schema import LAYER_MODULES, MODEL_MODULES, MODULES, Module
from ..storage.sources import Source

__all__ = ["Prediction"]

_HEAD: Final = RECORD.itemsize + 8  # bytes before the name of a record with two dims
_MOST_PREDICTED: Final = 1 << 16  # records


class Prediction:
    """Where the records of a far source will be, in finetune's order, so that they are fetched together.

    What no record has told yet is guessed: lora_r as the rank, 1 for norms, LLaMA's vocabulary and n_ff, GGUF's names.
    A wrong guess costs another request, when a record is not where it was fetched from.
    """

    def __init__(self, rank: int) -> None:
        self._ranks = {m.rank: 1 if m.n_out == "one" else rank for m in MODULES}
        self._dims: dict[str, int] = {}
        self._old_names = False
        self._shorter: dict[tuple[str, int], int] = {}  # bytes that a record's head lacks, by rank and end
        self._fetched: set[int] = set()

    def serve(self, source: Source, index: int, position: int) -> None:
        """Have record `index`, at `position`, fetched with all that follow, if it is not there."""
        if position not in self._fetched:
            offsets = list(self._offsets(index, position, source.size))
            source.prefetch(offsets)
            self._fetched = set(offsets)

    def learn(self, index: int, head: int, record: tuple[int, ...]) -> None:
        """Take from a record, whose data could begin after `head` bytes, what the next ones will be like."""
        module, end, layer = _expected(index)
        self._ranks[module.rank] = record[2]
        self._dims.setdefault(module.n_out if end else module.n_in, record[3])
        names = _name_lengths(module, layer)
        if names[0] != names[1]:
            self._old_names = abs(head - _HEAD - names[1]) < abs(head - _HEAD - names[0])
        self._shorter[module.rank, end] = _HEAD + names[self._old_names] - head

    def _offsets(self, index: int, position: int, size: int) -> Iterator[int]:
        for i in range(index, index + _MOST_PREDICTED):
            if position >= size:
                return
            yield position
            module, end, layer = _expected(i)
            name = _name_lengths(module, layer)[self._old_names]
            head = max(0, _HEAD + name - self._shorter.get((module.rank, end), 0))
            data = -(-(position + head) // ALIGNMENT) * ALIGNMENT
            position = data + 4 * self._ranks[module.rank] * self._dim(module.n_out if end else module.n_in)

    def _dim(self, name: str) -> int:
        n_embd = self._dims.get("n_embd", 4096)
        guesses = {"one": 1, "n_vocab": 32000, "n_ff": -(-(2 * (4 * n_embd) // 3) // 256) * 256}
        return self._dims.get(name, guesses.get(name, n_embd))


def _expected(index: int) -> tuple[Module, int, int]:
    """Return the module of record `index` in finetune's order, 0 for its A or 1 for its B, and its layer."""
    pair, end = divmod(index, 2)
    if pair < len(MODEL_MODULES):
        return MODEL_MODULES[pair], end, 0
    layer, i = divmod(pair - len(MODEL_MODULES), len(LAYER_MODULES))
    return LAYER_MODULES[i], end, layer


def _name_lengths(module: Module, layer: int) -> tuple[int, int]:
    """Return the length of a tensor's name, in GGUF's style and in the old one."""
    old = module.weight if module in MODEL_MODULES else f"layers.{layer}.{module.weight}"
    return len(f"{module.base_name.format(bid=layer)}.weight.loraA"), len(f"{old}.weight.loraA")
