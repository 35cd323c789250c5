"""Every comparison of the suite, with its target: one table.

A comparison is what ggcl_fast does, what one would do instead, and the ratio between the two that is aimed at.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import gguf
import numpy as np

import ggcl_fast
from ggcl_fast.batch.pool import process_pool
from ggcl_fast.inspection import survey
from ggcl_fast.readers.engine import Engine
from ggcl_fast.testing import Shape, checkpoint_bytes

from . import contenders as c

__all__ = ["COMPARISONS", "Comparison", "Pair", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How much work the suite does."""

    large: int = 2_000_000_000
    """Bytes of the large checkpoint."""
    small: int = 2_000_000
    """Bytes of the small one."""
    n_files: int = 100
    """Files of a batch."""
    n_tensors: int = 10_000
    """Records of the longest checkpoint."""
    rounds_large: int = 6
    rounds_small: int = 50


@dataclass
class Pair:
    """The two sides of a comparison, ready to run."""

    ours: c.Run
    theirs: c.Run
    outputs: Sequence[Path] = ()
    """Files to remove before each run."""
    work: tuple[float, float] = (1.0, 1.0)
    """Units of work done by each side; times are divided by them."""
    close: Callable[[], object] = lambda: None
    """Called at the end."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table."""

    group: str
    ours: str
    theirs: str
    target: float | None
    """Largest ratio aimed at; None where there is nothing to aim at."""
    make: Callable[[Path, Sizes], Pair | tuple[int, int]] = field(repr=False)
    """Makes the pair; or, for memory, the bytes that both sides take."""
    unit: str = "x"
    """"x" for a ratio of times, "MB" for a difference of memory."""

    @property
    def name(self) -> str:
        """What identifies the row."""
        return f"{self.ours}, against {self.theirs}"


def _startup(folder: Path, _: Sizes) -> Pair:
    out = folder / "out.gguf"
    return Pair(c.command(c.tiny(folder), out), c.process(sys.executable, "-c", "import gguf"), [out])


def _parse(shape: str) -> Callable[[Path, Sizes], Pair]:
    def make(folder: Path, sizes: Sizes) -> Pair:
        over = c.Pass.over(c.checkpoint(folder, c.SHAPES[shape], sizes.small))
        return Pair(over.jitted(), over.structs())

    return make


def _prove(folder: Path, sizes: Sizes) -> Pair:
    path = c.checkpoint(folder, c.SHAPES["7B"], sizes.small)
    over = c.Pass.over(path)
    return Pair(over.proved(path), over.structs())


