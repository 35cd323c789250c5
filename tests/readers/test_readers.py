"""The readers of GGUF checkpoints and ggla adapters: the same checkpoints, and clear errors for everything else."""

import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import (
    Checkpoint,
    CheckpointError,
    NotACheckpointError,
    TruncatedError,
    open_checkpoint,
    readers,
)
from ggcl_fast.commands.convert import main
from ggcl_fast.storage import sources
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from .. import reference
from ..gguf_parts import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U32,
    U64,
    Parts,
    converted,
    edited,
    ggla_bytes,
    ggla_records,
    parse,
    version_1,
)
from ..hostile import Hostile
from ..hostile_gguf import HOSTILE_GGLA, HOSTILE_GGUF, PARTS, SHAPE, SOUND
from ..mutations import GUARDED, ONES, within_bounds
from ..reference import DATA, FIXTURES

TABLES = {"gguf": HOSTILE_GGUF, "ggla": HOSTILE_GGLA}
BAD = {f"{kind}: {name}": bad for kind, table in TABLES.items() for name, bad in table.items()}


def same_lora(one: Checkpoint, other: Checkpoint) -> None:
    """Hold that both have the same LoRA tensors in the same order, shapes, ranks and dims."""
    lora = [name for name in one.names if ".lora_" in name]
    assert [name for name in other.names if ".lora_" in name] == lora
    for name in lora:
        a, b = one.tensors[name], other.tensors[name]
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    assert one.ranks == other.ranks
    for field in ("n_vocab", "n_embd", "n_layer", "n_ff"):
        assert getattr(one.parameters, field) == getattr(other.parameters, field)


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("whole", "adapter"), [("trained.ggcl", "trained.ggla"), ("finetune-v1.gguf", "finetune-v1.ggla")]
)
@pytest.mark.parametrize("small", [True, False], ids=["in memory", "in windows"])
def test_an_adapter_holds_the_weights_of_its_checkpoint(
    whole: str, adapter: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    with open_checkpoint(DATA / whole) as checkpoint, open_checkpoint(DATA / adapter) as other:
        same_lora(checkpoint, other)
        assert (checkpoint.format, other.format) == (whole[-4:], "ggla")
        assert (checkpoint.scale, other.scale) == (1.0, 1.0)
        assert other.optimizer is None
        assert other.training == (0, 0, 0)
        p = other.parameters
        assert (p.n_mult, p.n_head, p.n_rot, p.n_head_kv) == (0, 0, 0, 0)
        assert repr(other).endswith(f"{adapter}': ggla, 2 layers, n_embd 64, 42 tensors, no optimizer>")
        records = other.table["record"].tolist()
        assert (records[0], records) == (16, sorted(records))


def test_a_later_checkpoint_tells_what_it_has() -> None:
    with open_checkpoint(DATA / "finetune-v1.gguf") as checkpoint:
        assert checkpoint.training == (323, 1296, 41344)
        assert checkpoint.parameters == (288, 64, 0, 4, 2, 16, 192, 4)
        assert checkpoint.optimizer == ggcl_fast.Adam(0, 13381, 323, False, 7.759576797485352, 5.920482635498047, 0)
        assert checkpoint.warnings == ()
        assert checkpoint.extra["training.shuffle.samples_hash"] == 18030856634589985793
        assert checkpoint.extra["training.file_version"] == 1
        assert checkpoint.extra["llama.attention.layer_norm_rms_epsilon"] == np.float32(5e-6)
        # Every key of the file is either read or extra.
        fields = [name for name in gguf.GGUFReader(DATA / "finetune-v1.gguf").fields if not name.startswith("GGUF.")]
        assert set(checkpoint.extra) < set(fields)
        assert len(checkpoint.extra) == 11


@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_conversion_reads_back_as_its_source(fixture: str, tmp_path: Path) -> None:
    ggcl_fast.convert(DATA / fixture, tmp_path / "out.gguf")
    with open_checkpoint(DATA / fixture) as one, open_checkpoint(tmp_path / "out.gguf") as two:
        same_lora(one, two)
        assert two.names == one.names
        assert (two.training, two.optimizer, len(two.extra)) == (one.training, one.optimizer, 0)
        assert two.parameters == one.parameters._replace(n_mult=0)
        assert (two.table["gguf_offset"] == one.table["gguf_offset"]).all()
        for name in one.names:
            np.testing.assert_array_equal(two.tensors[name], one.tensors[name])


# --- any shape ------------------------------------------------------------------------------------------------------

shapes = st.builds(
    Shape,
    n_layer=st.integers(0, 12),
    n_embd=st.integers(1, 9),
    n_vocab=st.integers(1, 40),
    n_mult=st.integers(1, 40),
    ranks=st.fixed_dictionaries(dict.fromkeys(RANKS, st.integers(1, 5))),
    optimizer=st.sampled_from(["adam", "lbfgs"]),
    past=st.integers(0, 4),
    lbfgs_m=st.integers(1, 7),
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 9))
def test_a_conversion_converts_to_itself(shape: Shape, seed: int) -> None:
    once = converted(checkpoint_bytes(shape, seed=seed))
    assert converted(once) == once


