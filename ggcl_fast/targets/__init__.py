"""What is written: one module for each kind of output, each of which plans the files that a `Checkpoint` becomes.

What affects one output lives in its module: ``plan(checkpoint, options, base, outputs)``, as `plan` says.  Nothing in
this wing knows where files go; it only names them.  To add an output, write its module and name it in `TARGETS`.

============  ==============================================================================
`options`     what is asked of a job, from the command down to here
`names`       which outputs a job has, and what each is called
`plan`        what a target answers: the files that it would write
`fitting`     a checkpoint and its base model, settled before anything is written
`rows`        order and number of the rows of B
`deltas`      A, B and norms of a checkpoint's pairs
`base_model`  the model that a checkpoint was trained on
`checkpoint`  the GGUF finetune checkpoint
`about`       what an output says about itself
`rewriting`   a model written anew from another, some weights changed
`copies`      copies of the base model with other norms: which are alike
`adapter`     a GGUF LoRA adapter, and a copy of the base model with its norms
`adding`      weights with their deltas added
`merged`      the base model with every delta added
`peft`        a folder for Hugging Face's PEFT
============  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["DEFAULT", "OUTTYPES", "TARGETS", "Target"]

OUTTYPES: Final = ("f32", "f16", "bf16")
"""Types that an adapter's tensors can have; the first is the default."""
DEFAULT: Final = "checkpoint"


class Target(NamedTuple):
    """A kind of output."""

    what: str
    """What to call it."""
    limits: str
    """What it cannot hold, or cannot do without, for those who choose."""
    takes: tuple[str, ...] = ()
    """Which of the options that not every target has mean something to it."""
    needs: tuple[str, ...] = ()
    """Which of them it cannot do without."""
    outtypes: tuple[str, ...] = OUTTYPES[:1]
    """Which types of `OUTTYPES` its tensors can have."""
    folder: tuple[str, ...] = ()
    """Names of its files, where the target is a folder."""


_ALL: Final = ("base", "heads", "rows", "name", "base_model_id")
TARGETS: Final[Mapping[str, Target]] = {
    "checkpoint": Target(
        "a GGUF finetune checkpoint",
        "what the old script made, byte for byte; of checkpoints alone; no llama.cpp of today trains it further",
    ),
    "adapter": Target(
        "a GGUF LoRA adapter for llama.cpp",
        "has no norms, which go into a copy of --base; none of tied embeddings, see --no-token-embd",
        (*_ALL, "base_out", "token_embd", "arch"), outtypes=OUTTYPES,
    ),
    "merged": Target(
        "the base model with every delta added",
        "needs --base, whose types it keeps where gguf can write them: others become F16",
        _ALL, ("base",),
    ),
    "peft": Target(
        "a folder that Hugging Face's PEFT loads",
        "of LLaMA's modules alone; has norms where --base gives their weights",
        (*_ALL, "token_embd"), outtypes=("f32", "f16"),
        folder=("adapter_model.safetensors", "adapter_config.json", "README.md"),
    ),
}  # fmt: skip
"""By the name of its module."""
