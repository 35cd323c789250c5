"""Values of keys of a GGUF file, held to the types and ranges that they must have: what is wrong is said here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, NoReturn

import gguf

from ..errors import CheckpointError
from .finetune_keys import ARCHITECTURE, Key, is_architecture
from .gguf_header import GGUFHeader

__all__ = ["GGUFKeys"]

_T = gguf.GGUFValueType
_INTEGERS: Final = (_T.UINT8, _T.INT8, _T.UINT16, _T.INT16, _T.UINT32, _T.INT32, _T.UINT64, _T.INT64)
_LARGEST_COUNT: Final = (1 << 31) - 1


class GGUFKeys:
    """The keys of one file.

    Parameters
    ----------
    source
        What messages call the file.
    header
        Of the file.
    """

    def __init__(self, source: str, header: GGUFHeader) -> None:
        self.source = source
        self.header = header

    def __contains__(self, name: str) -> bool:
        return name in self.header.fields

    def get(self, key: Key) -> Any:
        """Return the value of a key that must be there, of its type."""
        return self._typed(key.name, (key.type,), key.type.name.lower())

    def positive(self, key: Key) -> int:
        """Return a number that cannot be 0."""
        value: int = self.get(key)
        if value == 0:
            self.refuse(key.name, "at least 1")
        return value

    def count(self, name: str) -> int:
        """Return how many of something there are, of any type of integers; 0 where the key is not there."""
        expected = f"an integer of 0 to {_LARGEST_COUNT}"
        value: int = self._typed(name, _INTEGERS, expected) if name in self else 0
        if not 0 <= value <= _LARGEST_COUNT:
            self.refuse(name, expected)
        return value

    def architecture(self) -> str:
        """Return the architecture."""
        arch: str = self.get(ARCHITECTURE)
        if not is_architecture(arch):
            self.refuse(ARCHITECTURE.name, "the name of an architecture")
        return arch

    def _typed(self, name: str, types: Collection[gguf.GGUFValueType], expected: str) -> Any:
        field = self.header.fields.get(name)
        if field is None:
            self.refuse(name, expected, "the key is missing")
        if field.type not in types:
            self.refuse(name, expected, found=field.type.name.lower())
        if name not in self.header.keys:
            self.refuse(name, "a shorter string", found=f"{field.length} bytes")
        return self.header.keys[name]

    def refuse(
        self, name: str, expected: str, problem: str = "", *, found: object = None, hint: str | None = None
    ) -> NoReturn:
        """Raise that a key cannot have the value that it has, or cannot be without one.

        Parameters
        ----------
        name, problem, expected, hint
            As of `CheckpointError`.
        found
            By default the value.
        """
        field, value = self.header.fields.get(name), self.header.keys.get(name)
        if found is None:
            found = f"'{value}'" if isinstance(value, str) else value
        if found is None:
            found = "none" if field is None else f"{field.type.name.lower()} of {field.length}"
        raise CheckpointError(
            problem, source=self.source, field=name, offset=None if field is None else field.value,
            expected=expected, found=found, hint=hint,
        )  # fmt: skip
