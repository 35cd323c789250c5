"""What an output says about itself: names, the model that it is for, and by what training it came to be.

Keys are gguf's own wherever it has one.  Three more are this project's: its version, a fingerprint of the training, and
how much of that is in the file, so that the same deltas are not added twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import gguf

from .. import __version__
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, printable
from ..formats.gguf_writer import KeyValue, packed
from ..formats.signatures import BEFORE, HOLDS, LEFT_OUT, MADE_BY, TRAINING
from ..storage.sources import read_at
from ..storage.urls import last_part
from .names import SHARD
from .options import Options, is_model_id

if TYPE_CHECKING:
    from .base_model import BaseModel

__all__ = [
    "ALL",
    "NORMS",
    "base_model_id",
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
_SAMPLE: Final = 1024  # bytes of a tensor
_LEFT_NORMS: Final = "norms"
_NORMS_ALONE: Final = ":norms"

_HUB: Final = "https://huggingface.co/"
_CARRIED: Final = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
"""Keys of an adapter that say how to use it."""

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


def refuse_twice(checkpoint: Checkpoint, base: BaseModel, *, adds: str) -> None:
    """Hold that `base` does not have already what is to be added, `ALL` or `NORMS` of `checkpoint`.

    Raises
    ------
    CheckpointError
        It was made with the same checkpoint.
    """
    own, known = fingerprint(checkpoint), _trainings(base)
    has_norms = any(pair.is_norm for pair in checkpoint.pairs)
    if own in known or (has_norms and own + _NORMS_ALONE in known):
        is_last = base.header.keys.get(TRAINING) == own
        holds = base.header.keys.get(HOLDS) if is_last else ALL if own in known else NORMS
        raise CheckpointError(
            f"this model has {holds} of the same training already: they would count twice", source=base.source.name,
            field=TRAINING, found=checkpoint.source.name, expected="another training",
            hint="hand in the model that it was made from; --force (force=True) adds " + adds + " all the same",
        )  # fmt: skip


def _trainings(base: BaseModel) -> list[str]:
    """Return the fingerprints of what `base` was made with, as `BEFORE` has them."""
    before, last, holds = (str(base.header.keys.get(key, "")) for key in (BEFORE, TRAINING, HOLDS))
    return [*before.split(), *([last + _NORMS_ALONE * (holds == NORMS)] if last else [])]


def of_adapter(
    checkpoint: Checkpoint, options: Options, base: BaseModel | None, weights_left_out: Sequence[str]
) -> list[KeyValue]:
    """Return the keys of a GGUF adapter that say what it is and where it comes from.

    Norms are never in it, nor is the delta of the weights that are named; what a source has said of it holds on.
    """
    told = checkpoint.extra.get(LEFT_OUT)
    left_out = [told] if isinstance(told, str) else []
    left_out += [_LEFT_NORMS] * any(pair.is_norm for pair in checkpoint.pairs) + [*weights_left_out]
    carried = {key: _text(str(value)) for key, value in checkpoint.extra.items() if key in _CARRIED}
    facts = {MADE_BY: __version__, TRAINING: fingerprint(checkpoint)}
    if left_out:
        facts[LEFT_OUT] = _text(" and ".join(left_out))
    return [
        KeyValue(_K.NAME, _name(checkpoint, options, base), _T.STRING),
        *_strings(carried),
        *(_of_base(options, base) or _as_told(checkpoint)),
        *_strings(facts),
    ]


def of_model(checkpoint: Checkpoint, options: Options, base: BaseModel, holds: str) -> list[KeyValue]:
    """Return the keys that tell a model from the base that it was made from; `holds` is `ALL` or `NORMS`."""
    name = _name(checkpoint, options, base) + (" (norms)" if holds == NORMS else "")
    left_out = checkpoint.extra.get(LEFT_OUT)
    own, known = fingerprint(checkpoint), _trainings(base)
    is_there = left_out == _LEFT_NORMS and own + _NORMS_ALONE in known
    if holds == ALL and isinstance(left_out, str) and not is_there:
        holds = _text(f"deltas, but none of {left_out},")
    facts = {MADE_BY: __version__, TRAINING: own, HOLDS: holds}
    if before := [one for one in dict.fromkeys(known) if one.removesuffix(_NORMS_ALONE) != own]:
        facts[BEFORE] = _text(" ".join(before))
    return [KeyValue(_K.NAME, name, _T.STRING), *_of_base(options, base), *_strings(facts)]


def model_card(checkpoint: Checkpoint, options: Options, base: BaseModel | None) -> str:
    """Return the README.md of a PEFT folder: its name, the base model, and how it came to be."""
    lines = ["---", "library_name: peft"]
    if (model := base_model_id(checkpoint, options)) is not None:
        lines.append(f"base_model: {json.dumps(model)}")  # JSON's strings are YAML's
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
    own = checkpoint.extra.get(_K.NAME)
    source = own if isinstance(own, str) and own else _stem(checkpoint.source.name)
    if base is not None and not source.startswith(before := f"{_base_name(base)} + "):
        source = before + source
    return _text(options.name or source)


def _text(name: str) -> str:
    """Return a name that can be written as UTF-8, as GGUF's strings are: file names need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def _base_name(base: BaseModel) -> str:
    """Return the base model's name; of a copy with other norms the name of the model that it was made from."""
    keys = base.header.keys
    name = keys.get(_K.BASE_MODEL_NAME.format(id=0) if keys.get(HOLDS) == NORMS else _K.NAME)
    return name if isinstance(name, str) and name else _text(SHARD.sub("", _stem(base.source.name)))


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
        if owner and is_model_id(options.base_model_id):
            facts.append((_K.BASE_MODEL_ORGANIZATION, owner))
        if is_model_id(options.base_model_id):
            facts.append((_K.BASE_MODEL_REPO_URL, _HUB + options.base_model_id))
    if not facts:
        return []
    count = KeyValue(_K.BASE_MODEL_COUNT, 1, _T.UINT32)
    return [count, *(KeyValue(key.format(id=0), value, _T.STRING) for key, value in facts)]


