"""LoRA adapters in GGUF form, of any modules and types, as today's converters write them."""

import dataclasses
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import Checkpoint, CheckpointError, NotACheckpointError, TruncatedError, open_checkpoint
from ggcl_fast.inspection.summarise import summarise
from ggcl_fast.storage import sources

from ..adapters import OLD_NAMES, TOKEN_EMBD, Floats, Lora, Type, deltas, made, write_adapter
from ..gguf_parts import ARRAY, BOOL, F32, STRING, U32, Parts, Tensor, edited, parse
from ..hostile import Hostile
from ..mutations import GUARDED, is_refused_or_can_be_read, within_bounds
from ..reference import DATA

F64: Final = 12
WILD: Final = DATA / "wild"
FLOATS: Final = st.sampled_from([Type.F32, Type.F16, Type.BF16])
ANY: Final = FLOATS | st.just(Type.Q8_0)
WEIGHTS: Final = st.sampled_from([TOKEN_EMBD, "output"]) | st.builds(
    "blk.{}.{}".format, st.integers(0, 80) | st.just(999_999_999), st.sampled_from([*OLD_NAMES, "attn_qkv", "ssm_in"])
)


def loras(types: st.SearchStrategy[Type]) -> st.SearchStrategy[list[Lora]]:
    one = st.builds(
        made, WEIGHTS, st.integers(1, 33) | st.sampled_from([32, 96]), st.integers(1, 9) | st.just(32),
        st.integers(1, 33), st.tuples(types, types), seed=st.integers(0, 99),
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=9, unique_by=lambda lora: lora.weight)


ALPHAS: Final = st.none() | st.just(0.0) | st.floats(0.125, 64, width=32) | st.just(-2.0)


def written(loras: Sequence[Lora], **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_adapter(Path(folder) / "adapter.gguf", loras, **options)


def holds(checkpoint: Checkpoint, expected: Sequence[Lora], alpha: float | None) -> None:
    """Hold that a checkpoint has what went into it."""
    shown = {name: matrix for lora in expected for name, matrix in lora.shown.items()}
    assert set(checkpoint.names) == set(checkpoint.tensors) == set(shown)
    assert len(checkpoint.names) == len(shown)
    for name, matrix in shown.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], matrix, strict=True)
    assert {p.weight: (p.layer, p.module, p.rank, p.n_in, p.n_out, p.scale) for p in checkpoint.pairs} == {
        f"{lora.weight}.weight": (
            lora.layer, lora.module, lora.rank, lora.a.shape[1], len(lora.b), alpha / lora.rank if alpha else 1.0
        )
        for lora in expected
    }  # fmt: skip
    assert [p.weight for p in checkpoint.pairs] == [f"{lora.weight}.weight" for lora in expected]


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rank", "n_ff"), [("peft-qkv", 4, 0), ("peft-all-f16", 8, 96)])
def test_a_real_file(name: str, rank: int, n_ff: int) -> None:
    path = WILD / f"{name}-adapter.gguf"
    with open_checkpoint(path) as checkpoint:
        reader = gguf.GGUFReader(path)
        assert list(checkpoint.names) == [t.name for t in reader.tensors]
        for tensor in reader.tensors:
            is_a = tensor.name.endswith("a")
            np.testing.assert_array_equal(checkpoint.tensors[tensor.name], tensor.data.T if is_a else tensor.data)
        assert {p.scale for p in checkpoint.pairs} == {2.0}
        assert (checkpoint.format, checkpoint.rows, checkpoint.partial) == ("lora", "gguf", True)
        assert (checkpoint.arch, checkpoint.alpha, checkpoint.warnings) == ("llama", 2.0 * rank, ())
        assert checkpoint.parameters == (0, 64, 0, 0, 2, 0, n_ff, 0)
        assert checkpoint.ranks["wq"] == rank
        assert checkpoint.optimizer is None
        assert checkpoint.extra == {}


