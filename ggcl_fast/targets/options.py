"""What is asked of a job: made once, by whoever asks, and handed down unchanged to the target."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Final, Literal, TypedDict

from ..errors import CheckpointError
from ..storage.outputs import Progress
from ..storage.urls import StrPath
from . import DEFAULT, OUTTYPES, TARGETS

__all__ = ["ROWS", "Choices", "Options", "is_model_id"]

_FLAGS: Final = {
    "base": "--base (base=)",
    "base_out": "--base-out (base_out=)",
    "token_embd": "--no-token-embd (token_embd=False)",
    "heads": "--heads (heads=)",
    "rows": "--rows (rows=)",
    "arch": "--arch (arch=)",
    "name": "--name (name=)",
    "base_model_id": "--base-model-id (base_model_id=)",
}
_MODEL_ID: Final = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
ROWS: Final = ("auto", "gguf")
"""How rows of q and k are taken: as the file is known to have them, or as those of GGUF's models whatever they are."""


class Choices(TypedDict, total=False):
    """What `Options` can be made with, for those who pass it on as keywords; `conversion.convert` explains it."""

    to: str | None
    base: StrPath | None
    base_out: StrPath | None
    outtype: str
    token_embd: bool
    heads: tuple[int, int] | None
    rows: str
    arch: str | None
    name: str | None
    base_model_id: str | None
    ff: int | None
    force: bool
    parents: bool
    dry_run: bool
    fsync: bool
    check_finite: bool
    engine: Literal["auto", "numba", "python"]
    progress: Progress | None
    twice: bool | None


def is_model_id(text: str) -> bool:
    """Tell whether `text` can be the id of a model at Hugging Face, with its owner or without."""
    return _MODEL_ID.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything about a conversion but its source and its target; `conversion.convert` says what each means.

    Raises
    ------
    ValueError
        There is no such target, or it has no use for an option, or needs another.
    """

    to: str | None = None
    """A name in `TARGETS`; None for what the source's format becomes by default, see `for_format`."""
    base: StrPath | None = None
    base_out: StrPath | None = None
    outtype: str = OUTTYPES[0]
    token_embd: bool = True
    heads: tuple[int, int] | None = None
    """n_head and n_head_kv."""
    rows: str = ROWS[0]
    arch: str | None = None
    name: str | None = None
    base_model_id: str | None = None
    ff: int | None = None
    force: bool = False
    parents: bool = False
    dry_run: bool = False
    fsync: bool = False
    check_finite: bool = False
    engine: Literal["auto", "numba", "python"] = "auto"
    progress: Progress | None = None
    twice: bool | None = None
    """Whether deltas may be added to a model that has them already; None for where `force` is given."""

    def __post_init__(self) -> None:
        given = {
            "base": self.base is not None,
            "base_out": self.base_out is not None,
            "token_embd": not self.token_embd,
            "heads": self.heads is not None,
            "rows": self.rows != ROWS[0],
            "arch": self.arch is not None,
            "name": self.name is not None,
            "base_model_id": self.base_model_id is not None,
        }
        if self.rows not in ROWS:
            raise ValueError(f"{_FLAGS['rows']}: expected one of {', '.join(ROWS)}, found {self.rows!r}")
        if self.heads is not None and (len(self.heads) != 2 or min(self.heads) < 1):
            raise ValueError(f"{_FLAGS['heads']}: expected two numbers of at least 1, found {self.heads!r}")
        model = self.base_model_id  # or a folder, which transformers takes in its place
        if model is not None and not (is_model_id(model) or os.path.isdir(model)):
            raise ValueError(
                f"{_FLAGS['base_model_id']}: expected an id at Hugging Face, such as meta-llama/Llama-2-7b-hf, "
                f"found {model!r}"
            )
        if self.to is not None:
            self._check_target(self.to, given)
        if given["base_out"] and not given["base"]:
            raise ValueError(f"{_FLAGS['base_out']} needs {_FLAGS['base']}")

    def _check_target(self, to: str, given: dict[str, bool]) -> None:
        if to not in TARGETS:
            raise ValueError(f"to: expected one of {', '.join(TARGETS)}, found {to!r}")
        target = TARGETS[to]
        for name, is_given in given.items():
            if is_given and name not in target.takes:
                raise ValueError(f"{_FLAGS[name]} means nothing with --to {to}")
            if not is_given and name in target.needs:
                raise ValueError(f"--to {to} needs {_FLAGS[name]}")
        if self.outtype not in target.outtypes:
            choice = " or ".join(target.outtypes)
            raise ValueError(f"--outtype (outtype=) with --to {to}: expected {choice}, not {self.outtype}")

    def replacing(self) -> Options:
        """Return the same with leave to replace outputs, and no leave for anything else that `force` gives."""
        return dataclasses.replace(self, force=True, twice=self.adds_twice)

    @property
    def adds_twice(self) -> bool:
        """Whether deltas may be added to a model that has them already."""
        return self.force if self.twice is None else self.twice

    def for_format(self, format: str, source: str) -> Options:
        """Return the same with `to` chosen, for a source of this name and format (`Checkpoint.format`).

        Raises
        ------
        CheckpointError
            Something is asked for that means nothing to what such a file becomes.
        """
        if self.to is not None:
            return self
        to = DEFAULT if format == "ggcl" else "adapter"
        try:
            return dataclasses.replace(self, to=to)
        except ValueError as error:
            hint = f"a {format} file becomes that unless --to (to=) says otherwise"
            raise CheckpointError(str(error), source=source, hint=hint) from None

    @property
    def folder(self) -> tuple[str, ...]:
        """Names of the target's files where it is a folder; empty where it is a file, as it is by default."""
        return TARGETS[self.to].folder if self.to is not None else ()
