"""What a target answers: the files that it would write.

A target's module has a function ``plan(checkpoint, options, base, outputs)`` that returns a `Plan`.  `base` is the
open `base_model.BaseModel` or None, and `outputs` are the names that `names.outputs` gave.  It holds everything that
can be known beforehand against the checkpoint, and raises before any file is begun.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..storage.outputs import Writer
from ..storage.urls import StrPath
from .options import Options

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from .base_model import BaseModel

__all__ = ["File", "Plan", "Planner", "planner"]


class File(NamedTuple):
    """A file that a target writes."""

    write: Callable[[Writer], object]
    """Append all its bytes."""
    nbytes: int
    """Bytes that it will have."""
    name: str = ""
    """Its name in the target, where that is a folder."""
    same_as: tuple[str, frozenset[tuple[object, ...]]] | None = None
    """Path and identity of a file that has the same bytes, names within it aside."""


class Plan(NamedTuple):
    """What a target would write."""

    files: tuple[File, ...]
    """As many as there are outputs, in their order; or those of the folder."""
    n_tensors: int
    """Tensors in all files, copies of the base model's left out."""
    notes: tuple[str, ...] = ()
    """What the user should know: what was left out, or could not be kept as it was."""
    late: Callable[[], tuple[str, ...]] = tuple
    """Warnings of what is known only when all is written."""

    def with_copy(self, path: str, identity: frozenset[tuple[object, ...]]) -> Plan:
        """Return the plan with its first file, the copy of a base model, the same as another."""
        return self._replace(files=(self.files[0]._replace(same_as=(path, identity)), *self.files[1:]))


Planner = Callable[["Checkpoint", Options, "BaseModel | None", Sequence[StrPath]], Plan]


@functools.cache
def planner(to: str) -> Planner:
    """Return the function ``plan`` of target `to`, importing its module."""
    plan: Planner = importlib.import_module(f"{__package__}.{to}").plan
    return plan
