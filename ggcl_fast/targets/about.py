"""What an output says about itself: names, the model that it is for, and by what training it came to be.

Keys are gguf's own wherever it has one.  Three more are this project's: its version, a fingerprint of the training, and
how much of that is in the file, so that the same deltas are not added twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import gguf

from .. import __version__
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, printable
from ..formats.gguf_writer import KeyValue, packed
from ..formats.signatures import HOLDS, MADE_BY, TRAINING
from ..storage.sources import read_at
from ..storage.urls import last_part
from .deltas import lora_a, lora_b, trains_norms
from .options import Options

if TYPE_CHECKING:
    from .base_model import BaseModel

__all__ = [
    "ALL",
    "NORMS",
    "copy_fingerprint",
    "edited_keys",
    "file_type",
    "fingerprint",
    "model_card",
    "of_adapter",
    "of_model",
    "refuse_twice",
]

ALL: Final = "every delta"
"""Of a merged model."""
NORMS: Final = "deltas of norms"
"""Of the copy of a base model that an adapter comes with."""
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$", re.ASCII)
_SAMPLE: Final = 1024  # bytes of a tensor

_K = gguf.Keys.General
_T = gguf.GGUFValueType
Counts = Mapping[gguf.GGMLQuantizationType, int]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return what tells this training from others: its shapes, and some values of its first and last pair.

    It is the same for a checkpoint and the adapter beside it; an adapter that this project wrote tells it.
    """
    known = checkpoint.extra.get(TRAINING)
    if isinstance(known, str):
        return known
    digest = hashlib.blake2b(digest_size=16)
    table = checkpoint.table
    of_pairs = [pair for pair in checkpoint.pairs if not pair.is_norm]
    shapes = [(pair.weight, pair.n_in, pair.n_out, pair.rank, pair.scale) for pair in of_pairs]
    digest.update(repr(sorted(shapes)).encode())
    for pair in sorted(of_pairs)[:: max(1, len(of_pairs) - 1)]:
        for row in (pair.row_a, pair.row_b):
            digest.update(
                read_at(checkpoint.source, int(table["offset"][row]), min(_SAMPLE, int(table["nbytes"][row])))
            )
    return digest.hexdigest()


def copy_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return what tells the copy of a base model with its norms from those of others; None where none was trained.

    Two checkpoints with the same have the same norms from the same training.
    """
    if not trains_norms(checkpoint):
        return None
    digest = hashlib.blake2b(fingerprint(checkpoint).encode(), digest_size=16)
    for pair in sorted(pair for pair in checkpoint.pairs if pair.is_norm):
        a, b = lora_a(checkpoint, pair), lora_b(checkpoint, pair)
        digest.update(repr((pair.weight, a.shape, b.shape)).encode() + a.tobytes() + b.tobytes())
    return digest.hexdigest()


def refuse_twice(checkpoint: Checkpoint, base: BaseModel, *, adds: str) -> None:
    """Hold that `base` does not have already what is to be added, `ALL` or `NORMS` of `checkpoint`.

    Raises
    ------
    CheckpointError
        It was made with the same checkpoint.
    """
    holds = base.header.keys.get(HOLDS)
    has_norms = any(pair.is_norm for pair in checkpoint.pairs)
    twice = holds == ALL or (holds == NORMS and has_norms)
    if twice and base.header.keys.get(TRAINING) == fingerprint(checkpoint):
        raise CheckpointError(
            f"this model has {holds} of the same training already: they would count twice", source=base.source.name,
            field=TRAINING, found=checkpoint.source.name, expected="another training",
            hint="hand in the model that it was made from; --force (force=True) adds " + adds + " all the same",
        )  # fmt: skip


def of_adapter(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> list[KeyValue]:
    """Return the keys of a GGUF adapter that say what it is and where it comes from."""
    return [
        KeyValue(_K.NAME, _name(checkpoint, options, base), _T.STRING),
        *_of_base(options, base),
        *_of_training(checkpoint, None),
    ]


def of_model(checkpoint: Checkpoint, options: Options, base: BaseModel, holds: str) -> list[KeyValue]:
    """Return the keys that tell a model from the base that it was made from; `holds` is `ALL` or `NORMS`."""
    name = _name(checkpoint, options, base) + (" (norms)" if holds == NORMS else "")
    return [KeyValue(_K.NAME, name, _T.STRING), *_of_base(options, base), *_of_training(checkpoint, holds)]


def model_card(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> str:
    """Return the README.md of a PEFT folder: its name, the base model, and how it came to be."""
    lines = ["---", "library_name: peft"]
    if options.base_model_id is not None:
        lines.append(f"base_model: {json.dumps(options.base_model_id)}")  # JSON's strings are YAML's
    name = printable(_name(checkpoint, options, base), longest=1000)
    training = checkpoint.training
    trained = f" after {training.iterations:,} iterations" if training.iterations else ""
    source = printable(last_part(checkpoint.source.name), longest=1000)
    lines += [
        "---",
        "",
        f"# {_plain(name)}",
        "",
        f"A LoRA adapter, converted by ggcl_fast {__version__} from `{_plain(source)}`{trained}.",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Return a name from outside without what Markdown or HTML would take for its own."""
    return re.sub(r"[`<>\[\]*_#|\\]", " ", text)


