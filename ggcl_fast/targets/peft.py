"""Writing what Hugging Face's PEFT loads: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT's lora_A has shape (rank, n_in) and lora_B (n_out, rank).  Of the embeddings it looks up columns of
lora_embedding_A, shape (rank, n_vocab), and multiplies them by lora_embedding_B, shape (n_embd, rank).

The rows of lora_B for q and k are in Hugging Face's order, see `rows`.

PEFT has no deltas for norms; it takes whole weights, which only a base model can give.

Tensors are written one after the other, as in every other output: the folder is never in memory.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import gguf

from ..checkpoint import Checkpoint, Pair
from ..errors import CheckpointError
from ..formats.decoded import to_hf_rows
from ..formats.finetune_keys import ARCH
from ..formats.numbers import TYPES, Floats
from ..formats.safetensors import StoredTensor, head
from ..formats.schema import OUTPUT, TOKEN_EMBD
from ..storage.outputs import Writer
from ..storage.urls import StrPath
from . import TARGETS
from .about import NORMS, base_model_id, model_card, refuse_twice
from .adding import Rounding, pick_rounding
from .base_model import BaseModel
from .deltas import Census, lora_a, lora_b, norm_size, trains_norms
from .fitting import fit
from .options import Options
from .plan import File, Plan
from .rows import ROTATED, count_heads, heads_of

__all__ = ["MODULE_NAMES", "plan"]

MODULE_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
}
"""Modules of transformers' LlamaForCausalLM by the last part of the GGUF name."""

_PREFIX: Final = "base_model.model."
_CONFIG: Final[dict[str, Any]] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
}


def plan(checkpoint: Checkpoint, options: Options, base: BaseModel | None, outputs: Sequence[StrPath]) -> Plan:  # noqa: ARG001
    """Plan the folder.

    Raises
    ------
    CheckpointError
        The checkpoint was trained on another model than the base, or the number of heads is not known or cannot be.
    """
    left_out = () if options.token_embd else (TOKEN_EMBD,)
    if base is not None and not options.adds_twice:
        refuse_twice(checkpoint, base, adds=NORMS)
    checkpoint, arch, fitted = fit(checkpoint, options, base, left_out=left_out, reorder=False)
    if arch != ARCH:
        raise CheckpointError(
            f"names of PEFT's modules are known for '{ARCH}' alone", source=checkpoint.source.name,
            field="architecture", expected=f"'{ARCH}'", found=f"'{arch}'",
        )  # fmt: skip
    pairs, notes = checkpoint.pairs, list(fitted)
    for pair in pairs:
        if pair.module not in MODULE_NAMES:
            raise CheckpointError(
                "the name of this module is not known in Hugging Face's LLaMA", source=checkpoint.source.name,
                tensor=pair.weight,
            )  # fmt: skip
    has_norms = trains_norms(checkpoint)
    if base is None and has_norms:
        notes.append(f"left out: {norm_size(checkpoint)}, for which PEFT needs the whole weights; --base gives them")
    if not options.token_embd and any(pair.weight == TOKEN_EMBD for pair in pairs):
        notes.append(f"left out: the delta of {TOKEN_EMBD}")
    kept = [
        pair
        for pair in pairs
        if ((base is not None and has_norms) or not pair.is_norm) and (options.token_embd or pair.weight != TOKEN_EMBD)
    ]
    if base is not None and base.is_tied and any(pair.weight in (TOKEN_EMBD, OUTPUT) for pair in kept):
        notes.append("the embeddings are tied: use the adapter as it is; merging it with PEFT would change both ends")
    kept = _of_one_alpha(kept)
    n_heads = _n_heads(checkpoint, kept, options, base)
    census = Census()
    parts = sorted(_parts(kept, TYPES[options.outtype]), key=lambda part: part.stored.place)
    start = head(part.stored for part in parts)
    n_values = sum(pair.rank * (pair.n_in + pair.n_out) for pair in kept if not pair.is_norm)
    types = {part.stored.type for part in parts}
    roundings = {type: pick_rounding(type, options.engine, n_values, checkpoint.source.name) for type in types}
    write_tensors = functools.partial(_write_tensors, checkpoint, base, parts, n_heads, roundings, start, census)
    config = json.dumps(_config(kept, base_model_id(checkpoint, options)), indent=2).encode() + b"\n"
    card = model_card(checkpoint, options, base).encode()
    weights, about, card_name = TARGETS["peft"].folder
    files = (
        File(write_tensors, len(start) + sum(part.stored.nbytes for part in parts), weights),
        File(lambda output: output.writev([config]), len(config), about),
        File(lambda output: output.writev([card]), len(card), card_name),
    )
    return Plan(files, len(parts), tuple(notes), census.warnings)


def _module(pair: Pair) -> str:
    return MODULE_NAMES[pair.module].format(pair.layer)


