"""Models written anew from others: what changes, and that all else is the base's byte for byte."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.targets import about

from ..gguf_parts import STRING, U32, Parts, Tensor
from ..models import Floats, Model, Type, delta, field_value, is_norm, kinds_of, read_gguf
from ..routes import Contents, contents

Factors = dict[str, tuple[Floats, Floats]]

USUAL = Model()

EXTRA: dict[str, Any] = {
    "rope_freqs.weight": np.arange(5, dtype=np.float32),
    "blk.0.attn_q.bias": np.full(3, np.nan, np.float32),
    "blk.1.attn_k.bias": np.array([-0.0, 1e-45], np.float32),
    "odd.bytes": np.arange(77, dtype=np.int8),
}
TARGETS = ("merged", "adapter")


def parts_of(path: Path) -> Parts:
    """A GGUF file in parts, whatever is in it."""
    found = contents(path.read_bytes())
    alignment = struct.unpack("<I", found.keys.get(b"general.alignment", (U32, b" \0\0\0"))[1])[0]
    tensors = {name: Tensor(name.encode(), t.dims, int(t.type), t.data) for name, t in found.tensors.items()}
    return Parts(keys=dict(found.keys), tensors=tensors, alignment=alignment)


def store(parts: Parts, name: str, data: Any, kind: Type) -> None:
    """Put other data, shaped as numpy has blocks, in place of a tensor."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(data)
    dims = (rows.shape[-1] * rows.itemsize // nbytes * block, *rows.shape[-2::-1])
    parts.tensors[name] = Tensor(name.encode(), dims, int(kind), rows.tobytes())


def rewritten(
    folder: Path, factors: Factors, to: str, *, model: Model = USUAL, base: str = "base.gguf", **options: Any
) -> tuple[Contents, ggcl_fast.ConversionReport]:
    """Convert upon a base in `folder`; what is in the merged model, or in the copy of the base."""
    base_out = folder / "copy.gguf" if to == "adapter" else None
    with model.checkpoint(factors) as checkpoint:
        report = ggcl_fast.convert(
            checkpoint, folder / "new.gguf", to=to, base=folder / base, base_out=base_out, force=True, **options
        )  # fmt: skip
    return contents((folder / ("copy.gguf" if to == "adapter" else "new.gguf")).read_bytes()), report


def of(factors: Factors, *weights: str) -> Factors:
    return {weight: factors[weight] for weight in weights}


# --- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("alignment", [8, 32, 64, 8192])
def test_what_no_delta_changes_is_the_bases(alignment: int, tied: bool, to: str, tmp_path: Path) -> None:
    model = Model(alignment=alignment, tied=tied, kind=Type.Q8_0)
    model.write(tmp_path / "base.gguf", extra=EXTRA)
    before = contents((tmp_path / "base.gguf").read_bytes())
    factors = of(model.factors(), "blk.0.attn_q.weight", "blk.1.ffn_norm.weight", "output_norm.weight")
    after, _ = rewritten(tmp_path, factors, to, model=model)
    assert list(after.tensors) == list(before.tensors)
    changed = [name for name in after.tensors if after.tensors[name].data != before.tensors[name].data]
    expected = [name for name in factors if to == "merged" or is_norm(name)]
    assert sorted(changed) == sorted(expected)
    assert all(t.start % alignment == 0 for t in after.tensors.values())
    assert [(t.dims, t.type) for t in after.tensors.values()] == [(t.dims, t.type) for t in before.tensors.values()]


@pytest.mark.parametrize("to", TARGETS)
def test_tensors_may_lie_in_another_order_than_they_are_named(to: str, tmp_path: Path) -> None:
    model = Model(kind=Type.F16)
    model.write(tmp_path / "sorted.gguf", extra=EXTRA)
    parts = parts_of(tmp_path / "sorted.gguf")
    before = contents(parts.build()).tensors
    first, second = (parts.tensors[f"blk.{i}.ffn_down.weight"] for i in (1, 0))
    start = min(tensor.start for tensor in before.values())
    first.offset, second.offset = (before[t.name.decode()].start - start for t in (second, first))
    first.data, second.data = second.data, first.data
    (tmp_path / "base.gguf").write_bytes(parts.build())
    assert {n: t.data for n, t in contents((tmp_path / "base.gguf").read_bytes()).tensors.items()} == {
        n: t.data for n, t in before.items()
    }
    after, _ = rewritten(tmp_path, of(model.factors(), "output_norm.weight"), to, model=model)
    assert [n for n in before if after.tensors[n].data != before[n].data] == ["output_norm.weight"]


def test_the_output_weight_of_a_tied_model_is_the_embeddings_until_it_is_changed(tmp_path: Path) -> None:
    model = Model(tied=True, kind=Type.Q4_0, alignment=64)
    model.write(tmp_path / "base.gguf", extra=EXTRA)
    before = contents((tmp_path / "base.gguf").read_bytes()).tensors
    after, report = rewritten(tmp_path, of(model.factors(), "token_embd.weight"), "merged", model=model)
    assert list(after.tensors) == [*before, "output.weight"]
    assert after.tensors["output.weight"].data == before["token_embd.weight"].data
    assert after.tensors["token_embd.weight"].data != before["token_embd.weight"].data
    assert report.notes[-1].startswith("the embeddings are no longer tied: output.weight was added")
    after, report = rewritten(tmp_path, of(model.factors(), "output.weight"), "merged", model=model)
    assert after.tensors["token_embd.weight"].data == before["token_embd.weight"].data
    assert after.tensors["output.weight"].data != before["token_embd.weight"].data


# --- several files --------------------------------------------------------------------------------------------------


def write_shards(folder: Path, whole: Parts, names: tuple[list[str], ...], alignments: tuple[int, ...]) -> list[Path]:
    paths = []
    for number, (some, alignment) in enumerate(zip(names, alignments)):
        keys = dict(whole.keys) if number == 0 else {b"general.architecture": whole.keys[b"general.architecture"]}
        shard = Parts(keys=keys, tensors={name: whole.tensors[name] for name in some}, alignment=alignment)
        shard.u32("general.alignment", alignment)
        shard.put("split.no", 2, number).put("split.count", 2, len(names))
        shard.put("split.tensors.count", 5, len(whole.tensors))
        paths.append(folder / f"NAME-{number + 1:05}-of-{len(names):05}.gguf")
        paths[-1].write_bytes(shard.build())
    return paths


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("first", [0, 7, 21])
@pytest.mark.parametrize("alignments", [(32, 32), (64, 32), (32, 64), (8192, 32)])
def test_a_model_in_two_files_becomes_one(alignments: tuple[int, int], first: int, to: str, tmp_path: Path) -> None:
    """The same bytes come out as of the model in one file."""
    model = Model(kind=Type.F16, alignment=alignments[0])
    model.write(tmp_path / "base.gguf", extra=EXTRA)
    whole = parts_of(tmp_path / "base.gguf").put("general.name", STRING, "Base")
    (tmp_path / "base.gguf").write_bytes(whole.build())
    names = list(whole.tensors)
    shards = write_shards(tmp_path, whole, (names[:first], names[first:]), alignments)
    factors = model.factors()
    written = tmp_path / ("copy.gguf" if to == "adapter" else "new.gguf")
    rewritten(tmp_path, factors, to, model=model)
    expected = written.read_bytes()
    for shard in shards:
        found, report = rewritten(tmp_path, factors, to, model=model, base=shard.name)
        assert not [key for key in found.keys if key.startswith(b"split.")]
        assert written.read_bytes() == expected
        assert len(report.extra_outputs) == (to == "adapter")


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_norms_become_f32(kind: Type, to: str, tmp_path: Path) -> None:
    model = Model()
    model.write(tmp_path / "plain.gguf")
    parts = parts_of(tmp_path / "plain.gguf").u32("general.file_type", 0)
    for name, values in read_gguf(tmp_path / "plain.gguf").items():
        if is_norm(name):
            store(parts, name, gguf.quants.quantize(values, kind), kind)
    (tmp_path / "base.gguf").write_bytes(parts.build())
    weights, factors = read_gguf(tmp_path / "base.gguf"), model.factors()
    del factors["blk.1.attn_norm.weight"]
    after, report = rewritten(tmp_path, factors, to)
    for name, tensor in after.tensors.items():
        if name == "blk.1.attn_norm.weight":
            assert (tensor.type, tensor.data) == (kind, parts.tensors[name].data)
        elif is_norm(name):
            assert tensor.type == Type.F32
            np.testing.assert_allclose(tensor.values[0], weights[name] + delta(*factors[name]), atol=1e-6)
    assert after.number("general.file_type") == 0
    if to == "merged":
        assert (
            f"written as F32, which norms are: output_norm.weight ({kind.name}), blk.*.attn_norm.weight ({kind.name}), "
            f"blk.*.ffn_norm.weight ({kind.name}, 2 times)"
        ) in report.notes


K_MODEL = Model(n_layer=1, head_dim=64, n_ff=512, n_vocab=16)
SCALES_AT = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.IQ4_XS: (0,)}
"""Where blocks keep their F16 scales."""