def _name(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> str:
    source = _stem(checkpoint.source.name)
    return _text(options.name or (f"{_base_name(base)} + {source}" if base is not None else source))


def _text(name: str) -> str:
    """Return a name that can be written as UTF-8, as GGUF's strings are: file names need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def _base_name(base: BaseModel) -> str:
    name = base.header.keys.get(_K.NAME)
    return name if isinstance(name, str) and name else _text(_SHARD.sub("", _stem(base.source.name)))


def _stem(name: str) -> str:
    return os.path.splitext(last_part(name))[0]


def _of_base(options: Options, base: BaseModel | None) -> list[KeyValue]:
    facts = []
    if base is not None:
        facts.append((_K.BASE_MODEL_NAME, _base_name(base)))
    if options.base_model_id is not None:
        owner, _, model = options.base_model_id.rpartition("/")
        if base is None:
            facts.append((_K.BASE_MODEL_NAME, model))
        if owner:
            facts.append((_K.BASE_MODEL_ORGANIZATION, owner))
        facts.append((_K.BASE_MODEL_REPO_URL, f"https://huggingface.co/{options.base_model_id}"))
    if not facts:
        return []
    count = KeyValue(_K.BASE_MODEL_COUNT, 1, _T.UINT32)
    return [count, *(KeyValue(key.format(id=0), value, _T.STRING) for key, value in facts)]


def _of_training(checkpoint: Checkpoint, holds: str | None) -> list[KeyValue]:
    facts = {MADE_BY: __version__, TRAINING: fingerprint(checkpoint), HOLDS: holds}
    return [KeyValue(key, value, _T.STRING) for key, value in facts.items() if value is not None]


def edited_keys(base: BaseModel, entries: list[KeyValue]) -> tuple[int, bytes]:
    """Return the number of keys of a model that is made from `base`, and their bytes.

    They are the base's as they stand, but for `entries`, which come second, behind the architecture; for what was said
    of the base's own base; and for what a file says that is one of several.
    """
    new = {entry.name for entry in entries}
    fields = base.header.fields
    kept = [
        name
        for name in fields
        if name not in new and not name.startswith(("split.", "general.base_model.")) and name != _K.ARCHITECTURE
    ]
    spans: list[tuple[int, int]] = []
    for name in kept:
        start, stop = fields[name].start, fields[name].stop
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    first = fields[_K.ARCHITECTURE]
    pieces = [_bytes(base, first.start, first.stop), packed(entries), *(_bytes(base, *span) for span in spans)]
    return 1 + len(entries) + len(kept), b"".join(pieces)


def _bytes(base: BaseModel, start: int, stop: int) -> bytes:
    return bytes(read_at(base.source, start, stop - start))


def file_type(before: Counts, after: Counts) -> list[KeyValue]:
    """Return the key that tells of what type most weights are, where that is another than it was.

    Of each type the number of weights is given.
    """
    usual = max(after, key=lambda type: after[type], default=None)
    if usual is None or usual == max(before, key=lambda type: before[type]):
        return []
    return [KeyValue(_K.FILE_TYPE, int(_FILE_TYPES.get(usual, gguf.LlamaFileType.GUESSED)), _T.UINT32)]


_FILE_TYPES: Final = {
    gguf.GGMLQuantizationType[name]: gguf.LlamaFileType[f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
}