# --- any file -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(pairs=loras(ANY), alpha=ALPHAS, arch=st.sampled_from(["llama", "qwen2"]))
def test_a_file_of_any_modules_types_and_sizes(pairs: list[Lora], alpha: float | None, arch: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        data = write_adapter(path, pairs, alpha=alpha, arch=arch)
        with mock.patch.object(sources, "SMALL", -1):
            in_windows = open_checkpoint(path)
        for checkpoint in (open_checkpoint(data), open_checkpoint(path), in_windows):
            with checkpoint:
                holds(checkpoint, pairs, alpha)
                assert (checkpoint.format, checkpoint.arch, checkpoint.alpha) == ("lora", arch, alpha or 0.0)
                layers = [lora.layer for lora in pairs if lora.layer is not None]
                assert checkpoint.parameters.n_layer == max(layers, default=-1) + 1
                assert checkpoint.warnings == ()
                assert checkpoint.source.file_size == len(data)


def test_embeddings_change_places() -> None:
    pair = made(TOKEN_EMBD, 5, 3, 7)
    parts = parse(written([pair]))
    a, b = (parts.tensors[f"token_embd.weight.lora_{end}"] for end in "ab")
    assert (a.dims, b.dims) == ((3, 7), (3, 5))
    with open_checkpoint(parts.build()) as checkpoint:
        holds(checkpoint, [pair], 8.0)
        assert checkpoint.tensors["token_embd.weight.lora_b"].tobytes() == a.data
        assert checkpoint.tensors["token_embd.weight.lora_a"].tobytes() == b.data
        assert checkpoint.parameters[:2] == (7, 5)


def test_blocks_of_both_of_a_pair_are_decoded() -> None:
    pairs = [made(weight, 64, 32, 7, (Type.Q8_0, Type.Q8_0)) for weight in ("blk.0.attn_q", TOKEN_EMBD)]
    assert {type for lora in pairs for type in (lora.a_type, lora.b_type)} == {Type.Q8_0}
    with open_checkpoint(written(pairs)) as checkpoint:
        holds(checkpoint, pairs, 8.0)


@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q5_1, Type.TQ2_0])
def test_blocks_of_other_types_are_what_gguf_makes_of_them(type: Type, tmp_path: Path) -> None:
    pair = made("blk.0.attn_q", 512, 3, 5)
    data = write_adapter(tmp_path / "adapter.gguf", [dataclasses.replace(pair, a_type=type)])
    a = next(t for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors if t.name.endswith("lora_a"))
    assert a.tensor_type == type
    with open_checkpoint(data) as checkpoint:
        found = checkpoint.tensors["blk.0.attn_q.weight.lora_a"]
        np.testing.assert_array_equal(found, gguf.quants.dequantize(a.data, type).T, strict=True)


def test_norms_are_left_out_with_a_warning() -> None:
    pairs = [made("blk.0.attn_q", 5, 2, 6), made("blk.1.attn_v", 5, 2, 6)]
    norms = ["blk.0.attn_norm", "output_norm", "blk.0.attn_q_norm"]
    with open_checkpoint(written(pairs, norms=norms)) as checkpoint:
        holds(checkpoint, pairs, 8.0)
        assert checkpoint.warnings == ("3 weights of norms, which llama.cpp passes over in adapters, are left out",)


def test_dims_of_one_may_be_there_or_not() -> None:
    pair = made("blk.0.attn_q", 5, 1, 6)

    def edit(parts: Parts) -> None:
        parts.tensors["blk.0.attn_q.weight.lora_a"].dims = (5,)
        parts.tensors["blk.0.attn_q.weight.lora_b"].dims = (1, 6, 1, 1)

    with open_checkpoint(edited(parse(written([pair])), edit)) as checkpoint:
        holds(checkpoint, [pair], 8.0)