def write_k_quants(path: Path, kind: Type, file_type: int | None) -> dict[str, Floats]:
    """Write a base of random blocks, and return its weights."""
    K_MODEL.write(path)
    parts, rng = parts_of(path), np.random.default_rng(11)
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    for name, shape in K_MODEL.shapes().items():
        if len(shape) == 2:
            blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, nbytes), np.uint8)
            for at in SCALES_AT[kind]:
                blocks[:, :, at : at + 2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
            store(parts, name, blocks.reshape(shape[0], -1), kind)
    if file_type is not None:
        parts.u32("general.file_type", file_type)
    path.write_bytes(parts.build())
    return read_gguf(path)


@pytest.mark.parametrize(("kind", "file_type"), [(Type.Q4_K, 15), (Type.Q6_K, 18), (Type.IQ4_XS, None)])
def test_types_that_cannot_be_written_become_f16_and_the_file_says_so(
    kind: Type, file_type: int | None, tmp_path: Path
) -> None:
    weights, factors = write_k_quants(tmp_path / "base.gguf", kind, file_type), K_MODEL.factors()
    after, report = rewritten(tmp_path, factors, "merged", model=K_MODEL)
    assert after.keys[b"general.file_type"] == (U32, struct.pack("<I", gguf.LlamaFileType.MOSTLY_F16))
    for name, tensor in after.tensors.items():
        expected = weights[name] + delta(*factors[name])
        assert tensor.type == (Type.F32 if is_norm(name) else Type.F16)
        np.testing.assert_allclose(tensor.values.reshape(expected.shape), expected, rtol=2**-11, atol=1e-6)
    (note,) = report.notes
    assert note.startswith("written as F16, since gguf cannot quantize to their types: ")
    assert note.count(f"({kind.name})") == len([name for name in factors if not is_norm(name)])


@pytest.mark.parametrize("file_type", [15, None])
def test_the_copy_of_a_base_keeps_its_file_type(file_type: int | None, tmp_path: Path) -> None:
    write_k_quants(tmp_path / "base.gguf", Type.Q4_K, file_type)
    before = contents((tmp_path / "base.gguf").read_bytes())
    after, _ = rewritten(tmp_path, K_MODEL.factors(), "adapter", model=K_MODEL)
    assert after.keys.get(b"general.file_type") == before.keys.get(b"general.file_type")
    assert all(after.tensors[name].data == t.data for name, t in before.tensors.items() if not is_norm(name))


def test_a_file_type_still_tells_of_most_weights_where_few_have_another_type(tmp_path: Path) -> None:
    """1024 by itself is F32, guessed, to llama.cpp."""
    write_k_quants(tmp_path / "base.gguf", Type.Q4_K, 15)
    after, _ = rewritten(tmp_path, of(K_MODEL.factors(), "blk.0.attn_v.weight"), "merged", model=K_MODEL)
    assert after.tensors["blk.0.attn_v.weight"].type == Type.F16
    assert after.tensors["blk.0.attn_q.weight"].type == Type.Q4_K
    assert after.number("general.file_type") == 15


@pytest.mark.parametrize("file_type", [0, 7, 99, None])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_1])
def test_a_file_type_stays_where_types_stay(kind: Type, file_type: int | None, tmp_path: Path) -> None:
    model = Model(n_layer=1, kind=kind)
    model.write(tmp_path / "base.gguf")
    if file_type is not None:
        (tmp_path / "base.gguf").write_bytes(
            parts_of(tmp_path / "base.gguf").u32("general.file_type", file_type).build()
        )
    after, report = rewritten(tmp_path, model.factors(), "merged", model=model)
    assert after.keys.get(b"general.file_type") == (None if file_type is None else (U32, struct.pack("<I", file_type)))
    assert set(kinds_of(tmp_path / "new.gguf").values()) == {Type.F32, kind}
    exact = kind in (Type.F32, Type.F16)
    assert [note.split(":")[0] for note in report.notes] == (
        [] if exact else ["rounded anew, which takes small deltas away"]
    )


