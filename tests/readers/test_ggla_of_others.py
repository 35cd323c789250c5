"""ggla files that convert-lora-to-ggml.py made of Hugging Face's adapters: any modules, halves, other rows."""

import itertools
import random
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import Checkpoint, CheckpointError, NotACheckpointError, TruncatedError, open_checkpoint
from ggcl_fast.inspection.summarise import summarise
from ggcl_fast.storage import sources

from ..adapters import OLD_NAMES, Lora, Type, deltas, foreign_ggla, foreign_records, made, reordered
from ..engines import COMPILED_OR_NOT
from ..gguf_parts import Record, ggla_bytes
from ..hostile import Hostile
from ..mutations import GUARDED, is_refused_or_can_be_read, within_bounds
from ..reference import DATA

WILD: Final = DATA / "wild"
OTHERS: Final = ("attn_qkv", "ssm_in", "ffn_gate_shexp")
HALVES: Final = st.sampled_from([Type.F32, Type.F16])

loras: Final = st.builds(
    lambda layer, module, *sizes, **types: made(f"blk.{layer}.{module}", *sizes, **types),
    st.integers(0, 80) | st.just(999_999_999), st.sampled_from([*OLD_NAMES, *OTHERS]),
    st.integers(1, 33), st.integers(1, 9), st.integers(1, 33),
    types=st.tuples(HALVES, HALVES), seed=st.integers(0, 99), old_names=st.booleans(),
)  # fmt: skip
adapters: Final = st.lists(loras, min_size=1, max_size=9, unique_by=lambda lora: lora.weight)