def _n_heads(checkpoint: Checkpoint, kept: Iterable[Pair], options: Options, base: BaseModel | None) -> dict[str, int]:
    """Return how many heads the rows of each weight belong to that are not in Hugging Face's order."""
    rotated = [pair for pair in kept if pair.module in ROTATED]
    if not rotated or (checkpoint.rows == "hf" and options.rows != "gguf"):
        return {}
    heads = heads_of(checkpoint, options, base)
    counts = count_heads(checkpoint, rotated, heads)
    for pair, n_head in counts.items():
        n_rot, head_dim = checkpoint.parameters.n_rot, pair.n_out // n_head
        if n_rot not in (0, head_dim):
            raise CheckpointError(
                "transformers' LLaMA rotates whole heads", source=checkpoint.source.name, field="n_rot",
                expected=head_dim, found=n_rot,
            )  # fmt: skip
    return {pair.weight: n_head for pair, n_head in counts.items()}


class _Part(NamedTuple):
    """A tensor of the folder: a norm's weight, or one of the two of any other pair."""

    stored: StoredTensor
    pair: Pair
    is_b: bool
    """Whether it comes of B and not of A; a norm's comes of both."""


def _parts(pairs: Iterable[Pair], type: gguf.GGMLQuantizationType) -> Iterator[_Part]:
    """Yield the tensors that `pairs` become.  Norms stay float32: they are whole weights."""
    for pair in pairs:
        module = _PREFIX + _module(pair)
        if pair.is_norm:
            yield _Part(StoredTensor(f"{module}.weight", (pair.n_in,), TYPES["f32"]), pair, False)
        elif pair.weight == TOKEN_EMBD:
            yield _Part(StoredTensor(f"{module}.lora_embedding_A", (pair.rank, pair.n_out), type), pair, True)
            yield _Part(StoredTensor(f"{module}.lora_embedding_B", (pair.n_in, pair.rank), type), pair, False)
        else:
            yield _Part(StoredTensor(f"{module}.lora_A.weight", (pair.rank, pair.n_in), type), pair, False)
            yield _Part(StoredTensor(f"{module}.lora_B.weight", (pair.n_out, pair.rank), type), pair, True)


def _values(
    checkpoint: Checkpoint, base: BaseModel | None, part: _Part, n_heads: Mapping[str, int], census: Census
) -> Floats:
    """Return the values of a tensor, as float32."""
    pair = part.pair
    if pair.is_norm:
        assert base is not None  # without it there are no norms
        return base.norm(checkpoint, pair, census)
    values = lora_b(checkpoint, pair, census) if part.is_b else lora_a(checkpoint, pair, census)
    if part.is_b and pair.weight in n_heads:
        return to_hf_rows(values, n_heads[pair.weight])
    return values.T if part.is_b == (pair.weight == TOKEN_EMBD) else values


def _write_tensors(
    checkpoint: Checkpoint,
    base: BaseModel | None,
    parts: Sequence[_Part],
    n_heads: Mapping[str, int],
    roundings: Mapping[gguf.GGMLQuantizationType, Rounding],
    start: bytes,
    census: Census,
    output: Writer,
) -> None:
    """Write ``adapter_model.safetensors``, which begins with `start`."""
    output.writev([start])
    for part in parts:
        values = _values(checkpoint, base, part, n_heads, census)
        output.writev([roundings[part.stored.type](values, part.pair.weight)])


def _usual_rank(kept: list[Pair]) -> int:
    ranks = Counter(pair.rank for pair in kept if not pair.is_norm)
    return ranks.most_common(1)[0][0] if ranks else 1


def _of_one_alpha(kept: list[Pair]) -> list[Pair]:
    """Return the pairs as they are with one alpha for all, the usual rank.

    PEFT multiplies by alpha / rank, and B takes the inverse: nothing is lost where that is a power of two, and half a
    unit in the last place at most where it is not.  An alpha for each, which would lose nothing, other programs ignore.
    """
    usual = _usual_rank(kept)
    return [pair if pair.is_norm else pair._replace(scale=pair.scale * pair.rank / usual) for pair in kept]


def _config(kept: list[Pair], model: str | None) -> dict[str, Any]:
    """Return ``adapter_config.json``, by which every scale is 1 but for what B has taken of it."""
    trained = [pair for pair in kept if not pair.is_norm]
    usual = _usual_rank(kept)
    ranks: dict[str, set[int]] = {}
    for pair in trained:
        ranks.setdefault(_leaf(pair), set()).add(pair.rank)
    # Keys of a pattern match the end of a module's name, from a dot on.
    pattern = {
        _leaf(pair) if len(ranks[_leaf(pair)]) == 1 else _module(pair): pair.rank
        for pair in trained
        if ranks[_leaf(pair)] != {usual}
    }
    return {
        **_CONFIG,
        "base_model_name_or_path": model,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": {},
        "target_modules": list(ranks),
        "modules_to_save": list(dict.fromkeys(_leaf(pair) for pair in kept if pair.is_norm)) or None,
    }


def _leaf(pair: Pair) -> str:
    """Return the last part of the module's name."""
    return MODULE_NAMES[pair.module].rpartition(".")[2]