def test_a_weight_that_gguf_cannot_read_is_refused_only_where_it_is_changed(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf")
    parts = parts_of(tmp_path / "base.gguf")
    store(parts, "blk.0.attn_v.weight", np.ones((32, 64), np.int8), Type.I8)
    (tmp_path / "base.gguf").write_bytes(parts.build())
    factors = model.factors()
    with pytest.raises(
        CheckpointError, match=r"base\.gguf: tensor 'blk\.0\.attn_v\.weight': type: gguf cannot read .*I8"
    ):
        rewritten(tmp_path, factors, "merged", model=model)
    del factors["blk.0.attn_v.weight"]
    after, _ = rewritten(tmp_path, factors, "merged", model=model)
    assert after.tensors["blk.0.attn_v.weight"].data == parts.tensors["blk.0.attn_v.weight"].data


# --- scales ---------------------------------------------------------------------------------------------------------

SCALED = {"blk.0.attn_q": 0.25, "blk.0.ffn_down": -3.0, "blk.1.attn_v": 1.0, "output": 1e-3}


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
def test_weights_with_a_scale_beside_them_get_the_delta_behind_it(kind: Type, tmp_path: Path) -> None:
    model = Model(kind=kind)
    scales = {f"{name}.scale": np.array([scale], np.float32) for name, scale in SCALED.items()}
    weights, factors = model.write(tmp_path / "base.gguf", extra=scales), model.factors()
    after, _ = rewritten(tmp_path, factors, "merged", model=model)
    error = {Type.F32: 1e-6, Type.F16: 1e-3, Type.Q8_0: 1 / 127}[kind]
    for name, scale in SCALED.items():
        assert after.tensors[f"{name}.scale"].data == np.float32(scale).tobytes()
        expected = weights[f"{name}.weight"] * scale + delta(*factors[f"{name}.weight"])
        found = after.tensors[f"{name}.weight"].values * scale
        np.testing.assert_allclose(found, expected, rtol=0, atol=error * np.abs(expected).max())


def test_a_scale_of_one_changes_nothing(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf", extra={"blk.0.attn_q.scale": np.ones(1, np.float32)})
    scaled, _ = rewritten(tmp_path, model.factors(), "merged", model=model)
    model.write(tmp_path / "base.gguf")
    plain, _ = rewritten(tmp_path, model.factors(), "merged", model=model)
    assert all(scaled.tensors[name].data == tensor.data for name, tensor in plain.tensors.items())


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        (np.zeros(1, np.float32), r"F32 of dims \(1,\): 0\.0"),
        (np.full(1, -0.0, np.float32), r"F32 of dims \(1,\): -0\.0"),
        (np.full(1, np.nan, np.float32), r"F32 of dims \(1,\): nan"),
        (np.full(1, np.inf, np.float32), r"F32 of dims \(1,\): inf"),
        (np.ones(2, np.float32), r"F32 of dims \(2,\): nan"),
        (np.ones(1, np.float16), r"F16 of dims \(1,\): nan"),
        (np.ones(2, np.float16), r"F16 of dims \(2,\): nan"),
    ],
)
def test_a_scale_that_cannot_be_divided_by_is_refused(scale: Any, found: str, tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf", extra={"blk.0.attn_q.scale": scale})
    with pytest.raises(CheckpointError, match=rf"base\.gguf: tensor 'blk\.0\.attn_q\.scale': .*found {found}"):
        rewritten(tmp_path, model.factors(), "merged", model=model)
    assert not (tmp_path / "new.gguf").exists()
    factors = model.factors()
    del factors["blk.0.attn_q.weight"]
    rewritten(tmp_path, factors, "merged", model=model)


def test_a_quotient_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf", extra={"blk.0.attn_q.scale": np.full(1, 1e-45, np.float32)})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight.*too large for F32"):
        rewritten(tmp_path, model.factors(), "merged", model=model)


