"""Writing what llama.cpp and what is built on it load: a GGUF LoRA adapter, and the base model's norms with it.

llama.cpp computes ``lora_b @ lora_a`` with lora_a of numpy shape (rank, n_in), the transpose of a checkpoint's A, and
multiplies by alpha / rank, or by 1 where alpha is 0.  For the token embeddings, of which it looks up rows, A and B
change places: lora_a has shape (n_vocab, rank) and lora_b (n_embd, rank), both as they are.

It ignores deltas of norms, and finetune always trains those.  Norms are F32 in every model, quantized or not: a copy
of the base model in which only they are changed, and this adapter upon it, are together exact.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Final

import gguf

from ..base_model import BaseModel
from ..checkpoint import Checkpoint
from ..deltas import OUTPUT, TOKEN_EMBD, Floats, Pair, norm_size, pairs
from ..errors import CheckpointError
from ..gguf_writer import TensorInfo, as_bytes, head, packed_keys, padding, quantized
from ..payload import Output, Progress, copy_patched
from .plan import File, Options, Plan

__all__ = ["plan", "write"]

_TYPES: Final = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
_INFO_TAKES: Final = 256  # bytes about: a tensor's info and padding, or all keys


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan the adapter, and with a base model its copy with patched norms.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or the base has tied embeddings, which llama.cpp
        cannot adapt.
    """
    found = pairs(checkpoint)
    base, notes = options.base, []
    left_out = set() if options.token_embd else {TOKEN_EMBD}
    if base is not None:
        base.check(checkpoint, found)
        if base.is_tied:
            left_out |= _left_out_of_tied(checkpoint, base, found, options.token_embd)
    if skipped := [pair.weight for pair in found if pair.weight in left_out]:
        notes.append(f"left out: the deltas of {' and '.join(skipped)}")
    kept = [pair for pair in found if not pair.is_norm and pair.weight not in left_out]
    kind = _TYPES[options.outtype]
    write_adapter = functools.partial(write, checkpoint, kept, kind)
    about = _INFO_TAKES + sum(2 * _INFO_TAKES + 4 * pair.rank * (pair.n_in + pair.n_out) for pair in kept)
    files = [File(write_adapter, about)]
    if base is not None:
        name = _base_out(options, base)
        files.insert(0, File(functools.partial(_write_base, checkpoint, base, found), base.source.size, name))
        notes.append(f"the norm deltas are in {name}: load the adapter upon that model")
    elif any(pair.is_norm for pair in found):
        notes.append(
            f"left out: {norm_size(checkpoint, found)}, which llama.cpp ignores in adapters; "
            "--base writes a copy of the base model that has them"
        )
    return Plan(tuple(files), 2 * len(kept), tuple(notes))


def _left_out_of_tied(checkpoint: Checkpoint, base: BaseModel, found: list[Pair], token_embd: bool) -> set[str]:
    """Return the weights that an adapter upon a model with tied embeddings cannot have.

    llama.cpp refuses a pair for an output weight that is not there, and aborts in the first computation with a pair
    for embeddings that it also multiplies by.
    """
    cannot = {TOKEN_EMBD, OUTPUT}
    if not token_embd:
        return cannot
    for pair in found:
        if pair.weight in cannot:
            raise CheckpointError(
                f"llama.cpp cannot adapt tied embeddings, and {base.source.name} has no {OUTPUT} of its own",
                source=checkpoint.source.name, tensor=pair.weight,
                hint=f"--no-token-embd (token_embd=False) leaves {TOKEN_EMBD} and {OUTPUT} out; "
                "--to merged keeps everything",
            )  # fmt: skip
    return cannot


def _base_out(options: Options, base: BaseModel) -> str:
    """Return where the base model with patched norms goes."""
    if options.base_out is not None:
        return options.base_out
    stems = [os.path.splitext(os.path.basename(path))[0] for path in (base.source.name, options.target)]
    return os.path.join(os.path.dirname(options.target), "-".join(stems) + ".gguf")


def write(
    checkpoint: Checkpoint,
    found: list[Pair],
    kind: gguf.GGMLQuantizationType,
    output: Output,
    progress: Progress | None = None,
) -> None:
    """Write the pairs `found`, none of them a norm's, to `output` as a GGUF adapter with tensors of type `kind`.

    Raises
    ------
    CheckpointError
        A value is too large for `kind`.
    """
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    tensors = [tensor for pair in found for tensor in _tensors(pair)]
    infos = [TensorInfo(name, shape[::-1], kind) for name, shape, _ in tensors]
    output.writev([head(infos, *packed_keys(writer))])
    for info, (name, _, read) in zip(infos, tensors):
        data = as_bytes(quantized(read(checkpoint), kind, source=checkpoint.source.name, tensor=name))
        output.writev([data, padding(len(data))])
        if progress is not None:
            progress(info.nbytes)


def _tensors(pair: Pair) -> Iterator[tuple[str, tuple[int, int], Callable[[Checkpoint], Floats]]]:
    """Yield name, numpy shape and a way to the values of the two tensors that `pair` becomes."""
    if pair.weight == TOKEN_EMBD:
        yield f"{pair.weight}.lora_a", (pair.n_out, pair.rank), pair.b
        yield f"{pair.weight}.lora_b", (pair.n_in, pair.rank), pair.a
    else:
        yield f"{pair.weight}.lora_a", (pair.rank, pair.n_in), lambda checkpoint: pair.a(checkpoint).T
        yield f"{pair.weight}.lora_b", (pair.n_out, pair.rank), pair.b


def _write_base(
    checkpoint: Checkpoint, base: BaseModel, found: list[Pair], output: Output, progress: Progress | None = None
) -> None:
    """Write a copy of `base` in which only the norms are changed."""
    copy_patched(base.source, base.norm_patches(checkpoint, found), output, progress=progress)
