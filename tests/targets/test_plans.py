"""What is planned is what is written: sizes, and values that are not finite."""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast.storage.files import OutputFile
from ggcl_fast.targets import TARGETS, names
from ggcl_fast.targets.base_model import BaseModel
from ggcl_fast.targets.options import Choices, Options
from ggcl_fast.targets.plan import planner
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..gguf_parts import Collected
from ..hostile import places, put
from ..models import BASE, Model, Type
from ..reference import DATA

JOBS = [
    Options("checkpoint"),
    *(Options("adapter", outtype=outtype) for outtype in ("f32", "f16", "bf16")),
    Options("adapter", base=BASE), Options("merged", base=BASE),
    *(Options("peft", base=base, outtype=outtype) for base in (None, BASE) for outtype in ("f32", "f16")),
]  # fmt: skip


@pytest.mark.parametrize("options", JOBS, ids=lambda one: f"{one.to} {one.outtype} {one.base is not None}")
def test_what_is_written_is_as_long_as_was_planned(options: Options) -> None:
    with ggcl_fast.open_checkpoint(DATA / "trained.ggcl") as checkpoint:
        base = BaseModel(BASE) if options.base is not None else None
        assert options.to is not None
        plan = planner(options.to)(checkpoint, options, base, names.outputs("out", options))
        for file in plan.files:
            written = Collected()
            file.write(written)
            assert file.nbytes == len(written)
        if base is not None:
            base.source.close()


def test_an_adapter_of_f16_reserves_half_of_one_of_f32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggcl_fast.conversion._PREALLOCATED", 0)
    asked: list[int] = []
    monkeypatch.setattr(OutputFile, "preallocate", lambda _, nbytes: asked.append(nbytes))
    data = checkpoint_bytes(Shape(n_vocab=50_000))
    for outtype in ("f32", "f16"):
        with ggcl_fast.open_checkpoint(data) as checkpoint:
            report = ggcl_fast.convert(checkpoint, tmp_path / outtype, to="adapter", outtype=outtype)
        assert asked.pop() == report.target_bytes < len(data) / 2.9
    assert not asked


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_values_that_are_not_finite_leak_no_warnings(to: str, kind: Type, tmp_path: Path) -> None:
    """Warnings are errors in these tests; a signalling NaN, an infinity, and both in one product."""
    model = Model(n_head=4, n_head_kv=4, head_dim=16, n_ff=96, n_vocab=288, kind=kind)
    model.write(tmp_path / "base.gguf")
    data = bytearray(checkpoint_bytes(Shape(n_layer=2, n_embd=64, n_ff=96, n_vocab=288, n_head=4, n_rot=16)))
    with ggcl_fast.open_checkpoint(bytes(data)) as checkpoint:
        offsets = checkpoint.table["offset"][checkpoint.table["nbytes"] >= 12].tolist()
    for offset in offsets:
        struct.pack_into("<I2f", data, offset, 0x7F800001, math.inf, -math.inf)
    path = tmp_path / "in.ggcl"
    path.write_bytes(data)
    base: Any = tmp_path / "base.gguf" if to != "checkpoint" else None
    ggcl_fast.convert(path, tmp_path / "out", to=to, base=base)
    if to in ("adapter", "peft"):
        ggcl_fast.convert(path, tmp_path / "alone", to=to)
    with ggcl_fast.open_checkpoint(path) as checkpoint:
        assert ggcl_fast.summarise(checkpoint, engine="python").verdict == "diverged"


def test_a_scale_that_overflows_names_the_tensor(tmp_path: Path) -> None:
    data = bytearray((DATA / "trained.ggla").read_bytes())
    struct.pack_into("<2I", data, 8, 1, (1 << 32) - 1)
    with ggcl_fast.open_checkpoint(bytes(data)) as checkpoint:
        row = checkpoint.names.index("blk.0.attn_q.weight.lora_b")
        struct.pack_into("<f", data, int(checkpoint.table["offset"][row]), 1e37)
    problem = r"tensor 'blk\.0\.attn_q\.weight\.lora_b': data: a value is too large for F32"
    for to in ("adapter", "peft", "merged"):
        with (
            ggcl_fast.open_checkpoint(bytes(data)) as checkpoint,
            pytest.raises(ggcl_fast.CheckpointError, match=problem),
        ):
            ggcl_fast.convert(checkpoint, tmp_path / to, to=to, base=BASE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "base"), [("adapter", None), ("adapter", BASE), ("merged", BASE), ("peft", BASE)])
@pytest.mark.parametrize("dry_run", [False, True])
def test_values_that_are_not_finite_are_counted(to: str, base: Path | None, dry_run: bool, tmp_path: Path) -> None:
    data = (DATA / "trained.ggcl").read_bytes()
    for index, value in ((7, np.nan), (13, np.inf)):  # B of a norm of a layer, and B of v
        record = places(data).records[index]
        data = put(data, record.data, "<f", value)
    (tmp_path / "in.ggcl").write_bytes(data)
    report = ggcl_fast.convert(tmp_path / "in.ggcl", tmp_path / "out", to=to, base=base, dry_run=dry_run)
    n = 2 if base is not None else 1  # norms are left out without it
    assert report.warnings[-1].startswith(f"{n} values of the deltas are NaN or infinite: ")
    assert "blk.0.attn_v.weight.lora_b (1)" in report.warnings[-1]
    plain = ggcl_fast.convert(DATA / "trained.ggcl", tmp_path / "plain", to=to, base=base, dry_run=dry_run)
    assert plain.warnings == ()


def test_keywords_are_those_of_the_options() -> None:
    assert list(Choices.__annotations__) == [field.name for field in dataclasses.fields(Options)]
