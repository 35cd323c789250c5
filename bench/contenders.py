"""What is timed: what ggcl_fast does, and what one would do instead.

`bench.comparisons` pairs them; tests/test_bench.py holds their results against each other.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

import ggcl_fast
from ggcl_fast import readers
from ggcl_fast.formats import layout, schema
from ggcl_fast.formats.schema import schemas
from ggcl_fast.readers import engine, predict
from ggcl_fast.storage import copying
from ggcl_fast.storage.sources import SourceBuffer, SourceFile, read_at
from ggcl_fast.targets import checkpoint as finetune_gguf
from ggcl_fast.testing import SHAPE_7B, SHAPE_13B, Shape, write_checkpoint

Run = Callable[[], object]
SHAPES: Final = {"7B": SHAPE_7B, "13B": SHAPE_13B}


def size_of(shape: Shape) -> int:
    """Bytes of a checkpoint of this shape, to about a per cent."""
    nx = sum(ne0 * ne1 for _, ne0, ne1 in shape.lora_tensors())
    return (3 if shape.optimizer == "adam" else 6 + 2 * shape.lbfgs_m) * 4 * nx


def scaled(shape: Shape, nbytes: int) -> Shape:
    """`shape` with its records and about `nbytes` bytes: wider and of higher rank, or narrower."""
    rank = max(1, round(nbytes / size_of(shape)))
    if rank > 1:
        ranks = {name: 1 if "norm" in name else 4 * rank for name in shape.ranks}
        return replace(shape, ranks=ranks)
    narrow = nbytes / size_of(shape)
    return replace(
        shape,
        n_embd=max(8, round(shape.n_embd * narrow) // 8 * 8),
        n_vocab=max(8, round(shape.n_vocab * narrow) // 8 * 8),
        n_mult=8,
    )


def checkpoint(folder: Path, shape: Shape, nbytes: int) -> Path:
    """Return a checkpoint of about `nbytes` bytes with the records of `shape`, made at the first asking."""
    path = folder / f"{shape.n_layer}-{nbytes}.ggcl"
    if not path.exists():
        with path.open("wb") as file:
            write_checkpoint(file, scaled(shape, nbytes))
        os.sync()  # writing it back must not disturb what is timed
    return path


def base_model(folder: Path, type: gguf.GGMLQuantizationType, nbytes: int) -> tuple[Path, Path]:
    """Return a base model of about `nbytes` bytes with weights of `type`, and a checkpoint trained on it."""
    path, source = folder / f"base-{type.name}-{nbytes}.gguf", folder / f"base-{type.name}-{nbytes}.ggcl"
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    n_weights = nbytes // block_bytes * block
    n_embd = min(4096, max(256, int((n_weights / 50) ** 0.5) // 256 * 256))
    shape = replace(SHAPE_7B, n_layer=2, n_embd=n_embd, n_head=n_embd // 128)
    in_layers = sum(n_in * n_out for (_, n_in, n_out), is_norm in weights_of(shape).items() if not is_norm)
    shape = replace(shape, n_vocab=max(64, shape.n_vocab + (n_weights - in_layers) // (2 * n_embd)))
    if path.exists():
        return path, source
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_uint32("llama.attention.head_count", shape.n_head)
    for (name, n_in, n_out), is_norm in weights_of(shape).items():
        if is_norm:
            writer.add_tensor(name, np.ones(n_in, np.float32))
            continue
        some = gguf.quants.quantize((0.02 * rng.standard_normal((64, n_in))).astype(np.float32), type)
        writer.add_tensor(name, np.resize(some, (n_out, some.shape[1])), raw_dtype=type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with source.open("wb") as file:
        write_checkpoint(file, shape)
    os.sync()
    return path, source


def weights_of(shape: Shape) -> dict[tuple[str, int, int], bool]:
    """Return name, input and output length of all weights of a base model, and whether each is a norm."""
    names = [name for lora in schemas(shape.n_layer) for name in lora.names[::2]]
    lengths = [(a[2], b[2]) for a, b in zip(shape.lora_tensors()[::2], shape.lora_tensors()[1::2])]
    return {(name.removesuffix(".lora_a"), n_in, n_out): "norm" in name for name, (n_in, n_out) in zip(names, lengths)}


def adapter_of_others(folder: Path, modules: Sequence[str], rank: int, type: Any) -> Path:
    """Return the ggla file of a 7B model's adapter as convert-lora-to-ggml.py made it, A in `type`, B in float32."""
    path = folder / f"{len(modules)}-{rank}.ggla"
    if path.exists():
        return path
    n_embd, n_ff = SHAPE_7B.n_embd, 11008
    lengths = {"ffn_gate": (n_embd, n_ff), "ffn_up": (n_embd, n_ff), "ffn_down": (n_ff, n_embd)}
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<4sIII", b"algg", 1, rank, 2 * rank))
        for layer in range(SHAPE_7B.n_layer):
            for module in modules:
                for end, n, kind in zip("AB", lengths.get(module, (n_embd, n_embd)), (type, np.float32)):
                    values = (0.02 * rng.standard_normal((n, rank))).astype(kind)
                    name = f"blk.{layer}.{module}.weight.lora{end}".encode()
                    file.write(struct.pack("<5I", 2, len(name), int(values.itemsize == 2), rank, n) + name)
                    file.seek(-(-file.tell() // 32) * 32)
                    file.write(values.tobytes())
    os.sync()
    return path


def tiny(folder: Path) -> Path:
    """Return a checkpoint of 95 KB, the size of the smallest real ones."""
    path = folder / "tiny.ggcl"
    if not path.exists():
        with path.open("wb") as file:
            write_checkpoint(file)
    return path


def discard(*paths: Path) -> None:
    """Remove outputs, so that each run writes a new file."""
    for path in paths:
        path.unlink(missing_ok=True)


# --- what one would do instead --------------------------------------------------------------------------------------


def plain_gguf_writer(source: Path, target: Path) -> None:
    """Convert in the way of the old script: memory map, `GGUFWriter.add_tensor`, `tofile`."""
    mapped = np.memmap(source, np.uint8, "r")
    with ggcl_fast.open_checkpoint(mapped) as opened:
        write_plainly(opened, target)


def write_plainly(opened: ggcl_fast.Checkpoint, target: Path) -> None:
    """Write an open checkpoint with gguf's own writer."""
    writer = gguf.GGUFWriter(target, "llama")
    finetune_gguf.add_keys(writer, opened)
    for name, tensor in opened.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def struct_reader(data: bytes, planned: list[tuple[bytes, int, int]]) -> list[tuple[int, ...]]:
    """Walk and check the records with precompiled structs, as one would: a row of `layout.TENSOR` for each."""
    fixed, two = struct.Struct("<3I").unpack_from, struct.Struct("<2I").unpack_from
    rows: list[tuple[int, ...]] = []
    at, gguf_offset, size = 92, 0, len(data)
    for name, ne0, ne1 in planned:
        n_dims, name_len, dtype = fixed(data, at)
        if n_dims != 2 or dtype != 0:
            raise ValueError(f"bad record at {at}")
        ne = two(data, at + 12)
        if ne != (ne0, ne1):
            raise ValueError(f"bad dims at {at + 12}")
        renamed = data[at + 20 : at + 20 + name_len] != name
        offset = (at + 20 + name_len + 31) & ~31
        nbytes = 4 * ne0 * ne1
        if offset + nbytes > size:
            raise ValueError(f"truncated at {offset}")
        rows.append((at, offset, nbytes, ne0, ne1, n_dims, int(renamed), gguf_offset))
        at = offset + nbytes
        gguf_offset += (nbytes + 31) & ~31
    return rows


# --- the pass alone -------------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """Everything that the pass over the LoRA records needs, prepared."""

    data: bytes
    plan: Any
    names: Any
    table: Any
    planned: list[tuple[bytes, int, int]]

    @classmethod
    def over(cls, path: Path) -> Pass:
        """Prepare the pass over the checkpoint at `path`."""
        data = path.read_bytes()
        opened = readers.read(SourceBuffer(data))
        p = opened.parameters
        (lora,) = schemas(p.n_layer)
        plan = lora.expected(dict(opened.ranks), {"n_embd": p.n_embd, "n_vocab": p.n_vocab})
        table = opened.table[: len(plan)]
        names = [lora.source_name(row).encode() for row in range(len(table))]
        planned = list(zip(names, table["ne0"].tolist(), table["ne1"].tolist()))
        return cls(data, plan, lora.name_words, np.zeros(len(plan), layout.TENSOR), planned)

    def jitted(self) -> Run:
        """Return the compiled pass over the whole file."""
        kernel = engine.compiled()
        words = np.frombuffer(self.data, "<u4", len(self.data) // 4)
        size = len(self.data)
        return lambda: kernel(words, 0, size, self.plan, self.names, self.table, 0, 92, 0, 0)

    def proved(self, path: Path) -> Run:
        """Return the proof of a file of a known shape, without numba."""
        source = SourceFile(path)
        opened = readers.read(source)
        (lora,) = schemas(opened.parameters.n_layer)
        shape = predict.Shape(opened.parameters.n_vocab, opened.parameters.n_embd, tuple(opened.ranks.values()))
        known = predict.predict(lora, shape, position=92, gguf=0, n_ff=opened.parameters.n_ff)
        return lambda: predict.prove(source, known)

    def structs(self) -> Run:
        """Return the loop that it is compared with."""
        return lambda: struct_reader(self.data, self.planned)


# --- the values -----------------------------------------------------------------------------------------------------


def blocks(path: Path, nbytes: int) -> list[Any]:
    """Return up to `nbytes` bytes of the largest tensors of the checkpoint at `path`, in blocks of 1 MiB of float32."""
    with ggcl_fast.open_checkpoint(path) as opened:
        tensors = sorted(opened.tensors.values(), key=lambda tensor: -tensor.size)
        flat = np.concatenate([tensor.ravel() for tensor in tensors[:2]])[: nbytes // 4]
    flat.flags.writeable = False
    return [flat[first : first + copying.BLOCK // 4] for first in range(0, flat.size, copying.BLOCK // 4)]


def numpy_passes(values: Any) -> tuple[int, int, float, float, float]:
    """Tell of `values` what numpy's own functions tell, one after the other."""
    return (
        int(np.count_nonzero(np.isnan(values))), int(np.count_nonzero(np.isinf(values))),
        float(np.min(values)), float(np.max(values)), float(np.dot(values, values)),
    )  # fmt: skip


def summary_by_numpy(path: Path) -> list[float]:
    """Go through all values of the checkpoint at `path` with numpy's own functions; return the norms of the deltas.

    As one would do it with the trick known: ``A.T @ A`` and ``B.T @ B``, block by block, instead of ``B @ A.T``.
    """
    norms = []
    with ggcl_fast.open_checkpoint(path) as opened:
        a: Any = 0.0
        for name, row in zip(opened.names, opened.table):
            offset, nbytes, rank = int(row["offset"]), int(row["nbytes"]), int(row["ne0"])
            pair = ".lora_" in name
            step = copying.BLOCK // (4 * rank) * 4 * rank if pair else copying.BLOCK
            gram: Any = 0.0
            for start in range(offset, offset + nbytes, step):
                values = np.frombuffer(read_at(opened.source, start, min(step, offset + nbytes - start)), "<f4")
                numpy_passes(values)
                if pair:
                    rows = values.reshape(-1, rank)
                    gram = gram + rows.T @ rows
            if name.endswith(".lora_b"):
                norms.append(float(np.sqrt(np.sum(a * gram))))
            a = gram
    return norms


def summary(path: Path) -> ggcl_fast.Summary:
    """Return the summary of the checkpoint at `path`, by the compiled pass."""
    with ggcl_fast.open_checkpoint(path) as opened:
        return ggcl_fast.summarise(opened, engine="numba")


# --- processes ------------------------------------------------------------------------------------------------------


def process(*command: str | Path) -> Run:
    """Return a run of a whole process."""
    words = [str(word) for word in command]
    # Modules as an installation has them, compiled: a variable of the caller's must not make each run compile ours.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)


def command(*arguments: str | Path) -> Run:
    """Return a run of the command, start to finish."""
    return process(sys.executable, "-m", "ggcl_fast", *arguments)


def script(source: Path, target: Path) -> Run:
    """Return a run of the old script's way, start to finish."""
    code = "import sys; from pathlib import Path; from bench.contenders import plain_gguf_writer as run; "
    return process(sys.executable, "-c", code + "run(Path(sys.argv[1]), Path(sys.argv[2]))", source, target)


def peak_memory(code: str, *arguments: str | Path) -> int:
    """Return the peak resident memory, in bytes, of a process that runs `code`."""
    # Linux gives a child its parent's peak to start with, so that getrusage would tell of us; /proc does not.
    code += """
import resource, sys
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if sys.platform == "linux":
    peak = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(peak)"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


# --- many files -----------------------------------------------------------------------------------------------------


def warm(_: int) -> None:
    """Make a worker ready: modules imported, the pass compiled."""
    engine.compiled()


def forget_shapes() -> None:
    """Make the next file the first of its shape."""
    for one in (schema._schema, predict.predict, predict.place_of_n_ff, finetune_gguf._tensors):
        one.cache_clear()


def convert_one(source: Path, target: Path) -> int:
    """Convert in a worker that is ready; returns the bytes written."""
    return ggcl_fast.convert(source, target, force=True).target_bytes
