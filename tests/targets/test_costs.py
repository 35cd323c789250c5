"""Time and memory in proportion to the file, at two sizes a factor of ten apart."""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast.targets.base_model import BaseModel
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from ..models import Model

SHAPE = Shape(n_layer=0, n_embd=64, n_vocab=288, n_head=4, n_rot=16)


def many_tensors(path: Path, n: int) -> int:
    """Write a base model with `n` tensors of one element besides its own; return its size."""
    Model(n_layer=0, n_head_kv=4).write(path)
    data = path.read_bytes()
    (n_tensors,) = struct.unpack_from("<Q", data, 8)
    with BaseModel(path) as base:
        infos = base.header.keys_span[1]
        start = base.header.data_offset
    end = infos
    for _ in range(n_tensors):  # their names and dims stay, and their data
        (name_len,) = struct.unpack_from("<Q", data, end)
        (n_dims,) = struct.unpack_from("<I", data, end + 8 + name_len)
        end += 8 + name_len + 4 + 8 * n_dims + 12
    offset = len(data) - start + -(len(data) - start) % 32
    more = b"".join(
        struct.pack("<Q", 6) + b"%06x" % i + struct.pack("<IQIQ", 1, 1, 0, offset + 32 * i) for i in range(n)
    )
    head = data[:8] + struct.pack("<Q", n_tensors + n) + data[16:end] + more
    body = data[start:] + bytes(offset - (len(data) - start)) + bytes(32 * n)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path.stat().st_size


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_a_base_of_many_tensors_costs_in_proportion(to: str, tmp_path: Path) -> None:
    costs = []
    data = checkpoint_bytes(SHAPE)
    for n in (3_000, 30_000):
        nbytes = many_tensors(tmp_path / "base.gguf", n)
        for traced in (False, True):
            with ggcl_fast.open_checkpoint(data) as checkpoint:
                if traced:
                    tracemalloc.start()
                begin = time.thread_time()
                ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", to=to, base=tmp_path / "base.gguf", force=True)
                seconds, peak = time.thread_time() - begin, tracemalloc.get_traced_memory()[1] if traced else 0
                tracemalloc.stop()
            if not traced:
                costs.append(seconds)
            assert peak < 8 * nbytes + (8 << 20)
    assert costs[1] < 3
    assert costs[1] < 30 * max(costs[0], 0.02)


@pytest.mark.parametrize("to", ["checkpoint", "adapter"])
def test_many_layers_cost_in_proportion(to: str, tmp_path: Path) -> None:
    for n_layer in (300, 3000):
        ranks = dict.fromkeys(RANKS, 1)
        data = checkpoint_bytes(Shape(n_layer=n_layer, n_embd=1, n_vocab=1, n_mult=1, n_ff=1, ranks=ranks))
        with ggcl_fast.open_checkpoint(data, engine="python") as checkpoint:
            tracemalloc.start()
            ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", to=to, force=True, engine="python")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 8 * len(data) + (4 << 20)
