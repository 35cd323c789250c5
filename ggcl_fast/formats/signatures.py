"""What a file is, by its first bytes.

Tells what can be read from the files that people hand in instead, and says what serves those: the same for checkpoints
and for base models.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .layout import GGCL_MAGIC, GGLA_MAGIC, GGUF_MAGIC

__all__ = [
    "BEFORE", "GGCL", "GGLA", "GGUF", "HOLDS", "LEFT_OUT", "LONGEST_SIGNATURE", "MADE_BY", "TRAINING", "Format",
    "found", "recognise",
]  # fmt: skip


class Format(NamedTuple):
    """A format of files."""

    signature: bytes
    """How it starts; with `offset`, what stands there."""
    name: str
    """What to call it."""
    hint: str | None = None
    """What serves it."""
    offset: int = 0
    """Byte offset of the signature."""


GGCL: Final = Format(GGCL_MAGIC.to_bytes(4, "little"), "a finetune checkpoint (ggcl)")
GGUF: Final = Format(GGUF_MAGIC, "a GGUF file")
GGLA: Final = Format(GGLA_MAGIC.to_bytes(4, "little"), "an adapter (ggla)")

_OLD_MODEL: Final = "convert the original model anew with llama.cpp's convert_hf_to_gguf.py"
_UNPACK: Final = "unpack it, and hand in what is in it"
_PAGE: Final = "download the file itself: at Hugging Face by /resolve/main/ and not by /blob/main/"
_SERVER: Final = "it holds what the server said instead of the file: download it again, signed in if need be"
_BOM: Final = b"\xef\xbb\xbf"
_FORMATS: Final = (
    GGCL,
    GGUF,
    GGLA,
    Format(
        b"ggcl", "a byte-swapped checkpoint (ggcl)", "from a big-endian machine; only little-endian ones can be read"
    ),
    Format(b"ggla", "a byte-swapped adapter (ggla)", "from a big-endian machine; only little-endian ones can be read"),
    Format(
        b"pcgg",
        "a train-text-from-scratch checkpoint (ggcp)",
        "convert-train-checkpoint-to-gguf.py of llama.cpp's tag b1300 and its time reads it",
    ),
    Format(b"lmgg", "an old model (ggml)", _OLD_MODEL),
    Format(b"fmgg", "an old model (ggmf)", _OLD_MODEL),
    Format(b"tjgg", "an old model (ggjt)", _OLD_MODEL),
    Format(
        b"PK\x03\x04",
        "a zip archive, such as PyTorch's",
        "unpack it, or load it with torch.load",
    ),
    Format(b"\x80\x02\x8a\x0a", "an old PyTorch file", "load it with torch.load"),
    Format(b"version https://git-lfs", "a Git LFS pointer", "git lfs pull fetches the file that it stands for"),
    Format(b"\x1f\x8b\x08", "a gzip archive", _UNPACK),
    Format(b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    Format(b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    Format(b"BZh", "a bzip2 archive", _UNPACK),
    Format(b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    Format(b"ustar", "a tar archive", _UNPACK, 257),
    Format(_BOM, "text, or a file before which an editor has put a byte order mark", "download it again"),
    Format(b"Entry not found", "an error text of a server", _SERVER),
    Format(b"Access to ", "an error text of a server", _SERVER),
    Format(b"Repository not found", "an error text of a server", _SERVER),
    Format(b"Invalid ", "an error text of a server", _SERVER),
    Format(b'{"error"', "an error text of a server", _SERVER),
    Format(b"{", "a JSON text", "what a program says of a file, or a server instead of it: the values are elsewhere"),
)
_SAFETENSORS: Final = Format(
    b"", "a safetensors file", "load it with the safetensors library; llama.cpp's convert_hf_to_gguf.py and "
    "convert_lora_to_gguf.py make GGUF files of such models and adapters",
)  # fmt: skip
_HTML: Final = Format(b"", "an HTML page", _PAGE)
_PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<?xml")
_ZEROS: Final = Format(b"", "zeros where it begins", "a download that was never finished: download it again")

MADE_BY: Final = "ggcl_fast.version"
"""Key of a GGUF file that this project wrote, checkpoints apart, which are what the old script wrote."""
HOLDS: Final = "ggcl_fast.holds"
"""Key of a model among them: how much of a training is in it."""
LEFT_OUT: Final = "ggcl_fast.left_out"
"""Key of an adapter among them: what of the training is not in it, where something is not."""
TRAINING: Final = "ggcl_fast.training"
"""Key of all of them: by what training they came to be."""
BEFORE: Final = "ggcl_fast.before"
"""Key of a model among them: the trainings that its base was made with, each of which norms alone behind a colon."""
LONGEST_SIGNATURE: Final = 262
"""Bytes of a file that `recognise` asks for."""


def recognise(start: bytes) -> Format | None:
    """Return what a file that begins with `start` is, None where it is nothing known."""
    if start.removeprefix(_BOM).lstrip()[:16].lower().startswith(_PAGES):
        return _HTML
    for one in _FORMATS:
        if start.startswith(one.signature, one.offset):
            return one
    # safetensors: u64 length of a JSON object, which follows
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000:
        return _SAFETENSORS
    return _ZEROS if len(start) > 8 and not any(start) else None


def found(start: bytes) -> tuple[str, str | None]:
    """Say what a file that begins with `start` is, and what serves it, where it is not what was expected."""
    if not start:
        return "an empty file", None
    format = recognise(start)
    return (f"something that begins with {start[:4]!r}", None) if format is None else (format.name, format.hint)
