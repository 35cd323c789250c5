"""Writing the GGUF finetune checkpoint: the conversion that the original script did, byte for byte.

Keys and their order are those of ``training.file_version`` 0.  Names come from gguf's constants wherever it has them.
"""

from __future__ import annotations

import functools
from typing import Final

import gguf

from ..checkpoint import Adam, Checkpoint, Optimizer
from ..errors import CheckpointError, printable
from ..gguf_writer import BulkGGUFWriter
from ..payload import Output, Progress
from ..schema import MODULES
from .plan import File, Options, Plan

__all__ = ["add_keys", "plan", "write"]

_ARCH: Final = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
_RMS_EPSILON: Final = 1e-5  # the checkpoint does not store it; finetune knew no other


def plan(checkpoint: Checkpoint, options: Options) -> Plan:  # noqa: ARG001
    """Plan the GGUF finetune checkpoint: one file, about as large as the source."""
    return Plan((File(functools.partial(write, checkpoint), checkpoint.source.size),), len(checkpoint.names))


def write(checkpoint: Checkpoint, output: Output, progress: Progress | None = None) -> None:
    """Write `checkpoint` to `output` as a GGUF finetune checkpoint.

    Version 0 of the format is written, and nothing is left out for it: what has no place in it is refused.  That is
    right for version 1 too, the later builds': without its shuffle state, context and rope keys the file would claim a
    training that never was.

    Raises
    ------
    CheckpointError
        `checkpoint` is an adapter, or has keys that version 0 does not have.
    """
    writer = BulkGGUFWriter(output, _ARCH)
    add_keys(writer, checkpoint)
    writer.add_tensors(checkpoint.names, checkpoint.table, checkpoint.source)
    writer.write_all(progress)


def add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add all keys of the GGUF finetune checkpoint to `writer`, in their order; raises as `write` does."""
    model, training, optimizer = checkpoint.parameters, checkpoint.training, _optimizer(checkpoint)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_layer_norm_rms_eps(_RMS_EPSILON)
    writer.add_uint32("training.file_version", 0)
    writer.add_string("training.type", "finetune_lora")
    writer.add_uint32("training.iteration_count", training.iterations)
    writer.add_uint32("training.sample_count", training.samples)
    writer.add_uint32("training.token_count", training.tokens)
    writer.add_embedding_length(model.n_embd)
    writer.add_head_count(model.n_head)
    writer.add_block_count(model.n_layer)
    writer.add_rope_dimension_count(model.n_rot)
    writer.add_feed_forward_length(model.n_ff)
    for module in MODULES:
        key = module.base_name.rpartition(".")[2]
        writer.add_uint32(f"training.lora.rank.{key}", checkpoint.ranks[module.rank])

    writer.add_uint32("optimizer.file_version", 0)
    writer.add_uint32("optimizer.convergence_past_count", optimizer.past)
    writer.add_uint64("optimizer.parameter_count", optimizer.n_parameters)
    writer.add_uint32("optimizer.iteration_count", optimizer.iteration)
    writer.add_bool("optimizer.just_initialized", optimizer.just_initialized)
    writer.add_string("optimizer.type", optimizer.name)
    if isinstance(optimizer, Adam):
        writer.add_float32("optimizer.adam.best_loss", optimizer.best_loss)
        writer.add_float32("optimizer.adam.previous_loss", optimizer.previous_loss)
        writer.add_uint32("optimizer.adam.no_improvement_count", optimizer.no_improvement_count)
    else:
        writer.add_uint32("optimizer.lbfgs.approx_hessian_count", optimizer.m)
        writer.add_float32("optimizer.lbfgs.best_loss", optimizer.best_loss)
        writer.add_float32("optimizer.lbfgs.line_search_step", optimizer.step)
        writer.add_int32("optimizer.lbfgs.line_search_j", optimizer.j)
        writer.add_int32("optimizer.lbfgs.line_search_k", optimizer.k)
        writer.add_int32("optimizer.lbfgs.line_search_end", optimizer.end)
        writer.add_uint32("optimizer.lbfgs.no_improvement_count", optimizer.no_improvement_count)


def _optimizer(checkpoint: Checkpoint) -> Optimizer:
    """Return the optimizer state of `checkpoint` if that can be written whole."""
    if checkpoint.optimizer is None:
        raise CheckpointError(
            "an adapter has neither optimizer state nor training counts", source=checkpoint.source.name,
            field="optimizer", hint="it cannot become a checkpoint again: take the one that finetune wrote beside it",
        )  # fmt: skip
    if checkpoint.extra:
        keys = list(checkpoint.extra)
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise CheckpointError(
            f"a checkpoint of training.file_version 0 has no place for {', '.join(map(printable, keys[:3]))}{more}",
            source=checkpoint.source.name, field="keys", hint="it is in GGUF form already; copy it as it is",
        )  # fmt: skip
    return checkpoint.optimizer
