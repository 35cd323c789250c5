"""A straightforward reader of ggcl files, written with struct alone: what the fast one is held against."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data"
FIXTURES = ("adam.ggcl", "adam-past4.ggcl", "adam-odd-ff.ggcl", "lbfgs.ggcl", "trained.ggcl")
LATER_FIXTURES = ("trained.ggla", "finetune-v1.gguf", "finetune-v1.ggla", "base.gguf")

MODULES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip
RANK_KEYS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_down", "ffn_up",
    "token_embd", "output_norm", "output",
)  # fmt: skip
OPTIMIZER_TENSORS = {
    "adam": ("first_moments", "second_moments", "past_loss_values"),
    "lbfgs": (
        "current_parameters", "previous_parameters", "current_gradients", "previous_gradients", "search_direction",
        "past_loss_values", "memory_alpha", "memory_ys", "memory_s", "memory_y",
    ),
}  # fmt: skip

Tensors = dict[str, tuple[tuple[int, ...], npt.NDArray[np.float32]]]


def gguf_name(name: str) -> str:
    base, _, end = name.rpartition(".weight.lora")
    prefix = ""
    if base.startswith("layers."):
        _, layer, base = base.split(".", 2)
        prefix = f"blk.{layer}."
    return f"{prefix}{MODULES[base]}.weight.lora_{end.lower()}"


def read(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """Return the GGUF keys and the tensors (ne, flat values) that the conversion of `data` must have, in order."""
    header = struct.unpack_from("<23I", data)
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "training.file_version": 0,
        "training.type": "finetune_lora",
        "training.iteration_count": header[2],
        "training.sample_count": header[3],
        "training.token_count": header[4],
        "llama.embedding_length": header[6],
        "llama.attention.head_count": header[8],
        "llama.block_count": header[9],
        "llama.rope.dimension_count": header[10],
        "llama.feed_forward_length": -(-(2 * (4 * header[6]) // 3) // (header[7] or 1)) * (header[7] or 1),
    }
    ranks = dict(zip(RANK_KEYS, header[11:]))
    last = RANK_KEYS[-3:]
    keys |= {f"training.lora.rank.{key}": ranks[key] for key in (*last, *RANK_KEYS[:-3])}

    at = 92
    tensors: Tensors = {}

    def record() -> tuple[str, tuple[int, ...], npt.NDArray[np.float32]]:
        nonlocal at
        n_dims, name_len, dtype = struct.unpack_from("<3I", data, at)
        assert dtype == 0
        ne = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        name = data[at + 12 + 4 * n_dims :][:name_len].decode()
        at = -(-(at + 12 + 4 * n_dims + name_len) // 32) * 32
        n = int(np.prod(ne, dtype=object)) if ne else 0
        values = np.array(struct.unpack_from(f"<{n}f", data, at), np.float32)
        at += 4 * n
        return name, ne, values

    for _ in range(6 + 18 * header[9]):
        name, ne, values = record()
        tensors[gguf_name(name)] = ne, values
        if name.endswith("w1.weight.loraB"):
            keys["llama.feed_forward_length"] = ne[1]

    _, past, m, nx, iteration, just_initialized = struct.unpack_from("<IiiqiI", data, at)
    at += 28
    start = at
    optimizer = "adam"
    record(), record(), record()
    if at + 12 != len(data):
        optimizer = "lbfgs"
    at = start
    for tensor in OPTIMIZER_TENSORS[optimizer]:
        _, ne, values = record()
        if ne:
            tensors[f"optimizer.{optimizer}.{tensor}"] = ne, values
    keys |= {
        "optimizer.file_version": 0,
        "optimizer.convergence_past_count": past,
        "optimizer.parameter_count": nx,
        "optimizer.iteration_count": iteration,
        "optimizer.just_initialized": bool(just_initialized),
        "optimizer.type": optimizer,
    }
    if optimizer == "adam":
        best, previous, stalled = struct.unpack_from("<ffi", data, at)
        end = {"best_loss": best, "previous_loss": previous, "no_improvement_count": stalled}
        at += 12
    else:
        best, step, j, k, stop, stalled = struct.unpack_from("<ffiiii", data, at)
        end = {
            "approx_hessian_count": m, "best_loss": best, "line_search_step": step, "line_search_j": j,
            "line_search_k": k, "line_search_end": stop, "no_improvement_count": stalled,
        }  # fmt: skip
        at += 24
    assert at == len(data)
    return keys | {f"optimizer.{optimizer}.{key}": value for key, value in end.items()}, tensors
