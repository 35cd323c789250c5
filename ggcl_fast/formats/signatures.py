"""What a file is, by its first bytes.

Tells what can be read from the files that people hand in instead, and says what serves those.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .layout import GGCL_MAGIC, GGLA_MAGIC, GGUF_MAGIC

__all__ = ["GGCL", "GGLA", "GGUF", "LONGEST_SIGNATURE", "MADE_BY", "Format", "recognise"]


class Format(NamedTuple):
    """A format of files."""

    signature: bytes
    """How it starts."""
    name: str
    """What to call it."""
    hint: str | None = None
    """What serves it."""


GGCL: Final = Format(GGCL_MAGIC.to_bytes(4, "little"), "a finetune checkpoint (ggcl)")
GGUF: Final = Format(GGUF_MAGIC, "a GGUF file")
GGLA: Final = Format(GGLA_MAGIC.to_bytes(4, "little"), "an adapter (ggla)")

_OLD_MODEL: Final = "convert the original model anew with llama.cpp's convert_hf_to_gguf.py"
_FORMATS: Final = (
    GGCL,
    GGUF,
    GGLA,
    Format(
        b"ggcl", "a byte-swapped checkpoint (ggcl)", "from a big-endian machine; only little-endian ones can be read"
    ),
    Format(
        b"pcgg",
        "a train-text-from-scratch checkpoint (ggcp)",
        "convert-train-checkpoint-to-gguf.py of llama.cpp's tag b1300 and its time reads it",
    ),
    Format(b"lmgg", "an old model (ggml)", _OLD_MODEL),
    Format(b"fmgg", "an old model (ggmf)", _OLD_MODEL),
    Format(b"tjgg", "an old model (ggjt)", _OLD_MODEL),
    Format(b"PK\x03\x04", "a zip archive, such as PyTorch's", "load it with torch.load"),
)
_SAFETENSORS: Final = Format(b"", "a safetensors file", "load it with the safetensors library")

MADE_BY: Final = "ggcl_fast.version"
"""Key of a GGUF file that this project wrote, checkpoints apart, which are what the old script wrote."""
LONGEST_SIGNATURE: Final = 9
"""Bytes of a file that `recognise` asks for."""


def recognise(start: bytes) -> Format | None:
    """Return what a file that begins with `start` is, None where it is nothing known."""
    for one in _FORMATS:
        if start.startswith(one.signature):
            return one
    # safetensors: u64 length of a JSON object, which follows
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000:
        return _SAFETENSORS
    return None