@settings(max_examples=60, deadline=None)
@given(shape=shapes, old_names=st.booleans(), rank=st.integers(1, 99), alpha=st.integers(1, 99), rng=st.randoms())
def test_adapters_of_any_shape_order_and_names(
    shape: Shape, old_names: bool, rank: int, alpha: int, rng: random.Random
) -> None:
    records = ggla_records(shape, old_names=old_names)
    with (
        open_checkpoint(checkpoint_bytes(shape)) as checkpoint,
        open_checkpoint(ggla_bytes(records, rank=rank, alpha=alpha)) as adapter,
    ):
        assert adapter.scale == alpha / rank
        if shape.n_layer:
            same_lora(checkpoint, adapter)
    rng.shuffle(records)
    with open_checkpoint(ggla_bytes(records)) as adapter:
        if old_names:
            assert list(adapter.names) == [reference.gguf_name(record.name.decode()) for record in records]
        for name, record in zip(adapter.names, records):
            assert adapter.tensors[name].tobytes() == record.data


@settings(max_examples=30, deadline=None)
@given(
    shape=st.builds(Shape, n_layer=st.integers(1, 3), n_embd=st.just(12), n_vocab=st.integers(1, 9), n_head=st.just(6),
                    ranks=st.fixed_dictionaries(dict.fromkeys(RANKS, st.integers(1, 3)))),
    n_head_kv=st.sampled_from([None, 1, 2, 3, 6]), short_dims=st.booleans(),
)  # fmt: skip
def test_later_checkpoints_with_grouped_heads_and_short_dims(
    shape: Shape, n_head_kv: int | None, short_dims: bool
) -> None:
    parts = version_1(shape, n_head_kv=n_head_kv, short_dims=short_dims)
    with open_checkpoint(parts.build()) as checkpoint:
        assert checkpoint.parameters.n_head_kv == (n_head_kv or 6)
        assert checkpoint.training.tokens == 2**33
        assert checkpoint.extra["training.shuffle.rng_state"] == "1 2 3"
        b = checkpoint.tensors["blk.0.attn_v.weight.lora_b"]
        assert b.shape == (2 * (n_head_kv or 6), shape.ranks["wv"])
        assert checkpoint.tensors["blk.0.attn_norm.weight.lora_b"].shape == (1, shape.ranks["attention_norm"])
        for name, tensor in parts.tensors.items():
            assert checkpoint.tensors[name].tobytes() == tensor.data
        assert checkpoint.warnings == ()


def test_adapters_with_grouped_heads_and_short_dims() -> None:
    records = ggla_records(SHAPE, old_names=False)
    for record in records:
        if b"attn_k.weight.loraB" in record.name or b"attn_v.weight.loraB" in record.name:
            record.dims, record.data = (4, 4), record.data[:64]
        if record.dims[1] == 1:
            record.dims = record.dims[:1]
    with open_checkpoint(ggla_bytes(records)) as adapter:
        assert adapter.tensors["blk.0.attn_k.weight.lora_b"].shape == (4, 4)
        assert adapter.tensors["output_norm.weight.lora_b"].shape == (1, 1)
    odd = records[[r.name for r in records].index(b"blk.0.attn_v.weight.loraB")]
    odd.dims, odd.data = (4, 2), odd.data[:32]
    with pytest.raises(CheckpointError, match=r"attn_v.weight.lora_b': dims .*: expected \(4, 4\), found \(4, 2\)"):
        open_checkpoint(ggla_bytes(records))


def test_tensors_may_stand_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(parts: Parts) -> None:
        parts.tensors = dict(reversed(parts.tensors.items()))
        parts.keys = dict(reversed(parts.keys.items()))

    other = edited(PARTS, backwards)
    assert other != SOUND
    assert converted(other) == converted(SOUND) == SOUND
    monkeypatch.setattr(sources, "SMALL", -1)  # copied block by block
    (tmp_path / "other.gguf").write_bytes(other)
    ggcl_fast.convert(tmp_path / "other.gguf", tmp_path / "out.gguf", to="checkpoint", check_finite=True)
    assert (tmp_path / "out.gguf").read_bytes() == SOUND