def holds(checkpoint: Checkpoint, expected: Sequence[Lora], scale: float) -> None:
    """Hold that a checkpoint has what went into it, in this order."""
    shown = {name: matrix for lora in expected for name, matrix in lora.shown.items()}
    assert list(checkpoint.tensors) == list(checkpoint.names) == list(shown)
    for name, matrix in shown.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], matrix, strict=True)
    assert [(p.weight, p.layer, p.module, p.rank, p.scale) for p in checkpoint.pairs] == [
        (f"{lora.weight}.weight", lora.layer, lora.module, lora.rank, scale) for lora in expected
    ]
    assert [(p.n_in, p.n_out) for p in checkpoint.pairs] == [(lora.a.shape[1], len(lora.b)) for lora in expected]


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft-qkv", "peft-all-f16"])
@pytest.mark.parametrize("small", [True, False], ids=["in memory", "in windows"])
def test_a_real_file_has_what_its_gguf_adapter_has(name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are the same but for rounding to halves and the order of rows."""
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    with (
        open_checkpoint(WILD / f"{name}.ggla") as adapter,
        open_checkpoint(WILD / f"{name}-adapter.gguf") as other,
    ):
        assert (adapter.format, adapter.rows, adapter.partial, adapter.arch) == ("ggla", "hf", True, None)
        assert set(adapter.names) == set(other.names)
        assert {p.scale for p in adapter.pairs} == {p.scale for p in other.pairs} == {2.0}
        assert adapter.parameters.n_embd == 64
        assert (adapter.training, adapter.optimizer, adapter.parameters.n_head) == ((0, 0, 0), None, 0)
        for name_ in adapter.names:
            found, expected = adapter.tensors[name_], other.tensors[name_]
            if name_.endswith((".attn_q.weight.lora_b", ".attn_k.weight.lora_b")):
                found = reordered(found.astype(np.float64), 4).astype(np.float32)
            np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2**-24)


# --- any file -------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(pairs=adapters, r=st.integers(1, 99), alpha=st.integers(1, 99))
def test_a_file_of_any_modules_types_sizes_and_names(pairs: list[Lora], r: int, alpha: int) -> None:
    data = foreign_ggla(pairs, r=r, alpha=alpha)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        crooked = memoryview(b"x" + data)[1:]
        with mock.patch.object(sources, "SMALL", -1):
            in_windows = open_checkpoint(file.name)
        for checkpoint in (open_checkpoint(data), open_checkpoint(crooked), open_checkpoint(file.name), in_windows):
            with checkpoint:
                holds(checkpoint, pairs, alpha / r)
                assert (checkpoint.rows, checkpoint.partial, checkpoint.arch) == ("hf", True, None)
                assert checkpoint.parameters.n_layer == 1 + max(lora.layer or 0 for lora in pairs)
                assert checkpoint.scale == alpha / r
                assert checkpoint.source.file_size == len(data)


@settings(max_examples=40, deadline=None)
@given(pairs=adapters, rng=st.randoms(use_true_random=False))
def test_records_may_stand_in_any_order(pairs: list[Lora], rng: random.Random) -> None:
    records = foreign_records(pairs)
    rng.shuffle(records)
    shown = {name: matrix for lora in pairs for name, matrix in lora.shown.items()}
    with open_checkpoint(ggla_bytes(records)) as checkpoint:
        assert set(checkpoint.names) == set(shown)
        for name, matrix in shown.items():
            np.testing.assert_array_equal(checkpoint.tensors[name], matrix, strict=True)
        rows = checkpoint.table["record"].tolist()
        assert (rows[0], rows) == (16, sorted(rows))


def test_records_need_not_start_at_words() -> None:
    pairs = [made("blk.0.attn_q", 5, 1, 3, (Type.F16, Type.F16)), made("blk.0.attn_v", 3, 3, 1, (Type.F16, Type.F32))]
    with open_checkpoint(foreign_ggla(pairs)) as checkpoint:
        holds(checkpoint, pairs, 2.0)
        assert {position % 4 for position in checkpoint.table["record"].tolist()} == {0, 2}


def test_the_longest_name_that_is_read() -> None:
    module = "x" * (255 - len("blk.0..weight.loraA"))
    pairs = [made(f"blk.0.{module}", 2, 1, 2)]
    with open_checkpoint(foreign_ggla(pairs)) as checkpoint:
        holds(checkpoint, pairs, 2.0)


def test_names_in_both_styles_in_one_file() -> None:
    pairs = [made(f"blk.{i}.{name}", 4, 2, 6, old_names=i == 0) for i in (1, 0, 10) for name in OLD_NAMES]
    with open_checkpoint(foreign_ggla(pairs)) as checkpoint:
        holds(checkpoint, pairs, 2.0)


@settings(max_examples=40, deadline=None)
@given(pairs=adapters, r=st.integers(1, 16), alpha=st.integers(1, 64))
def test_a_summary_and_a_trial_of_any_file(pairs: list[Lora], r: int, alpha: int) -> None:
    data = foreign_ggla(pairs, r=r, alpha=alpha)
    with open_checkpoint(data) as checkpoint:
        summary = summarise(checkpoint)
        report = ggcl_fast.convert(
            checkpoint, "nowhere.gguf", to="adapter", rows="gguf", arch="llama", check_finite=True, dry_run=True
        )
    assert (summary.format, summary.scale, summary.nbytes) == ("ggla", alpha / r, len(data))
    assert summary.n_parameters == sum(lora.a.size + lora.b.size for lora in pairs)
    for found, lora in zip(summary.pairs, pairs):
        assert (found.weight, found.layer, found.module) == (f"{lora.weight}.weight", lora.layer, lora.module)
        assert found.norm == pytest.approx(np.linalg.norm(lora.delta(alpha / r)), rel=1e-4, abs=1e-6)
    for one, matrix in zip(summary.tensors, [matrix for lora in pairs for matrix in lora.shown.values()]):
        assert (one.shape, one.n_nan, one.n_inf) == (matrix.shape, 0, 0)
        assert (one.minimum, one.maximum) == (matrix.min(), matrix.max())
    assert (report.dry_run, report.n_tensors, report.source_bytes) == (True, 2 * len(pairs), len(data))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("end", ["a", "b"])
@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_what_is_not_finite_in_halves_is_found(value: float, end: str, engine: Any) -> None:
    halves = (Type.F16, Type.F16)
    pairs = [made("blk.0.attn_q", 5, 3, 7, halves), made("blk.3.attn_v", 7, 3, 5, halves)]
    getattr(pairs[1], end)[1, 2] = value
    with open_checkpoint(foreign_ggla(pairs)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(
                checkpoint, "x.gguf", to="adapter", rows="gguf", check_finite=True, dry_run=True, engine=engine
            )
        name = f"blk.3.attn_v.weight.lora_{end}"
        assert caught.value.found == {name: 1}
        assert str(caught.value) == (f"<buffer>: data: 1 of 4 tensors have values that are NaN or infinite: {name} (1)")
        (one,) = (one for one in summarise(checkpoint, engine=engine).tensors if one.n_nan or one.n_inf)
        assert (one.name, one.n_nan) == (name, int(np.isnan(value)))
        found = checkpoint.tensors[name]
        np.testing.assert_array_equal(found, pairs[1].shown[name])


def test_a_large_file(tmp_path: Path) -> None:
    """Above `sources.SMALL`, with tensors of more than a block, on both sides of odd places."""
    types = [(a, b) for a in (Type.F16, Type.F32) for b in (Type.F32, Type.F16)]
    sizes = [(40_001, 7, 1001), (3, 1, 5), (301, 9, 50_001), (1, 3, 1), (170_001, 5, 999)]
    pairs = [
        made(f"blk.{i}.{module}", *sizes[n % 5], types[n % 4], old_names=n % 3 == 0)
        for n, (i, module) in enumerate(itertools.product((0, 10, 2), ("attn_q", "ffn_down")))
    ]
    path = tmp_path / "ggml-adapter-model.bin"
    path.write_bytes(foreign_ggla(pairs, r=8, alpha=16))
    assert path.stat().st_size > sources.SMALL
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.source.memory is None
        summary = summarise(checkpoint)
        for found, lora in zip(summary.pairs, pairs):
            assert found.norm == pytest.approx(_frobenius(lora, 2.0), rel=1e-4)
        report = ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", to="adapter", rows="gguf", check_finite=True)
        assert report.target_bytes == (tmp_path / "out.gguf").stat().st_size
        holds(checkpoint, pairs, 2.0)
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        for lora in pairs:
            np.testing.assert_array_equal(checkpoint.tensors[f"{lora.weight}.weight.lora_a"], lora.a.T)


def _frobenius(lora: Lora, scale: float) -> float:
    a, b = lora.a.astype(np.float64), lora.b.astype(np.float64)
    return scale * float(np.sqrt(np.sum((a @ a.T) * (b.T @ b))))


# --- what is computed with it ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n_head_kv=st.integers(1, 3), n_groups=st.integers(1, 3), half=st.integers(1, 4),
    modules=st.lists(st.sampled_from([*OLD_NAMES]), min_size=1, unique=True), layers=st.permutations([0, 1, 10, 2]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=2), types=st.tuples(HALVES, HALVES),
    r=st.integers(1, 16), alpha=st.integers(1, 64), seed=st.integers(0, 99), old_names=st.booleans(),
)  # fmt: skip
def test_an_adapter_with_heads_adds_what_was_trained(
    n_head_kv: int, n_groups: int, half: int, modules: list[str], layers: list[int], ranks: list[int],
    types: tuple[Type, Type], r: int, alpha: int, seed: int, old_names: bool,
) -> None:  # fmt: skip
    heads = n_head_kv * n_groups, n_head_kv
    n_out = {"attn_q": 2 * half * heads[0], "attn_k": 2 * half * heads[1]}
    pairs = [
        made(f"blk.{i}.{module}", 5 + n, ranks[n % len(ranks)], n_out.get(module, 7 + n), types, seed=seed,
             old_names=old_names)
        for i in layers
        for n, module in enumerate(modules)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.gguf"
        with open_checkpoint(foreign_ggla(pairs, r=r, alpha=alpha)) as checkpoint:
            report = ggcl_fast.convert(checkpoint, target, to="adapter", heads=heads)
        found = deltas(target)
    assert set(found) == {lora.weight for lora in pairs}
    assert any("put into GGUF's order" in note for note in report.notes) == bool({"attn_q", "attn_k"} & set(modules))
    for lora in pairs:
        truth, rounding = lora.delta(alpha / r), lora.rounding(alpha / r)
        if lora.module in n_out:
            n_head = heads[lora.module == "attn_k"]
            truth, rounding = reordered(truth, n_head), reordered(rounding, n_head)
        assert (np.abs(found[lora.weight] - truth) <= rounding).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "blk.0.attn_q",
            "tensor 'blk.0.attn_q.weight': the rows are in Hugging Face's order, and that of GGUF's models depends on "
            "the number of heads (--base tells it, or --heads N[,N_KV] (heads=); "
            "--rows gguf (rows='gguf') takes them as they stand, as llama.cpp did in 2023, "
            "which computes something else)",
        ),
        (
            "blk.0.attn_qkv",
            "tensor 'blk.0.attn_qkv.weight': LLaMA has no such weight, and nothing tells the architecture "
            "(--base tells it, or --arch NAME (arch=), as GGUF files name it)",
        ),
    ],
)
def test_what_is_not_known_is_not_guessed(weight: str, message: str) -> None:
    with open_checkpoint(foreign_ggla([made(weight, 5, 2, 8)])) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(checkpoint, "out.gguf", to="adapter", dry_run=True)
        assert str(caught.value) == f"<buffer>: {message}"


# --- what is refused ------------------------------------------------------------------------------------------------

PAIRS: Final = (
    made("blk.1.attn_q", 5, 3, 4, (Type.F16, Type.F32)),
    made("blk.1.attn_v", 3, 1, 3, (Type.F16, Type.F16)),
    made("blk.0.attn_v", 5, 3, 2),
)
RECORDS: Final = foreign_records(PAIRS)
SOUND: Final = ggla_bytes(RECORDS)
Q: Final = "blk.1.attn_q.weight"
V: Final = "blk.1.attn_v.weight"
LAST: Final = "blk.0.attn_v.weight"
LONG: Final = b"blk.0." + b"x" * 300 + b".weight.loraA"


def _start(index: int) -> int:
    """Offset of a record."""
    return len(ggla_bytes(RECORDS[:index]))


def _at(offset: int) -> str:
    return f"at offset {offset} ({offset:#x})"


def _with(index: int, **fields: Any) -> list[Record]:
    changed = Record(**{**vars(RECORDS[index]), **fields})
    return [*RECORDS[:index], changed, *RECORDS[index + 1 :]]


def _bad(message: str, records: Sequence[Record], kind: type[CheckpointError] = CheckpointError) -> Hostile:
    return Hostile(lambda: ggla_bytes(records), kind, message)


def _cut(message: str, size: int) -> Hostile:
    return Hostile(lambda: SOUND[:size], TruncatedError, message)


def _word(message: str, offset: int, value: int, kind: type[CheckpointError] = CheckpointError) -> Hostile:
    return Hostile(lambda: SOUND[:offset] + struct.pack("<I", value) + SOUND[offset + 4 :], kind, message)


S: Final = _start(3)  # of V's B, at an odd number of halves
S_DATA: Final = -(-(S + 20 + len(V) + 6) // 32) * 32
ALONE: Final = "one of a pair without the other"
NAME: Final = "expected the name of a LoRA tensor, such as 'blk.0.attn_q.weight.loraA'"

HOSTILE: Final[dict[str, Hostile]] = {
    "A alone": _bad(f"tensor 2 '{V}.lora_a': {ALONE}", [*RECORDS[:3], *RECORDS[4:]]),
    "B alone": _bad(f"tensor 2 '{V}.lora_b': {ALONE}", [*RECORDS[:2], *RECORDS[3:]]),
    "A alone at the end": _bad(f"tensor 4 '{LAST}.lora_a': {ALONE}", RECORDS[:-1]),
    "B of another layer": _bad(
        f"tensor 4 '{LAST}.lora_a': {ALONE}", _with(5, name=b"blk.2.attn_v.weight.loraB")
    ),
    "two ranks in a pair": _bad(
        f"tensor '{Q}': dims: the two of a pair have different ranks: expected 3, found 2",
        _with(1, dims=(2, 6)),
    ),
    "a tensor twice": _bad(
        f"tensor 6 '{Q}.lora_a': {_at(len(SOUND))}: the tensor is there twice", [*RECORDS, RECORDS[0]]
    ),
    "a tensor twice, in both styles": _bad(
        f"tensor 1 '{Q}.lora_a': {_at(_start(1))}: the tensor is there twice",
        [RECORDS[0], Record(b"layers.1.attention.wq.weight.loraA", (3, 5), bytes(60)), *RECORDS[1:]],
    ),
    **{
        f"dtype {dtype}": _word(
            f"record 3 dtype {_at(S + 8)}: expected 0 (float32) or 1 (float16), found {dtype}", S + 8, dtype
        )
        for dtype in (2, 8, 30, 2**31, 2**32 - 1)
    },
    **{
        f"{n} dims": _word(f"record 3 n_dims {_at(S)}: expected 2, found {n}", S, n) for n in (0, 3, 4, 2**32 - 1)
    },
    "a rank of 0": _word(f"record 3 dims {_at(S + 12)}: expected at least 1 each, found (0, 3)", S + 12, 0),
    "a length of 0": _word(f"record 3 dims {_at(S + 12)}: expected at least 1 each, found (1, 0)", S + 16, 0),
    "a huge length": _word(
        f"tensor 3 '{V}.lora_b': data {_at(S_DATA)}: expected {2 * (2**32 - 1)} bytes, found {len(SOUND) - S_DATA}",
        S + 16, 2**32 - 1, TruncatedError,
    ),
    "a name of 256 bytes": _bad(
        f"record 3 name length {_at(S + 4)}: expected at most 255, found 256", _with(3, name=LONG[:256])
    ),
    "a name of 2^32-1 bytes": _word(
        f"record 3 name length {_at(S + 4)}: expected at most 255, found 4294967295", S + 4, 2**32 - 1
    ),
    **{
        f"a tensor named {name!r}": _bad(f"record 3 name {_at(S + 20)}: {NAME}, found '{shown}'", _with(3, name=name))
        for name, shown in (
            (b"", ""), (b"blk.0.attn_v.weight.loraC", "blk.0.attn_v.weight.loraC"),
            (b"blk.0.attn_v.weight.lora_a", "blk.0.attn_v.weight.lora_a"),
            (b"blk.0.attn_v.bias.loraA", "blk.0.attn_v.bias.loraA"),
            (b"blk.-1.attn_v.weight.loraA", "blk.-1.attn_v.weight.loraA"),
            (b"layers.0.attention.wqkv.weight.loraA", "layers.0.attention.wqkv.weight.loraA"),
            (b"attn_v.weight.loraA", "attn_v.weight.loraA"), (b"blk.0.Q.weight.loraA", "blk.0.Q.weight.loraA"),
            (b"blk.0.q\n.weight.loraA", r"blk.0.q\n.weight.loraA"),
        )
    },
    "a norm among them": _bad(
        "tensor 'token_embd.weight.lora_a': the tensor is missing; a checkpoint of 2 layers has it "
        "(finetune wrote all of them; the file may be cut short)",
        [*RECORDS, Record(b"blk.0.attn_norm.weight.loraA", (1, 5), bytes(20))],
    ),
    "cut in the header": _cut("header at offset 0 (0x0): expected 16 bytes, found 15", 15),
    "cut in a head": _cut(f"record 3 head {_at(S)}: expected 12 bytes, found 11", S + 11),
    "cut in dims": _cut(f"record 3 dims {_at(S + 12)}: expected 8 bytes, found 7", S + 19),
    "cut in a name": _cut(f"record 3 name {_at(S + 20)}: expected {len(V) + 6} bytes, found 9", S + 29),
    "cut before data": _cut(
        f"tensor 3 '{V}.lora_b': data {_at(S_DATA)}: expected 6 bytes, found 0", S + 20 + len(V) + 6
    ),
    "cut in data": _cut(f"tensor 3 '{V}.lora_b': data {_at(S_DATA)}: expected 6 bytes, found 5", S_DATA + 5),
    "bytes behind the last": Hostile(
        lambda: SOUND + bytes(3), TruncatedError, f"record 6 head {_at(len(SOUND))}: expected 12 bytes, found 3"
    ),
    "lora_r of 0": _word("lora_r at offset 8 (0x8): expected at least 1, found 0", 8, 0),
    "lora_alpha of 0": _word("lora_alpha at offset 12 (0xc): expected at least 1, found 0", 12, 0),
    "version 0": _word("version at offset 4 (0x4): expected 1, the only one ever written, found 0", 4, 0),
}  # fmt: skip


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_is_told_by_kind_place_and_words(bad: Hostile) -> None:
    data = bad.data()
    with pytest.raises(CheckpointError) as caught, within_bounds(len(data), traced=True):
        open_checkpoint(GUARDED.holding(data))
    assert (type(caught.value), str(caught.value)) == (bad.kind, f"<buffer>: {bad.message}")


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_is_told_the_same_when_it_is_large(
    bad: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    path = tmp_path / "in.bin"
    path.write_bytes(bad.data())
    with pytest.raises(bad.kind) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: {bad.message}"


def test_a_file_that_is_nothing_but_a_header() -> None:
    with pytest.raises(CheckpointError, match=r"^<buffer>: at offset 16 .*: there is no tensor in it"):
        open_checkpoint(SOUND[:16])


def test_a_file_cut_at_any_byte_is_an_error_but_between_pairs() -> None:
    ends = {_start(2 * n): n for n in range(1, len(PAIRS))}
    boundaries = {_start(n) for n in range(len(RECORDS))}
    for size in range(len(SOUND)):
        if size in ends:
            with open_checkpoint(SOUND[:size]) as checkpoint:
                holds(checkpoint, PAIRS[: ends[size]], 1.0)
            continue
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(GUARDED.holding(SOUND[:size]))
        kind = NotACheckpointError if size < 4 else CheckpointError if size in boundaries else TruncatedError
        assert type(caught.value) is kind, size


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255))
def test_a_file_with_another_byte_is_refused_or_can_be_read(at: int, value: int) -> None:
    is_refused_or_can_be_read(SOUND[:at] + bytes([value]) + SOUND[at + 1 :])
