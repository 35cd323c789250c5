"""What a target is asked for, and what it answers: the files that it would write.

A target's module has a function ``plan(checkpoint, options)`` that returns a `Plan`.  It holds everything that can be
known beforehand against the checkpoint, and raises before any file is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..payload import Output, Progress
from ..sources import StrPath

if TYPE_CHECKING:
    from ..base_model import BaseModel

__all__ = ["File", "Options", "Plan"]


class Options(NamedTuple):
    """What the caller asked for beside source and target."""

    target: str
    """Path of the target as the caller gave it."""
    base: BaseModel | None = None
    base_out: str | None = None
    """Where the base model with patched norms goes."""
    outtype: str = "f32"
    """Type of the tensors of an adapter: f32, f16 or bf16."""
    token_embd: bool = True
    """Whether an adapter has the pair of the token embeddings."""


class File(NamedTuple):
    """A file that a target writes."""

    write: Callable[[Output, Progress | None], object]
    """Append all its bytes to an output."""
    about: int
    """Bytes that it will have at the most, or about: what is reserved before the work."""
    name: str = ""
    """Path of an extra file, or the name within a target that is a folder; empty for the target itself."""


class Plan(NamedTuple):
    """What a target would write."""

    files: tuple[File, ...]
    """In the order in which they are written and appear."""
    n_tensors: int
    """Tensors in all files, copies of the base model's left out."""
    notes: tuple[str, ...] = ()
    """What the user should know: what was left out, or could not be kept as it was."""

    def names(self, target: StrPath) -> list[StrPath]:
        """Return the path of each file, where `target` is not a folder."""
        return [file.name or target for file in self.files]
