"""What is written: one module for each kind of output, each of which takes a `Checkpoint`.

To add a kind, write its module with a function ``plan(checkpoint, options)``, as `targets.plan` says, and name it in
`TARGETS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from .plan import Options, Plan

__all__ = ["DEFAULT", "OUTTYPES", "TARGETS", "Target", "check_options", "default_for", "planner"]

OUTTYPES: Final = ("f32", "f16", "bf16")
"""Types that an adapter's tensors can have; the first is the default."""
DEFAULT: Final = "checkpoint"


class Target(NamedTuple):
    """A kind of output."""

    what: str
    """What to call it."""
    takes: tuple[str, ...] = ()
    """Which of the options base, base_out and token_embd mean something to it."""
    needs: tuple[str, ...] = ()
    """Which of them it cannot do without."""
    outtypes: tuple[str, ...] = OUTTYPES[:1]
    """Which types of `OUTTYPES` its tensors can have."""
    folder: tuple[str, ...] = ()
    """Names of its files, where the target is a folder."""


TARGETS: Final[Mapping[str, Target]] = {
    "checkpoint": Target("a GGUF finetune checkpoint"),
    "adapter": Target("a GGUF LoRA adapter for llama.cpp", ("base", "base_out", "token_embd"), outtypes=OUTTYPES),
    "merged": Target("the base model with every delta added", ("base",), ("base",)),
    "peft": Target(
        "a folder that Hugging Face's PEFT loads", ("base", "token_embd"),
        outtypes=("f32", "f16"), folder=("adapter_model.safetensors", "adapter_config.json"),
    ),
}  # fmt: skip
"""By the name of its module."""

_FLAGS: Final = {
    "base": "--base (base=)",
    "base_out": "--base-out (base_out=)",
    "token_embd": "--no-token-embd (token_embd=False)",
}


def default_for(kind: str) -> str:
    """Return what a file of this kind (`Checkpoint.kind`) becomes unless told otherwise."""
    return DEFAULT if kind == "ggcl" else "adapter"


def check_options(to: str, outtype: str, given: Mapping[str, bool]) -> None:
    """Hold options against what the target `to` takes; `given` says of each name in `Target.takes` whether it is set.

    Raises
    ------
    ValueError
        There is no such target, or an option that it needs is missing, or one is given that means nothing to it.
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, found {to!r}")
    target = TARGETS[to]
    for name, is_given in given.items():
        if is_given and name not in target.takes:
            raise ValueError(f"{_FLAGS[name]} means nothing with --to {to}")
        if not is_given and name in target.needs:
            raise ValueError(f"--to {to} needs {_FLAGS[name]}")
    if outtype not in target.outtypes:
        raise ValueError(f"--outtype (outtype=) with --to {to}: expected {' or '.join(target.outtypes)}, not {outtype}")
    if given["base_out"] and not given["base"]:
        raise ValueError(f"{_FLAGS['base_out']} needs {_FLAGS['base']}")


def planner(to: str) -> Callable[[Checkpoint, Options], Plan]:
    """Return the function ``plan`` of target `to`, importing its module."""
    plan: Callable[[Checkpoint, Options], Plan] = importlib.import_module(f"{__name__}.{to}").plan
    return plan
