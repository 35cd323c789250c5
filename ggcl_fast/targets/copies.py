"""Copies of a base model in which only the norms are changed, which adapters come with: which are alike.

finetune kept its latest checkpoint under two names, and an adapter beside each: four files of one training, whose
adapters are all for the same copy.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

from ..checkpoint import Checkpoint
from ..formats.signatures import HOLDS, TRAINING
from ..storage.sources import read_at
from ..storage.urls import StrPath, located
from .about import NORMS, fingerprint
from .base_model import BaseModel
from .deltas import Census, lora_a, lora_b, trains_norms

__all__ = ["Seen", "copy_fingerprint", "look_at_copy"]


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


class Seen(NamedTuple):
    """A copy that was looked at."""

    identity: frozenset[tuple[object, ...]]
    """As of `identity.identities`."""
    warnings: tuple[str, ...]
    """What is unusual about its norms."""


def look_at_copy(checkpoint: Checkpoint, base: BaseModel, path: StrPath) -> Seen | None:
    """Look whether `path` is the copy of `base` that an adapter of `checkpoint` would come with; None where it is not.

    It was made in this run, of a checkpoint with the same `copy_fingerprint`: what is left to be seen is that neither
    that nor the base has changed meanwhile.
    """
    census = Census()
    try:
        if base.source.far or os.stat(base.source.name).st_ctime_ns > os.stat(located(path)).st_mtime_ns:
            return None
        with BaseModel(path) as copy:
            keys = copy.header.keys
            if (keys.get(TRAINING), keys.get(HOLDS)) != (fingerprint(checkpoint), NORMS):
                return None
            for pair in checkpoint.pairs:
                if pair.is_norm:
                    tensor = copy.tensor(pair)
                    norm = base.norm(checkpoint, pair, census).tobytes()
                    if bytes(read_at(copy.source, tensor.offset, tensor.nbytes)) != norm:
                        return None
            return Seen(copy.source.identity, census.warnings())
    except (KeyError, OSError, ValueError):  # something else than a copy, or what the conversion tells better
        return None
