"""Writing what llama.cpp and what is built on it load: a GGUF LoRA adapter, and the base model's norms with it.

llama.cpp computes ``lora_b @ lora_a`` with lora_a of numpy shape (rank, n_in), the transpose of a checkpoint's A, and
multiplies by alpha / rank, or by 1 where alpha is 0.  For the token embeddings, of which it looks up rows, A and B
change places: lora_a has shape (n_vocab, rank) and lora_b (n_embd, rank), both as they are.

It ignores deltas of norms, and finetune always trains those.  Norms are F32 in every model, quantized or not: a copy
of the base model in which only they are changed, every other tensor byte for byte the same, and this adapter upon it,
are together exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import gguf

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.gguf_writer import KeyValue, TensorInfo, head, new_writer, packed_keys, padding
from ..formats.layout import ALIGNMENT
from ..formats.numbers import TYPES, Floats
from ..formats.schema import OUTPUT, TOKEN_EMBD
from ..readers.engine import Engine
from ..storage.outputs import Writer
from ..storage.urls import StrPath, public_name
from .about import ALL, NORMS, of_adapter, of_model, refuse_twice
from .adding import Rounding, pick_rounding
from .base_model import BaseModel
from .deltas import Census, lora_a, lora_b, norm_size, trains_norms
from .fitting import fit
from .options import Options
from .plan import File, Plan
from .rewriting import model_file

__all__ = ["adapter_file", "plan"]


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:
    """Plan the adapter, and with a base model its copy with patched norms.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or the base has tied embeddings, which llama.cpp
        cannot adapt.
    """
    if base is not None and not options.adds_twice:
        refuse_twice(checkpoint, base, adds=NORMS if len(outputs) > 1 else ALL)
    of_copy = of_model(checkpoint, options, base, NORMS) if base is not None else []
    is_tied = base is not None and base.is_tied
    left_out = () if options.token_embd else (TOKEN_EMBD, OUTPUT) if is_tied else (TOKEN_EMBD,)
    as_read = checkpoint
    checkpoint, arch, fitted = fit(checkpoint, options, base, left_out=left_out)
    if base is not None and is_tied and options.token_embd:
        _refuse_tied(checkpoint, base)
    pairs, notes = checkpoint.pairs, list(fitted)
    if skipped := [pair.weight for pair in pairs if pair.weight in left_out]:
        notes.append(f"left out: the deltas of {' and '.join(skipped)}")
    kept = [pair for pair in pairs if not pair.is_norm and pair.weight not in left_out]
    about = of_adapter(as_read, options, base, skipped)
    census = Census()
    files = [adapter_file(checkpoint, kept, arch, about, TYPES[options.outtype], options.engine, census)]
    if base is not None and (scaled := [pair.weight for pair in kept if base.has_scale(pair)]):
        notes.append(
            f"llama.cpp aborts with an adapter for weights that have a scale beside them, such as {scaled[0]}; "
            "--to merged keeps everything"
        )
    if base is not None and len(outputs) > 1:
        norms = (pair for pair in pairs if pair.is_norm)
        files.insert(0, model_file(checkpoint, base, norms, of_copy, options.engine, census).file)
        notes.append(f"the norm deltas are in {public_name(outputs[0])}: load the adapter upon that model")
    elif options.base_out is not None:
        notes.append(f"{public_name(options.base_out)} is not written: no norm was trained")
    elif base is None and trains_norms(checkpoint):
        notes.append(
            f"left out: {norm_size(checkpoint)}, which llama.cpp ignores in adapters; "
            "--base writes a copy of the base model that has them"
        )
    return Plan(tuple(files), 2 * len(kept), tuple(notes), census.warnings)


def _refuse_tied(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Hold that there is no pair that an adapter upon a model with tied embeddings cannot have.

    llama.cpp refuses a pair for an output weight that is not there, and aborts in the first computation with a pair
    for embeddings that it also multiplies by.
    """
    for pair in checkpoint.pairs:
        if pair.weight in (TOKEN_EMBD, OUTPUT):
            raise CheckpointError(
                f"llama.cpp cannot adapt tied embeddings, and {base.source.name} has no {OUTPUT} of its own",
                source=checkpoint.source.name, tensor=pair.weight,
                hint=f"--no-token-embd (token_embd=False) leaves {TOKEN_EMBD} and {OUTPUT} out; "
                "--to merged keeps everything",
            )  # fmt: skip


def adapter_file(
    checkpoint: Checkpoint,
    pairs: Sequence[Pair],
    arch: str,
    about: Iterable[KeyValue],
    type: gguf.GGMLQuantizationType,
    engine: Engine,
    census: Census,
) -> File:
    """Return the file of a GGUF adapter for models of `arch`, with `pairs`, none of them a norm's, of a type of floats.

    The scale is in B, so that alpha is the rank; 0 where there are several, which llama.cpp takes for 1 each.

    Writing it raises `CheckpointError` where a value is too large for `type`.
    """
    writer = new_writer(arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {pair.rank for pair in pairs}
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    for entry in about:
        writer.add_key_value(entry.name, entry.value, entry.type)
    infos = (info for pair in pairs for info in _infos(pair, type))
    start, nbytes = head(infos, 2 * len(pairs), packed_keys(writer), gguf.GGUF_VERSION, ALIGNMENT)
    n_values = sum(pair.rank * (pair.n_in + pair.n_out) for pair in pairs)
    rounding = pick_rounding(type, engine, n_values, checkpoint.source.name)
    return File(functools.partial(_write, checkpoint, pairs, type, rounding, start, census), nbytes)


def _infos(pair: Pair, type: gguf.GGMLQuantizationType) -> tuple[TensorInfo, TensorInfo]:
    """Return what the two tensors are that `pair` becomes."""
    name, n_in, n_out, rank = pair.weight, pair.n_in, pair.n_out, pair.rank
    a, b = ((rank, n_out), (rank, n_in)) if name == TOKEN_EMBD else ((n_in, rank), (rank, n_out))
    return TensorInfo(f"{name}.lora_a", a, type), TensorInfo(f"{name}.lora_b", b, type)


def _values(checkpoint: Checkpoint, pair: Pair, census: Census) -> Iterator[Floats]:
    """Yield the values of the two tensors that `pair` becomes."""
    if pair.weight == TOKEN_EMBD:
        yield lora_b(checkpoint, pair, census)
        yield lora_a(checkpoint, pair, census)
    else:
        yield lora_a(checkpoint, pair, census).T
        yield lora_b(checkpoint, pair, census)


def _write(
    checkpoint: Checkpoint,
    pairs: Sequence[Pair],
    type: gguf.GGMLQuantizationType,
    rounding: Rounding,
    start: bytes,
    census: Census,
    output: Writer,
) -> None:
    """Write an adapter that begins with `start`."""
    output.writev([start, padding(len(start))])
    for pair in pairs:
        for info, values in zip(_infos(pair, type), _values(checkpoint, pair, census)):
            data = rounding(values, info.name)
            output.writev([data, padding(len(data))])
