"""Time and memory in proportion to the file, on every route, at two sizes a factor of ten apart.

What each route may take stands in SECURITY.md; `MEMORY` and `HELD` are its numbers.
"""

import gc
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

import ggcl_fast
from ggcl_fast.storage.system import n_cpus
from ggcl_fast.targets.base_model import BaseModel
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes, write_checkpoint

from ..adapters import adapter_bytes, foreign_ggla, made
from ..models import Model, Type

MEMORY: Final = 8
"""Times the file, where it is made of very many small tensors."""
HELD: Final = 4
"""Times the largest tensor of a pair, where tensors are large."""
CONSTANT: Final = (8 << 20) + (3 << 20) * n_cpus()
"""Bytes besides: blocks, of which each processor has some in work."""
ROUTES: Final[dict[str, tuple[str, bool]]] = {
    "checkpoint": ("checkpoint", False), "adapter": ("adapter", False), "adapter upon a base": ("adapter", True),
    "merged": ("merged", True), "peft": ("peft", False), "peft with a base": ("peft", True),
    "check": ("check", False), "summary": ("summary", False),
}  # fmt: skip
WITH_BASE: Final = [route for route, (_, needs_base) in ROUTES.items() if needs_base]
WITHOUT: Final = [route for route in ROUTES if route not in WITH_BASE]


def follow(route: str, source: Path, base: Path | None, folder: Path) -> None:
    to, needs_base = ROUTES[route]
    with ggcl_fast.open_checkpoint(source, engine="python") as checkpoint:
        if to == "summary":
            ggcl_fast.summarise(checkpoint, engine="python")
        elif to == "check":
            ggcl_fast.convert(checkpoint, folder / "out", to="checkpoint", check_finite=True, dry_run=True)
        else:
            ggcl_fast.convert(checkpoint, folder / "out", to=to, base=base if needs_base else None, force=True)


def cost(run: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds, and the peak of what was allocated in a second run."""
    gc.collect()
    gc.freeze()  # what other tests left in the process would be searched for garbage on the account of `run`
    try:
        begin = time.process_time()
        run()
        seconds = time.process_time() - begin
        tracemalloc.start()
        run()
        return seconds, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()


def hold(route: str, sizes: Sequence[tuple[Path, Path | None, int]], folder: Path) -> None:
    """Hold that ten times as much takes no more than about ten times as long, and no more than `sizes` allow."""
    follow(route, *sizes[0][:2], folder)  # once in a process, and not a matter of the file
    spent = []
    for source, base, allowed in sizes:
        seconds, peak = cost(lambda source=source, base=base: follow(route, source, base, folder))  # type: ignore[misc]
        assert peak < allowed + CONSTANT, f"{peak} bytes where {allowed} are promised"
        spent.append(seconds)
    assert spent[1] < 25 * max(spent[0], 0.02)


def many_layers(path: Path, n_layer: int, rank: int = 1) -> int:
    ranks = dict.fromkeys(RANKS, rank)
    path.write_bytes(
        checkpoint_bytes(Shape(n_layer=n_layer, n_embd=2, n_head=1, n_rot=2, n_vocab=1, n_mult=1, n_ff=1, ranks=ranks))
    )
    return path.stat().st_size


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


def layers(folder: Path, *numbers: int, rank: int = 1) -> list[tuple[Path, None, int]]:
    """Write checkpoints of so many layers, without a base."""
    paths = [folder / f"{n_layer}.ggcl" for n_layer in numbers]
    return [(path, None, MEMORY * many_layers(path, n_layer, rank)) for path, n_layer in zip(paths, numbers)]


@pytest.mark.parametrize("route", WITHOUT)
def test_many_layers(route: str, tmp_path: Path) -> None:
    hold(route, layers(tmp_path, 150, 1500), tmp_path)


@pytest.mark.parametrize("route", WITH_BASE)
def test_many_layers_of_the_base_too(route: str, tmp_path: Path) -> None:
    sizes = []
    for n_layer in (60, 600):
        path, base = tmp_path / f"{n_layer}.ggcl", tmp_path / f"{n_layer}.gguf"
        Model(n_layer=n_layer, n_head=1, n_head_kv=1, head_dim=2, n_ff=1, n_vocab=1).write(base)
        sizes.append((path, base, MEMORY * (many_layers(path, n_layer) + base.stat().st_size)))
    hold(route, sizes, tmp_path)


@pytest.mark.parametrize("route", WITH_BASE)
def test_a_base_of_many_tensors(route: str, tmp_path: Path) -> None:
    source = tmp_path / "in.ggcl"
    source.write_bytes(checkpoint_bytes(Shape(n_layer=0, n_embd=64, n_vocab=288, n_head=4, n_rot=16)))
    sizes = []
    for n in (2_000, 20_000):
        base = tmp_path / f"{n}.gguf"
        sizes.append((source, base, MEMORY * many_tensors(base, n)))
    hold(route, sizes, tmp_path)


@pytest.mark.parametrize("route", ROUTES)
def test_large_tensors(route: str, tmp_path: Path) -> None:
    """Ten times as many do not take more memory: what is held is one pair."""
    sizes = []
    n_ff, rank = 20_000, 16
    for n_layer in (1, 10):
        path, base = tmp_path / f"{n_layer}.ggcl", tmp_path / f"{n_layer}.gguf"
        ranks = {name: rank if name.startswith("w") else 1 for name in RANKS}
        with path.open("wb") as file:
            write_checkpoint(file, Shape(n_layer=n_layer, n_embd=32, n_ff=n_ff, ranks=ranks))
        if route in WITH_BASE:
            Model(n_layer=n_layer, n_head=2, n_head_kv=2, n_ff=n_ff, n_vocab=270).write(base)
        sizes.append((path, base, HELD * 4 * rank * n_ff))
    hold(route, sizes, tmp_path)


@pytest.mark.parametrize("route", WITHOUT)
def test_wide_ranks(route: str, tmp_path: Path) -> None:
    """Work of rank x rank for each pair would be seconds."""
    hold(route, layers(tmp_path, 10, 100, rank=1024), tmp_path)


@pytest.mark.parametrize("route", ["adapter", "adapter upon a base", "merged", "peft", "summary"])
@pytest.mark.parametrize("kind", ["ggla", "lora"])
def test_many_layers_of_what_others_wrote(kind: str, route: str, tmp_path: Path) -> None:
    sizes = []
    for n_layer in (100, 1000):
        source, base = tmp_path / f"{n_layer}.{kind}", tmp_path / f"{n_layer}.gguf"
        Model(n_layer=n_layer, n_head=1, n_head_kv=1, head_dim=2, n_ff=1, n_vocab=1).write(base)
        modules = ("attn_v", "attn_output")
        loras = [made(f"blk.{i}.{module}", 2, 1, 2, (Type.F16, Type.F32)) for i in range(n_layer) for module in modules]
        source.write_bytes(foreign_ggla(loras) if kind == "ggla" else adapter_bytes(loras))
        with_base = base if ROUTES[route][1] else None
        sizes.append((source, with_base, MEMORY * (source.stat().st_size + (base.stat().st_size if with_base else 0))))
    hold(route, sizes, tmp_path)