def test_an_adapter_divides_by_no_scale(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    for scale in (0.0, np.inf, 1.0):
        model.write(tmp_path / "base.gguf", extra={"blk.0.attn_q.scale": np.full(1, scale, np.float32)})
        _, report = rewritten(tmp_path, model.factors(), "adapter", model=model)
        assert "llama.cpp aborts" in report.notes[0]


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.IQ4_XS])
def test_a_file_type_tells_of_types_that_are_kept_too(kind: Type) -> None:
    """As where most weights were of another type, and became F16 in part."""
    before, after = {Type.Q4_K: 3, kind: 2}, {Type.Q4_K: 1, kind: 2, Type.F16: 1}
    (entry,) = about.file_type(before, after)
    assert entry.value == gguf.LlamaFileType[f"MOSTLY_{kind.name}"]
    (mixture,) = about.file_type(after, before)
    assert mixture.value == gguf.LlamaFileType.MOSTLY_Q4_K_M


# --- what is said ---------------------------------------------------------------------------------------------------


def test_an_adapter_says_where_the_norms_are_and_what_llama_cpp_cannot_do(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf", extra={"blk.0.ffn_up.scale": np.full(1, 0.5, np.float32)})
    _, report = rewritten(tmp_path, model.factors(), "adapter", model=model)
    assert report.extra_outputs == (str(tmp_path / "copy.gguf"),)
    scale, norms = report.notes
    assert "llama.cpp aborts" in scale
    assert "blk.0.ffn_up.weight" in scale
    assert "--to merged" in scale
    assert norms == f"the norm deltas are in {tmp_path / 'copy.gguf'}: load the adapter upon that model"


def test_adapter_and_copy_are_together_what_is_merged(tmp_path: Path) -> None:
    model = Model()
    model.write(tmp_path / "base.gguf", extra=EXTRA)
    factors = model.factors()
    merged, _ = rewritten(tmp_path, factors, "merged")
    copy, _ = rewritten(tmp_path, factors, "adapter")
    ggcl_fast.convert(tmp_path / "new.gguf", tmp_path / "both.gguf", to="merged", base=tmp_path / "copy.gguf")
    both = contents((tmp_path / "both.gguf").read_bytes())
    for name, tensor in merged.tensors.items():
        assert is_norm(name) <= (copy.tensors[name].data == tensor.data)
        assert both.tensors[name].data == tensor.data


def test_one_model_has_one_file_type_and_both_notes(tmp_path: Path) -> None:
    """Some weights become F16, others are rounded anew."""
    write_k_quants(tmp_path / "base.gguf", Type.Q4_K, 15)
    parts = parts_of(tmp_path / "base.gguf")
    store(parts, "output.weight", gguf.quants.quantize(np.ones((16, 256), np.float32), Type.Q8_0), Type.Q8_0)
    (tmp_path / "base.gguf").write_bytes(parts.build())
    factors = of(K_MODEL.factors(), "output.weight", "blk.0.attn_q.weight")
    after, report = rewritten(tmp_path, factors, "merged", model=K_MODEL)
    assert report.notes == (
        "written as F16, since gguf cannot quantize to their types: blk.*.attn_q.weight (Q4_K)",
        "rounded anew, which takes small deltas away: output.weight (Q8_0); an adapter with --base is exact",
    )
    assert after.tensors["output.weight"].type == Type.Q8_0
    assert field_value(tmp_path / "new.gguf", "general.architecture") == "llama"