def _per_tensor(_: Path, sizes: Sizes) -> Pair:
    def opening(n_layer: int) -> tuple[c.Run, int]:
        data = checkpoint_bytes(Shape(n_layer=n_layer))
        n_repeats = max(1, sizes.n_tensors // (6 + 18 * n_layer))

        def run() -> None:
            for _ in range(n_repeats):
                ggcl_fast.open_checkpoint(data, engine="numba")

        return run, n_repeats * (6 + 18 * n_layer)

    many, few = opening(sizes.n_tensors // 18), opening(2)
    return Pair(many[0], few[0], work=(many[1], few[1]))


def _small(*, known: bool) -> Callable[[Path, Sizes], Pair]:
    def make(folder: Path, sizes: Sizes) -> Pair:
        source, out = c.checkpoint(folder, c.SHAPES["7B"], sizes.small), folder / "out.gguf"

        def ours() -> None:
            if not known:
                c.forget_shapes()
            ggcl_fast.convert(source, out)

        return Pair(ours, lambda: shutil.copyfile(source, out), [out])

    return make


def _small_plain(folder: Path, sizes: Sizes) -> Pair:
    source, out = c.checkpoint(folder, c.SHAPES["7B"], sizes.small), folder / "out.gguf"
    opened = ggcl_fast.open_checkpoint(source.read_bytes())
    return Pair(lambda: ggcl_fast.convert(opened, out), lambda: c.write_plainly(opened, out), [out])


def _large_running(folder: Path, sizes: Sizes) -> Pair:
    source, out = c.checkpoint(folder, c.SHAPES["7B"], sizes.large), folder / "out.gguf"
    return Pair(lambda: ggcl_fast.convert(source, out), c.process("cp", source, out), [out])


def _large_process(theirs: Callable[[Path, Path], c.Run]) -> Callable[[Path, Sizes], Pair]:
    def make(folder: Path, sizes: Sizes) -> Pair:
        source, out = c.checkpoint(folder, c.SHAPES["7B"], sizes.large), folder / "out.gguf"
        return Pair(c.command(source, out), theirs(source, out), [out])

    return make


def _merged_copy(folder: Path, sizes: Sizes) -> Pair:
    base, source = c.base_model(folder, gguf.GGMLQuantizationType.F16, sizes.large)
    out = folder / "out.gguf"
    return Pair(c.command("--quiet", "--to", "merged", "--base", base, source, out), c.process("cp", base, out), [out])


def _merged(type: str) -> Callable[[Path, Sizes], Pair]:
    def make(folder: Path, sizes: Sizes) -> Pair:
        base, source = c.base_model(folder, gguf.GGMLQuantizationType[type], sizes.large // 4)
        out = folder / "out.gguf"

        def with_(engine: Engine) -> c.Run:
            return lambda: ggcl_fast.convert(source, out, to="merged", base=base, engine=engine)

        return Pair(with_("numba"), with_("python"), [out])

    return make


def _upon_base(folder: Path, sizes: Sizes) -> Pair:
    base, source = c.base_model(folder, gguf.GGMLQuantizationType.F16, 2 * sizes.large)
    outs = [folder / "out.gguf", folder / f"{base.stem}-out.gguf"]
    ours = c.command("--quiet", "--to", "adapter", "--base", base, source, outs[0])
    return Pair(ours, c.process("cp", base, outs[1]), outs)


def _of_others(*modules: str, rank: int) -> Callable[[Path, Sizes], Pair]:
    """Return a maker of: a ggla file of others, its A in F16, made an adapter of today."""

    def make(folder: Path, sizes: Sizes) -> Pair:
        if sizes.large < Sizes.large:  # in tests
            some, r = modules[:1], 1
        else:
            some, r = modules, rank
        source, out = c.adapter_of_others(folder, some, r, np.float16), folder / "out.gguf"
        return Pair(
            lambda: ggcl_fast.convert(source, out, to="adapter", heads=(32, 32)),
            lambda: shutil.copyfile(source, out),
            [out],
        )

    return make


def _per_byte(folder: Path, sizes: Sizes) -> Pair:
    large, small = (c.checkpoint(folder, c.SHAPES["13B"], n) for n in (sizes.large, 1_000_000))
    # Each into a file of its own: ext4 starts writing back at once what takes the place of another file.
    out, *outs = [folder / f"out-{i}.gguf" for i in range(21)]

    def convert_small() -> None:
        for target in outs:
            ggcl_fast.convert(small, target, engine="numba")

    work = (large.stat().st_size, len(outs) * small.stat().st_size)
    return Pair(lambda: ggcl_fast.convert(large, out, engine="numba"), convert_small, [out, *outs], work)


def _memory(folder: Path, sizes: Sizes) -> tuple[int, int]:
    source, out = c.checkpoint(folder, c.SHAPES["7B"], sizes.large), folder / "out.gguf"
    code = "import sys, ggcl_fast; ggcl_fast.convert(sys.argv[1], sys.argv[2], force=True)"
    both = c.peak_memory(code, source, out), c.peak_memory("import numpy, gguf")
    c.discard(out)
    return both


def _batch(folder: Path, sizes: Sizes) -> tuple[list[Path], Path]:
    first = c.checkpoint(folder, c.SHAPES["7B"], sizes.small)
    paths = [folder / f"batch-{i}.ggcl" for i in range(sizes.n_files)]
    for path in paths:
        if not path.exists():
            shutil.copyfile(first, path)
    os.sync()
    out = folder / "batch"
    out.mkdir(exist_ok=True)
    return paths, out


def _pool(n_workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that have everything imported and compiled."""
    pool = process_pool(n_workers)
    list(pool.map(c.warm, range(4 * n_workers)))
    return pool


def _batch_copy(folder: Path, sizes: Sizes) -> Pair:
    paths, out = _batch(folder, sizes)
    targets = [out / (path.stem + ".gguf") for path in paths]
    pool = _pool(2)
    return Pair(
        lambda: list(ggcl_fast.convert_many(zip(paths, targets), executor=pool, on_error="raise")),
        lambda: list(pool.map(shutil.copyfile, paths, targets, chunksize=4)),
        targets,
        close=pool.shutdown,
    )


def _batch_workers(folder: Path, sizes: Sizes) -> Pair:
    paths, out = _batch(folder, sizes)
    targets = [out / (path.stem + ".gguf") for path in paths]
    one, two = _pool(1), _pool(2)

    def close() -> None:
        one.shutdown()
        two.shutdown()

    return Pair(
        lambda: list(ggcl_fast.convert_many(zip(paths, targets), executor=two, on_error="raise")),
        lambda: list(ggcl_fast.convert_many(zip(paths, targets), executor=one, on_error="raise")),
        targets,
        close=close,
    )


def _batch_engines(theirs: Engine) -> Callable[[Path, Sizes], Pair]:
    """Return a maker of: many files by two new workers, with the engine that is chosen by itself, and with `theirs`."""

    def make(folder: Path, sizes: Sizes) -> Pair:
        paths, out = _batch(folder, sizes)
        targets = [out / f"{number}.gguf" for number in range(6 * len(paths))]

        def with_(engine: Engine) -> c.Run:
            jobs = list(zip(paths * 6, targets))
            return lambda: list(ggcl_fast.convert_many(jobs, workers=2, engine=engine, on_error="raise"))

        return Pair(with_("auto"), with_(theirs), targets)

    return make


def _batch_shell(folder: Path, sizes: Sizes) -> Pair:
    paths, out = _batch(folder, replace(sizes, n_files=min(10, sizes.n_files)))
    targets = [out / (path.stem + ".gguf") for path in paths]
    loop = 'python=$1; out=$2; shift 2; for f; do b=${f##*/}; "$python" -m ggcl_fast "$f" "$out/${b%.ggcl}.gguf"; done'
    return Pair(
        lambda: [c.convert_one(path, target) for path, target in zip(paths, targets)],
        c.process("sh", "-c", loop, "sh", sys.executable, out, *paths),
        targets,
    )


def _values(folder: Path, sizes: Sizes) -> Pair:
    blocks = c.blocks(c.checkpoint(folder, c.SHAPES["7B"], sizes.large // 30), 64 << 20)
    look = survey.compiled().survey
    return Pair(lambda: [look(block) for block in blocks], lambda: [c.numpy_passes(block) for block in blocks])


def _summary(folder: Path, sizes: Sizes) -> Pair:
    path = c.checkpoint(folder, c.SHAPES["7B"], sizes.large)
    return Pair(lambda: c.summary(path), lambda: c.summary_by_numpy(path))


COMPARISONS: Final = (
    Comparison("startup", "the command, 95 KB, start to finish", '`python -c "import gguf"`', 1.10, _startup),
    Comparison("parse", "the jitted pass, 582 records", "a `struct` loop", 0.02, _parse("7B")),
    Comparison("parse", "the jitted pass, 726 records", "a `struct` loop", 0.02, _parse("13B")),
    Comparison("parse", "proving a known shape, 582 records, no numba", "a `struct` loop", 0.035, _prove),
    Comparison("parse", "opening, time per tensor at 10,000 tensors", "at 42 tensors", 1.2, _per_tensor),
    Comparison("convert-small", "`convert`, 582 tensors, 2 MB", "`shutil.copyfile`", 1.3, _small(known=True)),
    Comparison("convert-small", "the same, first of its shape", "`shutil.copyfile`", 3, _small(known=False)),
    Comparison("convert-small", "`convert` of an open checkpoint, 2 MB", "plain `GGUFWriter`", 0.1, _small_plain),
    Comparison("convert-large", "`convert`, 2 GB", "`cp`", 0.7, _large_running),
    Comparison(
        "convert-large", "the command, 2 GB, start to finish", "`cp`", 1.1,
        _large_process(lambda source, out: c.process("cp", source, out)),
    ),
    Comparison(
        "convert-large", "the command, 2 GB, start to finish", "the old script's way", 0.5, _large_process(c.script),
    ),
    Comparison("convert-large", "`convert`, time per byte at 2 GB", "at 1 MB", 1.2, _per_byte),
    Comparison("convert-large", "peak memory, 2 GB", "`import numpy, gguf`", 16, _memory, "MB"),
    Comparison("merged", "the command, a base of 2 GB in F16", "`cp` of it", 2, _merged_copy),
    Comparison("merged", "Q8_0, half a GB, with kernels", "with numpy and gguf.quants", 0.15, _merged("Q8_0")),
    Comparison("merged", "Q4_0, half a GB, with kernels", "with numpy and gguf.quants", 0.15, _merged("Q4_0")),
    Comparison("adapter", "the command, upon a base of 4 GB", "`cp` of it", 1.2, _upon_base),
    Comparison(
        "adapter", "from a ggla of others: 7B, q and v, r 8, 13 MB", "`shutil.copyfile`", None,
        _of_others("attn_q", "attn_v", rank=8),
    ),
    Comparison(
        "adapter", "from a ggla of others: 7B, all, r 64, 494 MB", "`shutil.copyfile`", None,
        _of_others("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up", rank=64),
    ),
    Comparison(
        "batch", "`convert_many` by two warm workers, 2 MB a file", "`shutil.copyfile` by them", 1.3, _batch_copy,
    ),
    Comparison("batch", "`convert_many` by two warm workers, 2 MB a file", "by one", 1 / 1.7, _batch_workers),
    Comparison("batch", "600 files of 2 MB by two new workers", "with engine python", 1.1, _batch_engines("python")),
    Comparison("batch", "600 files of 2 MB by two new workers", "with engine numba", 1.1, _batch_engines("numba")),
    Comparison("batch", "`convert`, 2 MB a file", "a shell loop over the command", None, _batch_shell),
    Comparison(
        "info", "the jitted pass over values, blocks of 1 MiB", "`isnan`, `isinf`, `min`, `max`, `dot`", 0.5, _values
    ),
    Comparison("info", "`Checkpoint.summary`, 2 GB", "the same numbers with numpy", 0.4, _summary),
)  # fmt: skip
"""All comparisons, in the order of the table."""
