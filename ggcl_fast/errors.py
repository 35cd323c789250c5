"""What can be wrong with a file, as exceptions.

Every complaint about the *content* of a file is a `CheckpointError`.  A file that cannot be opened, read
or written stays the `OSError` that it is, and a caller's mistake stays a `TypeError` or a plain `ValueError`.
This module knows no format; it only knows how a complaint is worded.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CheckpointError", "NotACheckpointError", "SourceChangedError", "TruncatedError", "printable"]

_LONGEST_QUOTE = 80
_LONGEST_PART = 1000  # characters of a part of a message, whatever a file or a server put into it
_LONGEST_PATH = 4096


def printable(text: str | bytes, *, longest: int = _LONGEST_QUOTE) -> str:
    """Return `text` safe to show on a terminal: control codes and invalid UTF-8 escaped, overlong text cut.

    Parameters
    ----------
    text
        A name from an untrusted file, or a path.
    longest
        Number of characters to show; a cut is marked with ``...``.
    """
    if isinstance(text, bytes):
        text = text[: 4 * longest].decode("utf-8", "backslashreplace")
    cut = text if len(text) <= longest else text[:longest] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


class CheckpointError(ValueError):
    """The file is not what it claims to be.  Root of every error that this package raises about content.

    The message says file, place, expected and found, in one line, each part escaped and no longer than a screen; the
    same facts are attributes, whole and as they are, for programs.
    Instances survive pickling, so that they cross process boundaries whole.

    Parameters
    ----------
    problem
        The fault in words, where "expected, found" does not say it all.
    source
        Name of the file.
    tensor, index
        Name and 0-based record number of the tensor concerned.
    field
        The field or part of the record, for instance ``"dims"``.
    offset
        Byte offset in the file of that field.
    expected, found
        What the format asks for and what stands there.
    hint
        The next step, where there is one.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        source: str = "",
        tensor: str | None = None,
        index: int | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: Any = None,
        found: Any = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.source = source
        self.tensor = tensor
        self.index = index
        self.field = field
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        """Put the parts together: here, and nowhere else, each of them is made safe to show."""
        parts = [printable(self.source, longest=_LONGEST_PATH)] if self.source else []
        if self.tensor is not None:
            number = "" if self.index is None else f"{self.index} "
            parts.append(f"tensor {number}'{printable(self.tensor)}'")
        place = _shown(self.field or "")
        if self.offset is not None:
            place += f"{' ' if place else ''}at offset {self.offset} ({self.offset:#x})"
        if place:
            parts.append(place)
        if self.problem:
            parts.append(_shown(self.problem))
        if self.expected is not None:
            parts.append(f"expected {_shown(self.expected)}, found {_shown(self.found)}")
        message = ": ".join(parts)
        return f"{message} ({_shown(self.hint)})" if self.hint else message

    def with_hint(self, hint: str) -> CheckpointError:
        """Return the same error with another next step."""
        return _rebuild(type(self), {**{name: getattr(self, name) for name in _FACTS}, "hint": hint})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in _FACTS})


_FACTS = ("problem", "source", "tensor", "index", "field", "offset", "expected", "found", "hint")


def _shown(part: object) -> str:
    return printable(str(part), longest=_LONGEST_PART)


def _rebuild(error: type[CheckpointError], facts: dict[str, Any]) -> CheckpointError:
    return error(**facts)


class NotACheckpointError(CheckpointError):
    """The file is something else altogether: its first bytes, or its keys, are not those of a checkpoint."""


class TruncatedError(CheckpointError):
    """The file ends before the bytes that it announces."""


class SourceChangedError(CheckpointError):
    """The file was shortened or rewritten while it was being read."""