def test_what_an_adapter_says_of_itself_is_kept() -> None:
    data = edited(
        parse(written([made("output", 5, 2, 6)])),
        lambda parts: (
            parts.put("ggcl_fast.training", STRING, "x").put("general.name", STRING, "y").put("general.x", STRING, "z")
        ),
    )
    with open_checkpoint(data) as checkpoint:
        assert checkpoint.extra == {"ggcl_fast.training": "x", "general.name": "y"}


@settings(max_examples=40, deadline=None)
@given(pairs=loras(ANY), alpha=ALPHAS)
def test_a_summary_and_a_trial_of_any_file(pairs: list[Lora], alpha: float | None) -> None:
    data = written(pairs, alpha=alpha)
    with open_checkpoint(data) as checkpoint:
        summary = summarise(checkpoint)
        report = ggcl_fast.convert(
            checkpoint, "nowhere.gguf", to="adapter", rows="gguf", check_finite=True, dry_run=True
        )
    scales = {alpha / lora.rank if alpha else 1.0 for lora in pairs}
    assert (summary.format, summary.nbytes) == ("lora", len(data))
    assert summary.scale == (scales.pop() if len(scales) == 1 else None)
    for found, lora in zip(summary.pairs, pairs):
        assert (found.weight, found.layer, found.module) == (f"{lora.weight}.weight", lora.layer, lora.module)
        scale = alpha / lora.rank if alpha else 1.0
        assert found.norm == pytest.approx(np.linalg.norm(lora.delta(scale)), rel=1e-4, abs=1e-6)
    shown = {name: matrix for lora in pairs for name, matrix in lora.shown.items()}
    for one in summary.tensors:
        assert (one.minimum, one.maximum) == (shown[one.name].min(), shown[one.name].max())
    assert (report.dry_run, report.n_tensors, report.source_bytes) == (True, 2 * len(pairs), len(data))
    assert report.notes == ()


