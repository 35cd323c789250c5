"""Reading a LoRA adapter in GGUF form, as llama.cpp loads it and today's converters write it.

Of a weight X it has ``X.lora_a``, shape (rank, n_in), and ``X.lora_b``, shape (n_out, rank), in any type; of the token
embeddings A and B change places, see `targets.adapter`.  Deltas count alpha / rank times, each pair with its own rank,
and once where alpha is 0 or absent.  Weights of norms, which some converters add and llama.cpp passes over, are left
out.
"""

from __future__ import annotations

import math
import re
from typing import Final, NoReturn

import gguf
import numpy as np

from ..checkpoint import ALONE, Checkpoint, Training, layer_of
from ..errors import CheckpointError
from ..formats.decoded import Decoded, EncodedTensor, can_decode
from ..formats.finetune_keys import ADAPTER, INVOCATION, KIND, Key
from ..formats.gguf_header import GGUFHeader, Value
from ..formats.gguf_keys import GGUFKeys
from ..formats.gguf_tensors import GGUFTensor
from ..formats.schema import TOKEN_EMBD
from ..formats.signatures import MADE_BY
from ..storage.sources import Source
from .by_name import infer, model_parameters, tensor_table

__all__ = ["is_lora", "read"]

_TYPE: Final = Key(gguf.Keys.Adapter.TYPE, gguf.GGUFValueType.STRING)
_ALPHA: Final = Key(gguf.Keys.Adapter.LORA_ALPHA, gguf.GGUFValueType.FLOAT32)
_ADAPTER: Final = "lora"
_TELLS: Final = (
    MADE_BY.partition(".")[0], gguf.Keys.General.NAME, "general.base_model.",
    "adapter.lora.task_name", "adapter.lora.prompt_prefix",
)  # fmt: skip
"""How the keys begin by which it tells of itself, and that no field of a checkpoint has."""
_PART: Final = re.compile(r"(?P<weight>.+\.weight)\.lora_(?P<end>[ab])", re.ASCII | re.DOTALL)
_NORM: Final = re.compile(r".*norm\.weight", re.ASCII | re.DOTALL)
_OTHER: Final = {"a": "b", "b": "a"}


def is_lora(header: GGUFHeader) -> bool:
    """Tell whether a GGUF file is an adapter, whatever kind of one."""
    return header.keys.get(KIND) == ADAPTER


def read(source: Source, header: GGUFHeader) -> Checkpoint:
    """Read the adapter that `source` holds, whose header this is; raises as `readers.open_checkpoint` does."""
    keys = GGUFKeys(source.name, header)
    arch = keys.architecture()
    if keys.get(_TYPE) != _ADAPTER:
        keys.refuse(_TYPE.name, f"'{_ADAPTER}'")
    alpha = float(keys.get(_ALPHA)) if _ALPHA.name in keys else 0.0
    if not math.isfinite(alpha):
        keys.refuse(_ALPHA.name, "a finite float32")
    names: list[str] = []
    tensors: list[EncodedTensor] = []
    n_others, known = 0, set(header.names)
    for row, tensor in enumerate(header.tensors()):
        match = _PART.fullmatch(tensor.name)
        if match is None and _NORM.fullmatch(tensor.name):
            n_others += 1
        elif match is None:
            _fault(source, row, tensor, "name", "X.weight.lora_a or X.weight.lora_b", tensor.name)
        else:
            is_embd = match["weight"] == TOKEN_EMBD
            end = match["end"] if not is_embd else _OTHER[match["end"]]
            names.append(f"{match['weight']}.lora_{end}")
            tensors.append(_encoded(source, row, tensor, is_transposed=end == "a" and not is_embd))
            if f"{match['weight']}.lora_{_OTHER[match['end']]}" not in known:
                raise CheckpointError(ALONE, source=source.name, tensor=tensor.name, index=row)
    if not names:
        raise CheckpointError(
            "there is no tensor in it", source=source.name, field="n_tensors", found=len(header.names)
        )
    shown = Decoded(source, tensors)
    ne = np.array([one.shape if one.is_transposed else one.shape[::-1] for one in tensors], np.int64)
    table = tensor_table(np.array(shown.offsets, np.int64), ne, 2)
    ranks, dims = infer(names, table)
    layers = [layer for layer in (layer_of(name.split(".")) for name in names) if layer is not None]
    checkpoint = Checkpoint(
        shown,
        model_parameters(dims, max(layers, default=-1) + 1),
        ranks,
        Training(0, 0, 0),
        None,
        tuple(names),
        table,
        (f"{n_others} weights of norms, which llama.cpp passes over in adapters, are left out",) if n_others else (),
        format="lora",
        alpha=alpha,
        extra=_extra(header),
        arch=arch,
        partial=True,
    )  # fmt: skip
    checkpoint.pairs  # noqa: B018 - whole only if each pair is
    return checkpoint


def _extra(header: GGUFHeader) -> dict[str, Value]:
    """Return the keys by which the adapter tells of itself; of the tokens that invoke it, how many there are."""
    extra = {name: value for name, value in header.keys.items() if name.startswith(_TELLS)}
    if INVOCATION in header.fields:
        extra[INVOCATION] = header.fields[INVOCATION].length
    return extra


def _encoded(source: Source, row: int, tensor: GGUFTensor, *, is_transposed: bool) -> EncodedTensor:
    """Hold that a tensor is a matrix that can be decoded."""
    if math.prod(tensor.dims[2:]) != 1:
        _fault(
            source, row, tensor, "dims", "two of them: of other weights than matrices nothing can be made", tensor.dims
        )
    if not can_decode(tensor.type):
        _fault(source, row, tensor, "type", "one that gguf dequantizes", tensor.type.name)
    ne0, ne1 = (*tensor.dims, 1)[:2]
    return EncodedTensor(tensor.offset, tensor.nbytes, tensor.type, (ne1, ne0), is_transposed)


def _fault(source: Source, row: int, tensor: GGUFTensor, field: str, expected: str, found: object) -> NoReturn:
    raise CheckpointError(
        source=source.name, tensor=tensor.name, index=row, field=field, expected=expected, found=found
    )