@pytest.mark.parametrize("alignment", [1, 2, 128])
def test_an_alignment_of_its_own_is_followed(alignment: int) -> None:
    parts = parse(SOUND).u32("general.alignment", alignment)
    parts.alignment = alignment
    with open_checkpoint(parts.build()) as checkpoint:
        for name, tensor in parts.tensors.items():
            assert checkpoint.tensors[name].tobytes() == tensor.data
    assert converted(parts.build()) == SOUND


def test_bytes_behind_the_last_tensor_are_told() -> None:
    with open_checkpoint(SOUND + bytes(100)) as checkpoint:
        (warning,) = checkpoint.warnings
    assert warning.startswith("1")
    assert "bytes follow the last tensor, which ends at offset" in warning


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_is_told_by_kind_place_and_words(bad: Hostile) -> None:
    data = bad.data()
    with pytest.raises(CheckpointError) as caught, within_bounds(len(data), traced=True):
        open_checkpoint(GUARDED.holding(data))
    assert str(caught.value) == f"<buffer>: {bad.message}"
    assert type(caught.value) is bad.kind


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_touches_neither_source_nor_target(
    bad: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    source, target = tmp_path / "in", tmp_path / "out.gguf"
    source.write_bytes(bad.data())
    target.write_bytes(b"precious")
    with pytest.raises(bad.kind) as caught:
        ggcl_fast.convert(source, target, force=True)
    assert str(caught.value) == f"{source}: {bad.message}"
    assert source.read_bytes() == bad.data()
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.gguf"]


def test_real_models_are_no_checkpoints() -> None:
    with pytest.raises(NotACheckpointError) as caught:
        open_checkpoint(DATA / "base.gguf")
    assert str(caught.value) == (
        f"{DATA / 'base.gguf'}: training.type: expected 'finetune_lora', found none: a base model "
        "(hand in the checkpoint that finetune wrote when it trained on it)"
    )


def test_a_checkpoint_cut_at_any_byte_is_an_error() -> None:
    data = version_1(Shape(n_layer=1, n_embd=4, n_vocab=3, ranks=ONES), n_head_kv=1).build()
    with open_checkpoint(data) as checkpoint:
        end = int((checkpoint.table["offset"] + checkpoint.table["nbytes"]).max())
        expected = checkpoint.table
    assert len(data) - end < 32
    for size in range(len(data)):
        if size >= end:  # nothing but padding is gone
            assert (open_checkpoint(data[:size]).table == expected).all()
            continue
        with pytest.raises(TruncatedError if size >= 4 else NotACheckpointError):
            open_checkpoint(data[:size])


def test_an_adapter_cut_at_any_byte_is_an_error_but_at_the_end_of_a_layer() -> None:
    records = ggla_records(Shape(n_layer=2, n_embd=4, n_vocab=3, n_mult=4, ranks=ONES))
    data = ggla_bytes(records)
    layers = {len(ggla_bytes(records[:n])): n for n in (6, 24)}  # nothing counts the layers
    boundaries = {len(ggla_bytes(records[:n])) for n in range(len(records))}
    for size in range(len(data)):
        if size in layers:
            assert len(open_checkpoint(data[:size]).names) == layers[size]
            continue
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(data[:size])
        kind = NotACheckpointError if size < 4 else CheckpointError if size in boundaries else TruncatedError
        assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("fixture", "problem"),
    [
        (
            "trained.ggla",
            "optimizer: an adapter has neither optimizer state nor training counts "
            "(it cannot become a checkpoint again: take the one that finetune wrote beside it)",
        ),
        (
            "finetune-v1.gguf",
            "keys: a checkpoint of training.file_version 0 has no place for training.file_version, "
            "llama.context_length, llama.attention.head_count_kv and 8 more "
            "(it is in GGUF form already; copy it as it is)",
        ),
    ],
)
def test_what_version_0_has_no_place_for_is_not_written(
    fixture: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.gguf"
    for dry_run in (False, True):
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(DATA / fixture, target, to="checkpoint", dry_run=dry_run)
        assert str(caught.value) == f"{DATA / fixture}: {problem}"
    assert main([str(DATA / fixture), str(target), "--to", "checkpoint", "--verbose"]) == 1
    assert capsys.readouterr().err.endswith(f"ggcl-fast: error: {DATA / fixture}: {problem}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [("llama.rope.freq_base", F32, 10000.0), ("llama.attention.layer_norm_rms_epsilon", F32, 5e-6),
     ("general.file_type", U32, 1), ("general.name", STRING, "x"), ("general.file_type", U64, 0),
     ("general.file_type", BOOL, False), ("optimizer.lbfgs.line_search_step", F32, 0.5)],
)  # fmt: skip
def test_nothing_that_a_file_says_is_left_out(key: str, kind: int, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"no place for {key} "):
        converted(edited(PARTS, lambda parts: parts.put(key, kind, value)))


