"""Copies of a base model in which only the norms are changed, which adapters come with: which are alike, and are there.

finetune kept its latest checkpoint under two names, and an adapter beside each: four files of one training, whose
adapters are all for the same copy.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, NamedTuple

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..formats.gguf_tensors import GGUFTensor
from ..formats.signatures import HOLDS, TRAINING
from ..storage.sources import Source, read_at
from ..storage.urls import StrPath, is_url, last_part, located
from .about import NORMS, fingerprint, trainings
from .base_model import BaseModel
from .deltas import Census, lora_a, lora_b, trains_norms
from .names import copy_of_base, copy_prefix
from .options import Options

__all__ = ["Found", "copy_fingerprint", "find_copy", "has_norms_of"]

_SAMPLE: Final = 1024  # bytes of a tensor


class Found(NamedTuple):
    """A copy that is there."""

    path: StrPath
    warnings: tuple[str, ...]
    """What is unusual about the deltas of norms that it has."""


def copy_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return what tells the copy that an adapter of `checkpoint` comes with from others; None where it has none.

    Two checkpoints with the same have the same norms from the same training.
    """
    if not trains_norms(checkpoint):
        return None
    digest = hashlib.blake2b(fingerprint(checkpoint).encode(), digest_size=16)
    for pair in sorted(pair for pair in checkpoint.pairs if pair.is_norm):
        a, b = lora_a(checkpoint, pair), lora_b(checkpoint, pair)
        digest.update(repr((pair.weight, a.shape, b.shape)).encode() + a.tobytes() + b.tobytes())
    return digest.hexdigest()


def find_copy(checkpoint: Checkpoint, base: BaseModel, target: StrPath, options: Options) -> Found | None:
    """Return a copy of `base` that an adapter at `target` can go with, where a conversion beside it has left one.

    None where the adapter is to have its own: where something has the name of that, or the user has said where it
    goes.  URLs are not asked.
    """
    own = located(copy_of_base(target, options))
    if options.base_out is not None or is_url(own) or base.source.far or os.path.lexists(own):
        return None
    folder, prefix = os.path.dirname(own), copy_prefix(options)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:  # told when it is written to
        return None
    for entry in entries:
        is_candidate = entry.name.startswith(prefix) and entry.name.endswith(".gguf") and entry.is_file()
        if is_candidate and entry.name != last_part(target):
            path, census = os.path.join(folder, entry.name), Census()
            if has_norms_of(checkpoint, base, path, census):
                return Found(path, census.warnings())
    return None


def has_norms_of(checkpoint: Checkpoint, base: BaseModel, path: StrPath, census: Census) -> bool:
    """Tell whether `path` is the copy of `base` that an adapter of `checkpoint` would come with.

    By its keys and tensors: the values of norms, and some of every other.
    """
    norms = {pair.weight: pair for pair in checkpoint.pairs if pair.is_norm}
    try:
        with BaseModel(path) as copy:
            keys = copy.header.keys
            if (keys.get(TRAINING), keys.get(HOLDS)) != (trainings(checkpoint, base), NORMS):
                return False
            if copy.header.names != base.header.names:
                return False
            for ours, theirs in zip(base.header.tensors(), copy.header.tensors()):
                if ours.name in norms:
                    data = bytes(read_at(copy.source, theirs.offset, theirs.nbytes))
                    same = data == base.norm(checkpoint, norms[ours.name], census).tobytes()
                else:
                    same = ours[:3] == theirs[:3] and _sample(base.source, ours) == _sample(copy.source, theirs)
                if not same:
                    return False
            return True
    except (CheckpointError, OSError):  # something else than a copy
        return False


def _sample(source: Source, tensor: GGUFTensor) -> bytes:
    """Return some bytes of a tensor, from its middle."""
    n = min(tensor.nbytes, _SAMPLE)
    return bytes(read_at(source, tensor.offset + (tensor.nbytes - n) // 2, n))