def _as_told(checkpoint: Checkpoint) -> list[KeyValue]:
    """Return what an adapter says of its base model, as it stands."""
    told = {key: value for key, value in checkpoint.extra.items() if key.startswith("general.base_model.")}
    count = told.get(_K.BASE_MODEL_COUNT)
    counted = [KeyValue(_K.BASE_MODEL_COUNT, count, _T.UINT32)] if isinstance(count, int) and 0 < count < 2**32 else []
    return [*counted, *_strings({key: _text(value) for key, value in told.items() if isinstance(value, str)})]


def base_model_id(checkpoint: Checkpoint, options: Options) -> str | None:
    """Return the base model's id at Hugging Face: the one that is asked for, or that an adapter tells."""
    url = checkpoint.extra.get(_K.BASE_MODEL_REPO_URL.format(id=0))
    if options.base_model_id is not None or not isinstance(url, str):
        return options.base_model_id
    model = url.removeprefix(_HUB)
    return model if url.startswith(_HUB) and is_model_id(model) else None


def _strings(facts: Mapping[str, str]) -> list[KeyValue]:
    return [KeyValue(key, value, _T.STRING) for key, value in facts.items()]


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
    gguf.GGMLQuantizationType[name]: file_type
    for name, file_type in (
        *((one.name.partition("_")[2], one) for one in gguf.LlamaFileType if "_" in one.name),
        *((f"Q{bits}_K", gguf.LlamaFileType[f"MOSTLY_Q{bits}_K_M"]) for bits in (3, 4, 5)),
    )
    if name in gguf.GGMLQuantizationType.__members__
}
"""By the type of most weights; of mixtures that bear a type's name the middle one."""