def test_arrays_are_not_left_out_either() -> None:
    data = edited(PARTS, lambda parts: parts.keys.update({b"a": (ARRAY, U32.to_bytes(4, "little") + bytes(8))}))
    with open_checkpoint(data) as checkpoint:
        assert checkpoint.extra == {"a": "array of 0"}


def test_large_files_are_read_quickly_and_in_little_memory(tmp_path: Path) -> None:
    shape = Shape(n_layer=32, n_embd=64, n_vocab=300, n_head=4)
    records = ggla_records(shape)
    (tmp_path / "a.ggla").write_bytes(ggla_bytes(records))
    (tmp_path / "a.gguf").write_bytes(version_1(shape, n_head_kv=2).build())
    for path in (tmp_path / "a.ggla", tmp_path / "a.gguf"):
        with within_bounds(path.stat().st_size, traced=True):
            open_checkpoint(path).close()
        begin = time.thread_time()
        open_checkpoint(path).close()
        assert time.thread_time() - begin < 0.1


@pytest.mark.parametrize("fixture", ["finetune-v1.gguf", "trained.ggla"])
def test_a_file_that_shrinks_while_it_is_read_is_told(
    fixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    path = tmp_path / fixture
    path.write_bytes((DATA / fixture).read_bytes())
    source = sources.SourceFile(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ggcl_fast.SourceChangedError, match="now ends at 2000"):
        readers.read(source)
    source.close()


@pytest.mark.parametrize("fixture", ["finetune-v1.gguf", "trained.ggla"])
def test_every_kind_of_buffer(fixture: str) -> None:
    data = (DATA / fixture).read_bytes()
    with open_checkpoint(data) as checkpoint:
        expected = checkpoint.tensors["output.weight.lora_b"].copy()
    for buffer in (bytearray(data), memoryview(b"x" + data)[1:], np.frombuffer(data, np.uint8)):
        with open_checkpoint(buffer) as checkpoint:
            view = checkpoint.tensors["output.weight.lora_b"]
            np.testing.assert_array_equal(view, expected)
            assert np.shares_memory(view, np.frombuffer(buffer, np.uint8))
            assert not view.flags.writeable


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize(("n_layer", "n_vocab", "n_ff"), [(8, 32000, 352), (8, 1234, 352), (3, 777, 250)])
def test_adapters_in_stores_are_read_with_few_requests(
    old_names: bool, n_layer: int, n_vocab: int, n_ff: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait for each other; guesses that are wrong cost one each."""
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    monkeypatch.setattr("ggcl_fast.storage.remote.SMALL", 0)
    monkeypatch.setattr("ggcl_fast.storage.remote._WINDOW", 1024)
    monkeypatch.setattr("ggcl_fast.storage.remote._GAP", 0)
    data = _adapter(Shape(n_layer=n_layer, n_embd=128, n_vocab=n_vocab, n_ff=n_ff), old_names=old_names)
    memory = fsspec.filesystem("memory")
    memory.pipe("/in.ggla", data)
    n_requests = 0
    cat_file, cat_ranges = type(memory).cat_file, type(memory).cat_ranges

    def count_file(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_requests
        n_requests += 1
        return cat_file(self, *args, **options)

    def count_ranges(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_requests
        before = n_requests
        blocks = cat_ranges(self, *args, **options)
        n_requests = before + 1  # they go out together
        return blocks

    monkeypatch.setattr(type(memory), "cat_file", count_file)
    monkeypatch.setattr(type(memory), "cat_ranges", count_ranges)
    with open_checkpoint("memory://in.ggla") as far, open_checkpoint(data) as near:
        assert far.table.tobytes() == near.table.tobytes()
        assert far.parameters.n_layer == n_layer
    assert n_requests <= 9


def _adapter(shape: Shape, *, old_names: bool) -> bytes:
    """Return a ggla file of this shape, in plain struct."""
    data = bytearray(struct.pack("<4I", 0x67676C61, 1, 4, 4))
    for old, ne0, ne1 in shape.lora_tensors():
        name = old if old_names else f"{reference.gguf_name(old)[:-6]}lora{old[-1]}"
        data += struct.pack("<5I", 2, len(name), 0, ne0, ne1) + name.encode()
        data += bytes(-len(data) % 32) + bytes(4 * ne0 * ne1)
    return bytes(data)


def test_no_heads_are_no_division_by_zero() -> None:
    for n_head_kv in (0, 1, 2):
        data = edited(
            version_1(SHAPE),
            lambda parts: parts.u32("llama.attention.head_count", 0),
            lambda parts: parts.u32("llama.attention.head_count_kv", n_head_kv),  # noqa: B023
        )
        if n_head_kv:
            with pytest.raises(CheckpointError, match=r"head_count at offset .* expected at least 1, found 0"):
                open_checkpoint(data)
        else:
            open_checkpoint(data).close()