@settings(max_examples=50, deadline=None)
@given(pairs=loras(ANY), alpha=ALPHAS)
def test_an_adapter_of_an_adapter_adds_the_same(pairs: list[Lora], alpha: float | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.gguf", Path(folder) / "out.gguf"
        write_adapter(source, pairs, alpha=alpha)
        ggcl_fast.convert(source, target, to="adapter", heads=(1, 1))
        found = deltas(target)
    assert list(found) == [lora.weight for lora in pairs]
    for lora in pairs:
        scale = alpha / lora.rank if alpha else 1.0
        assert (np.abs(found[lora.weight] - lora.delta(scale)) <= lora.rounding(scale)).all()


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_found(type: Type, value: float) -> None:
    pairs = [made("blk.0.attn_q", 5, 3, 7, (type, type)), made("blk.3.attn_v", 7, 3, 5, (type, type))]
    pairs[1].a[2, 1] = value
    with open_checkpoint(written(pairs)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(checkpoint, "x.gguf", to="adapter", check_finite=True, dry_run=True)
        assert caught.value.found == {"blk.3.attn_v.weight.lora_a": 1}
        found = checkpoint.tensors["blk.3.attn_v.weight.lora_a"]
        np.testing.assert_array_equal(found, pairs[1].a.T)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_block_with_a_scale_that_is_not_finite_is_found(scale: float) -> None:
    def edit(parts: Parts) -> None:
        tensor = parts.tensors["blk.0.attn_q.weight.lora_a"]
        block = np.array(scale, "<f2").tobytes() + bytes(range(32))  # one value of zero
        tensor.type, tensor.dims, tensor.data = Type.Q8_0, (32, 2), 2 * block

    with open_checkpoint(edited(parse(written([made("blk.0.attn_q", 32, 2, 5)])), edit)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(checkpoint, "x.gguf", to="adapter", check_finite=True, dry_run=True)
        assert caught.value.found == {"blk.0.attn_q.weight.lora_a": 64}


def test_a_large_file(tmp_path: Path) -> None:
    """Above `sources.SMALL`, with tensors of more than a block."""
    kinds = [(Type.F32, Type.F16), (Type.Q8_0, Type.BF16), (Type.F16, Type.F32), (Type.BF16, Type.Q8_0)]
    sizes = [(3201, 7, 101), (96_000, 8, 5), (301, 9, 80_001), (70_001, 32, 3), (40_000, 5, 1)]
    weights = [TOKEN_EMBD, *(f"blk.{i}.attn_{module}" for i in (0, 10, 2) for module in "qkv")]
    pairs = [made(weight, *sizes[i % 5], kinds[i % 4]) for i, weight in enumerate(weights)]
    path = tmp_path / "adapter.gguf"
    assert len(write_adapter(path, pairs)) > sources.SMALL
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.source.memory is None
        for found, lora in zip(summarise(checkpoint).pairs, pairs):
            a, b = lora.a.astype(np.float64), lora.b.astype(np.float64)
            norm = 8 / lora.rank * np.sqrt(np.sum((a @ a.T) * (b.T @ b)))
            assert found.norm == pytest.approx(norm, rel=1e-4)
        ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", to="adapter", check_finite=True)
        holds(checkpoint, pairs, 8.0)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found_a = {t.name: t.data for t in reader.tensors}
    for lora in pairs[1:]:
        np.testing.assert_array_equal(found_a[f"{lora.weight}.weight.lora_a"], lora.a)


# --- what is refused ------------------------------------------------------------------------------------------------

PAIRS: Final = (made("blk.1.attn_q", 5, 3, 4), made("blk.0.attn_v", 5, 2, 3), made(TOKEN_EMBD, 5, 1, 6))
SOUND: Final = written(PAIRS)
PARTS: Final = parse(SOUND)
Q: Final = "blk.1.attn_q.weight"
V: Final = "blk.0.attn_v.weight"
ALPHA: Final = "adapter.lora.alpha"
KIND: Final = "adapter.type"
ALONE: Final = "one of a pair without the other"
NAME: Final = "name: expected X.weight.lora_a or X.weight.lora_b, found"
N_TENSORS: Final = "n_tensors: there is no tensor in it"


def _at(key: str) -> str:
    """Where the value of a key stands."""
    offset = SOUND.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
    return f"at offset {offset} ({offset:#x})"


def _bad(message: str, *edits: Callable[[Parts], object], kind: type[CheckpointError] = CheckpointError) -> Hostile:
    return Hostile(lambda: edited(PARTS, *edits), kind, message)


def _put(name: str, kind: int, value: object) -> Callable[[Parts], object]:
    return lambda parts: parts.put(name, kind, value)


def _array(name: str) -> Callable[[Parts], object]:
    return lambda parts: parts.keys.update({name.encode(): (ARRAY, struct.pack("<IQf", F32, 1, 8.0))})


def _without(*names: str) -> Callable[[Parts], object]:
    return lambda parts: parts.without(*names)


def _set(name: str, **values: Any) -> Callable[[Parts], object]:
    return lambda parts: vars(parts.tensors[name]).update(values)


def _new(name: str, dims: tuple[int, ...] = (3, 4), type: int = 0) -> Callable[[Parts], object]:
    return lambda parts: parts.tensors.update({f"{name} ": Tensor(name.encode(), dims, type, bytes(96))})


def _no_pairs(parts: Parts) -> None:
    parts.tensors.clear()


HOSTILE: Final[dict[str, Hostile]] = {
    # --- keys
    "no architecture": _bad(
        "general.architecture: the key is missing: expected string, found none", _without("general.architecture")
    ),
    "an architecture that is a number": _bad(
        f"general.architecture {_at('general.architecture')}: expected string, found uint32",
        _put("general.architecture", U32, 3),
    ),
    "no general.type": _bad(
        "training.type: expected 'finetune_lora', found none: no finetune checkpoint (gguf-dump shows what it is)",
        _without("general.type", "token_embd.weight.lora_a", "token_embd.weight.lora_b"), kind=NotACheckpointError,
    ),
    "no adapter.type": _bad(f"{KIND}: the key is missing: expected string, found none", _without(KIND)),
    "another adapter.type": _bad(
        f"{KIND} {_at(KIND)}: expected 'lora', found 'control_vector'", _put(KIND, STRING, "control_vector")
    ),
    "an empty adapter.type": _bad(f"{KIND} {_at(KIND)}: expected 'lora', found ''", _put(KIND, STRING, "")),
    "an adapter.type that is a number": _bad(
        f"{KIND} {_at(KIND)}: expected string, found uint32", _put(KIND, U32, 7)
    ),
    **{
        f"alpha {value}": _bad(
            f"{ALPHA} {_at(ALPHA)}: expected a finite float32, found {value}", _put(ALPHA, F32, value)
        )
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "alpha as uint32": _bad(f"{ALPHA} {_at(ALPHA)}: expected float32, found uint32", _put(ALPHA, U32, 16)),
    "alpha as float64": _bad(f"{ALPHA} {_at(ALPHA)}: expected float32, found float64", _put(ALPHA, F64, 0.1)),
    "alpha as bool": _bad(f"{ALPHA} {_at(ALPHA)}: expected float32, found bool", _put(ALPHA, BOOL, True)),
    "alpha as text": _bad(f"{ALPHA} {_at(ALPHA)}: expected float32, found string", _put(ALPHA, STRING, "8")),
    "alpha as an array": _bad(f"{ALPHA} {_at(ALPHA)}: expected float32, found array", _array(ALPHA)),
    # --- tensors
    "no tensors": _bad(N_TENSORS, _no_pairs),
    "norms alone": _bad(N_TENSORS, _no_pairs, _new("blk.0.attn_norm.weight", (7,))),
    **{
        f"a tensor named {name!r}": _bad(f"tensor 6 '{shown}': {NAME} {shown}", _new(name))
        for name, shown in (
            ("blk.0.attn_q.weight", "blk.0.attn_q.weight"), ("blk.2.attn_q.lora_a", "blk.2.attn_q.lora_a"),
            ("blk.2.attn_q.bias.lora_a", "blk.2.attn_q.bias.lora_a"),
            ("blk.2.attn_q.weight.loraA", "blk.2.attn_q.weight.loraA"),
            ("blk.2.attn_q.weight.lora_c", "blk.2.attn_q.weight.lora_c"),
            ("blk.2.attn_q.weight.lora_a ", "blk.2.attn_q.weight.lora_a "), (".weight.lora_a", ".weight.lora_a"),
            ("blk.0.attn_norm.bias", "blk.0.attn_norm.bias"), ("\x1b[31m", r"\x1b[31m"),
        )
    },
    "three dims": _bad(
        f"tensor 1 '{Q}.lora_b': dims: expected two of them: of other weights than matrices nothing can be made, "
        "found (3, 2, 2)",
        _set(f"{Q}.lora_b", dims=(3, 2, 2)),
    ),
    "four dims": _bad(
        f"tensor 0 '{Q}.lora_a': dims: expected two of them: of other weights than matrices nothing can be made, "
        "found (5, 1, 1, 3)",
        _set(f"{Q}.lora_a", dims=(5, 1, 1, 3)),
    ),
    **{
        f"tensors of type {type.name}": _bad(
            f"tensor 0 '{Q}.lora_a': type: expected one that gguf dequantizes, found {type.name}",
            _set(f"{Q}.lora_a", type=type, data=bytes(8 * 15)),
        )
        for type in (Type.I8, Type.I16, Type.I32, Type.I64, Type.F64)
    },
    "tensors of type Q8_1": _bad(
        "tensor 6 'blk.1.attn_q2.weight.lora_a': type: expected one that gguf dequantizes, found Q8_1",
        _new("blk.1.attn_q2.weight.lora_a", (32, 2), Type.Q8_1),
    ),
    "A alone": _bad(f"tensor 2 '{V}.lora_a': {ALONE}", _without(f"{V}.lora_b")),
    "B alone": _bad(f"tensor 2 '{V}.lora_b': {ALONE}", _without(f"{V}.lora_a")),
    "two ranks in a pair": _bad(
        f"tensor '{Q}': dims: the two of a pair have different ranks: expected 3, found 2",
        _set(f"{Q}.lora_b", dims=(2, 6)),
    ),
    "A as finetune has it": _bad(
        f"tensor '{Q}': dims: the two of a pair have different ranks: expected 5, found 3",
        _set(f"{Q}.lora_a", dims=(3, 5)),
    ),
    "a tensor twice": _bad(f"tensor 6 '{Q}.lora_a': the name is there twice", _new(f"{Q}.lora_a")),
}  # fmt: skip


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_is_told_by_kind_and_words(bad: Hostile) -> None:
    data = bad.data()
    with pytest.raises(CheckpointError) as caught, within_bounds(len(data), traced=True):
        open_checkpoint(GUARDED.holding(data))
    assert (type(caught.value), str(caught.value)) == (bad.kind, f"<buffer>: {bad.message}")


@pytest.mark.parametrize(("there", "missing"), ["ab", "ba"])
def test_half_of_the_embeddings_is_named_as_the_file_names_it(there: str, missing: str) -> None:
    data = edited(PARTS, _without(f"token_embd.weight.lora_{missing}"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(data)
    assert str(caught.value) == f"<buffer>: tensor 4 'token_embd.weight.lora_{there}': {ALONE}"


def test_half_of_a_pair_behind_a_norm_is_counted_as_the_file_has_it() -> None:
    data = edited(parse(written(PAIRS, norms=["blk.0.attn_norm"])), _without(f"{V}.lora_b"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(data)
    assert str(caught.value) == f"<buffer>: tensor 3 '{V}.lora_a': {ALONE}"


@pytest.mark.parametrize("layer", ["00", "\u0663", "9" * 20, "9" * 5000], ids=lambda layer: ascii(layer[:20]))
def test_a_layer_that_is_no_usual_number_is_refused_or_none_or_counted(layer: str) -> None:
    data = written([made(f"blk.{layer}.attn_q", 5, 2, 6)])
    try:
        checkpoint = open_checkpoint(data)
    except CheckpointError:
        return
    (pair,) = checkpoint.pairs
    assert pair.layer is None or pair.layer < checkpoint.parameters.n_layer


SMALLEST: Final = written(
    [made("blk.0.attn_q", 32, 1, 3, (Type.Q8_0, Type.F16)), made("output", 3, 2, 1, (Type.BF16, Type.F32))]
)


def test_a_file_cut_at_any_byte_is_an_error() -> None:
    whole = open_checkpoint(SMALLEST)
    end = max(t.data_offset + t.n_bytes for t in _tensors(SMALLEST))
    assert 0 <= len(SMALLEST) - end < 32
    for size in range(len(SMALLEST)):
        if size >= end:  # nothing but padding is gone
            with open_checkpoint(SMALLEST[:size]) as checkpoint:
                _same(checkpoint, whole)
            continue
        with pytest.raises(TruncatedError if size >= 4 else NotACheckpointError):
            open_checkpoint(GUARDED.holding(SMALLEST[:size]))


def _same(one: Checkpoint, other: Checkpoint) -> None:
    tensors: dict[str, Floats] = dict(other.tensors)
    assert list(one.names) == list(tensors)
    for name, matrix in tensors.items():
        np.testing.assert_array_equal(one.tensors[name], matrix)


def _tensors(data: bytes) -> list[gguf.ReaderTensor]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return gguf.GGUFReader(file.name).tensors


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(SMALLEST) - 1), value=st.integers(0, 255))
def test_a_file_with_another_byte_is_refused_or_can_be_read(at: int, value: int) -> None:
    is_refused_or_can_be_read(SMALLEST[:at] + bytes([value]) + SMALLEST[at + 1 :])
