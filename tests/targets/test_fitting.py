"""A checkpoint and its base model: what belongs together, and what is said of what does not."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

import ggcl_fast
from ggcl_fast import CheckpointError

from ..engines import COMPILED_OR_NOT
from ..gguf_parts import Record, converted, ggla_bytes
from ..models import BASE, Floats, Model, Type, delta, field_value, finish, read_gguf
from ..reference import DATA

TRAINED = DATA / "trained.ggcl"
GGLA = DATA / "trained.ggla"
FITTING: dict[str, Any] = {"n_head": 4, "n_head_kv": 4, "head_dim": 16, "n_ff": 192, "n_vocab": 288}
"""The shape of what `TRAINED` was trained on, without its layers."""
MODEL = Model(n_layer=3)
TARGETS = ("adapter", "merged", "peft")

Factors = Mapping[str, tuple[Floats, Floats]]


def base_model(path: Path, arch: str, weights: Mapping[str, Floats], **keys: int) -> Path:
    """Write a model of any architecture; dots in the names of its keys are double underscores."""
    writer = gguf.GGUFWriter(None, arch)
    for name, value in keys.items():
        writer.add_uint32(f"{arch}.{name.replace('__', '.')}", value)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    finish(writer, path)
    return path


def some_factors(shapes: Mapping[str, tuple[int, int]], rank: int = 2) -> dict[str, tuple[Floats, Floats]]:
    """Random A and B of weights by their numpy shapes."""
    rng = np.random.default_rng(3)
    return {
        name: (rng.normal(0, 0.2, (n_in, rank)).astype("f4"), rng.normal(0, 0.2, (n_out, rank)).astype("f4"))
        for name, (n_out, n_in) in shapes.items()
    }


def foreign(path: Path, factors: Factors, *, rank: int = 2, alpha: int = 2) -> Path:
    """Write a ggla file as convert-lora-to-ggml.py did."""
    records = [
        Record(f"{weight}.lora{'AB'[end]}".encode(), pair[end].shape[::-1], pair[end].tobytes())
        for weight, pair in factors.items()
        for end in (0, 1)
    ]
    path.write_bytes(ggla_bytes(records, rank=rank, alpha=alpha))
    return path


def in_order(rows: Floats, n_head: int) -> Floats:
    """Rows of q or k in GGUF's order: of each head one of the first half, then one of the second."""
    half = len(rows) // n_head // 2
    return rows[[head * 2 * half + i + j * half for head in range(n_head) for i in range(half) for j in (0, 1)]]


def of_adapter(path: Path, weight: str) -> Floats:
    """The delta that llama.cpp makes of a pair."""
    tensors = read_gguf(path)
    a, b = tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"]
    return a @ b.T if weight == "token_embd.weight" else b @ a


def close(found: Floats, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def layers_of(factors: Factors, *layers: int) -> dict[str, tuple[Floats, Floats]]:
    names = tuple(f"blk.{layer}." for layer in layers)
    return {weight: ab for weight, ab in factors.items() if weight.startswith(names) and "norm" not in weight}


# --- layers, heads, rotary dims -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training in each of finetune's formats."""
    as_gguf = tmp_path_factory.mktemp("sources") / "trained.gguf"
    as_gguf.write_bytes(converted(TRAINED.read_bytes()))
    return {"ggcl": TRAINED, "gguf": as_gguf, "ggla": GGLA}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("format", ["ggcl", "gguf", "ggla"])
def test_a_base_of_the_same_shape_is_taken(format: str, to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    Model(n_layer=2, **FITTING).write(tmp_path / "base.gguf")
    ggcl_fast.convert(sources[format], tmp_path / "out", to=to, base=tmp_path / "base.gguf")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("format", ["ggcl", "gguf", "ggla"])
@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_base_with_other_layers_is_refused(
    n_layer: int, format: str, to: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base.gguf"
    Model(n_layer=n_layer, **FITTING).write(base)
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(sources[format], tmp_path / "out", to=to, base=base)
    cut = "the file is cut short, or " if format == "ggla" and n_layer == 3 else ""
    assert str(caught.value) == (
        f"{sources[format]}: n_layer: not the shape of the base model: expected {n_layer} as in {base}, found 2 "
        f"({cut}it was trained on another model)"
    )
    assert os.listdir(tmp_path) == ["base.gguf"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("format", ["ggcl", "gguf"])
@pytest.mark.parametrize(
    ("field", "keys"),
    [
        ("n_head", {"attention__head_count": 8, "attention__head_count_kv": 8}),
        ("n_head", {"attention__head_count": 2}),
        ("n_head_kv", {"attention__head_count": 4, "attention__head_count_kv": 2}),
        ("n_rot", {"attention__head_count": 4, "rope__dimension_count": 8}),
    ],
)
def test_a_base_with_other_heads_of_the_same_width_is_refused(
    field: str, keys: dict[str, int], format: str, to: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    base = base_model(tmp_path / "base.gguf", "llama", Model(n_layer=2, **FITTING).weights(), block_count=2, **keys)
    with pytest.raises(CheckpointError, match=rf"{field}: not the shape of the base model: expected \d+ as in .*base"):
        ggcl_fast.convert(sources[format], tmp_path / "out", to=to, base=base)
    assert os.listdir(tmp_path) == ["base.gguf"]


def test_what_a_base_does_not_tell_is_not_held_against_it(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base.gguf", "llama", Model(n_layer=2, **FITTING).weights())
    ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=base)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("n_layer", [0, 1])
def test_an_adapter_of_finetunes_that_is_cut_behind_a_layer_is_refused(n_layer: int, to: str, tmp_path: Path) -> None:
    with ggcl_fast.open_checkpoint(GGLA) as whole:
        behind = whole.names.index(f"blk.{n_layer}.attn_norm.weight.lora_a")
        end = int(whole.table["record"][behind])
    cut = tmp_path / "cut.ggla"
    cut.write_bytes(GGLA.read_bytes()[:end])
    with pytest.raises(
        CheckpointError, match=rf"n_layer: .*expected 2 as in .*base\.gguf, found {n_layer} .*cut short"
    ):
        ggcl_fast.convert(cut, tmp_path / "out", to=to, base=BASE)


@pytest.mark.parametrize("to", TARGETS)
def test_an_adapter_of_some_layers_gets_a_note(to: str, tmp_path: Path) -> None:
    MODEL.write(tmp_path / "base.gguf")
    factors = MODEL.factors()
    for layers, note in (
        ((0,), "it changes 1 of the base model's 3 layers"),
        ((0, 2), "it changes 2 of the base model's 3 layers"),
        ((2,), "it changes 1 of the base model's 3 layers"),
        ((0, 1, 2), None),
    ):
        source = foreign(tmp_path / "some.ggla", layers_of(factors, *layers))
        report = ggcl_fast.convert(source, tmp_path / "out", to=to, base=tmp_path / "base.gguf", force=True)
        assert [said for said in report.notes if "layers" in said] == ([note] if note else [])


def test_an_adapter_of_more_layers_is_refused(tmp_path: Path) -> None:
    Model(n_layer=2).write(tmp_path / "base.gguf")
    source = foreign(tmp_path / "some.ggla", layers_of(MODEL.factors(), 2))
    with pytest.raises(CheckpointError, match=r"n_layer: .*expected 2 as in .*base\.gguf, found 3 .*another model"):
        ggcl_fast.convert(source, tmp_path / "out", to="merged", base=tmp_path / "base.gguf")


# --- architectures --------------------------------------------------------------------------------------------------

SSM = {"blk.0.ssm_in.weight": (12, 8), "blk.1.ssm_out.weight": (8, 6)}


@pytest.fixture
def mamba(tmp_path: Path) -> tuple[Path, Path, dict[str, tuple[Floats, Floats]], dict[str, Floats]]:
    """A base model of another architecture, an adapter of weights that LLaMA does not have, and what is in both."""
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(0, 1, shape).astype("f4") for name, shape in SSM.items()}
    weights["blk.0.ssm_conv1d.weight"] = np.ones((3, 4), np.float32)
    factors = some_factors(SSM)
    base = base_model(tmp_path / "base.gguf", "mamba", weights, block_count=2)
    return base, foreign(tmp_path / "lora.ggla", factors, alpha=4), factors, weights


def test_unknown_weights_of_another_architecture(mamba: Any, tmp_path: Path) -> None:
    base, source, factors, weights = mamba
    adapted = ggcl_fast.convert(source, tmp_path / "adapter.gguf", base=base)
    assert (adapted.to, adapted.extra_outputs) == ("adapter", ())
    ggcl_fast.convert(source, tmp_path / "merged.gguf", to="merged", base=base)
    merged = read_gguf(tmp_path / "merged.gguf")
    assert field_value(tmp_path / "adapter.gguf", "general.architecture") == "mamba"
    for weight, (a, b) in factors.items():
        close(of_adapter(tmp_path / "adapter.gguf", weight), delta(a, b, 2.0))
        close(merged[weight], weights[weight] + delta(a, b, 2.0))
    np.testing.assert_array_equal(merged["blk.0.ssm_conv1d.weight"], weights["blk.0.ssm_conv1d.weight"])


def test_an_architecture_can_be_told_without_a_base(mamba: Any, tmp_path: Path) -> None:
    base, source, _, _ = mamba
    for target, options in (("told.gguf", {"arch": "mamba"}), ("based.gguf", {"base": base, "name": "lora"})):
        ggcl_fast.convert(source, tmp_path / target, **options)
    assert field_value(tmp_path / "told.gguf", "general.architecture") == "mamba"
    assert {n: v.tobytes() for n, v in read_gguf(tmp_path / "told.gguf").items()} == {
        n: v.tobytes() for n, v in read_gguf(tmp_path / "based.gguf").items()
    }
    ggcl_fast.convert(source, tmp_path / "both.gguf", base=base, arch="mamba")


def test_architectures_that_contradict_each_other_are_named(mamba: Any, tmp_path: Path) -> None:
    base, source, _, _ = mamba
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(source, tmp_path / "out", base=base, arch="rwkv")
    assert all(part in str(caught.value) for part in ("'rwkv'", "--arch", "'mamba'", str(base)))
    ways: tuple[dict[str, Any], ...] = ({"to": "adapter", "arch": "mamba"}, {"to": "merged", "base": base})
    for options in ways:
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.convert(TRAINED, tmp_path / "out", **options)
        assert all(part in str(caught.value) for part in ("'mamba'", "'llama'", str(TRAINED)))
    assert sorted(os.listdir(tmp_path)) == before


def test_an_architecture_that_file_and_base_contradict_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="adapter", base=BASE, arch="mamba")
    assert all(part in str(caught.value) for part in ("'mamba'", "--arch", "'llama'"))


def test_another_architecture_is_said_before_tied_embeddings(mamba: Any, tmp_path: Path) -> None:
    """What helps against tied embeddings does not help here."""
    with pytest.raises(CheckpointError, match="architecture: not the architecture of the base model"):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="adapter", base=mamba[0])


def test_a_gguf_adapter_tells_its_architecture(mamba: Any, tmp_path: Path) -> None:
    base, source, _, _ = mamba
    ggcl_fast.convert(source, tmp_path / "adapter.gguf", arch="mamba")
    ggcl_fast.convert(tmp_path / "adapter.gguf", tmp_path / "again.gguf")
    assert field_value(tmp_path / "again.gguf", "general.architecture") == "mamba"
    ggcl_fast.convert(tmp_path / "adapter.gguf", tmp_path / "merged.gguf", to="merged", base=base)
    with pytest.raises(CheckpointError, match=r"expected 'llama' of .*base\.gguf, found 'mamba' of .*adapter\.gguf"):
        ggcl_fast.convert(tmp_path / "adapter.gguf", tmp_path / "out", to="merged", base=BASE)
    with pytest.raises(CheckpointError, match=r"expected 'llama' of --arch .*, found 'mamba' of .*adapter\.gguf"):
        ggcl_fast.convert(tmp_path / "adapter.gguf", tmp_path / "out", arch="llama")


@pytest.mark.parametrize("to", ["adapter", "peft"])
def test_an_unknown_weight_of_an_unknown_architecture_is_refused(to: str, mamba: Any, tmp_path: Path) -> None:
    _, source, _, _ = mamba
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ssm_in\.weight': .*architecture.*--base .*--arch"):
        ggcl_fast.convert(source, tmp_path / "out", to=to)


def test_known_weights_alone_are_of_llama(tmp_path: Path) -> None:
    source = foreign(tmp_path / "lora.ggla", some_factors({"blk.0.attn_v.weight": (8, 8)}))
    ggcl_fast.convert(source, tmp_path / "a.gguf")
    assert field_value(tmp_path / "a.gguf", "general.architecture") == "llama"


def test_peft_refuses_what_it_has_no_name_for(mamba: Any, tmp_path: Path) -> None:
    base, source, _, _ = mamba
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"PEFT's modules .*expected 'llama', found 'mamba'"):
        ggcl_fast.convert(source, tmp_path / "out", to="peft", base=base)
    shape = {"blk.0.ffn_gate_inp.weight": (4, 8)}
    mixture = base_model(tmp_path / "base.gguf", "llama", {name: np.ones(s, "f4") for name, s in shape.items()})
    source = foreign(tmp_path / "lora.ggla", some_factors(shape))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_gate_inp\.weight': .*not known in Hugging Face's LLaMA"):
        ggcl_fast.convert(source, tmp_path / "out", to="peft", base=mixture)
    assert sorted(os.listdir(tmp_path)) == before


# --- rows of q and k ------------------------------------------------------------------------------------------------

ROTATED = {"blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64)}
N_HEADS = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}


def test_rows_are_put_into_order_by_the_heads_of_the_base_or_those_told(tmp_path: Path) -> None:
    factors = some_factors({**ROTATED, "blk.0.attn_v.weight": (32, 64)})
    source, base = foreign(tmp_path / "lora.ggla", factors), tmp_path / "base.gguf"
    weights = MODEL.write(base)
    ways: tuple[dict[str, Any], ...] = ({"base": base}, {"heads": (4, 2)}, {"base": base, "heads": (4, 2)})
    for options in ways:
        report = ggcl_fast.convert(source, tmp_path / "a.gguf", force=True, **options)
        assert "the rows of attn_k and attn_q were put into GGUF's order, by 4 heads and 2 of keys" in report.notes
        for weight, (a, b) in factors.items():
            ordered = in_order(b, N_HEADS[weight]) if weight in N_HEADS else b
            assert read_gguf(tmp_path / "a.gguf")[f"{weight}.lora_b"].tobytes() == ordered.tobytes()
            assert read_gguf(tmp_path / "a.gguf")[f"{weight}.lora_a"].tobytes() == a.T.tobytes()
    ggcl_fast.convert(source, tmp_path / "m.gguf", to="merged", base=base)
    merged = read_gguf(tmp_path / "m.gguf")
    for weight, (a, b) in factors.items():
        ordered = in_order(b, N_HEADS[weight]) if weight in N_HEADS else b
        close(merged[weight], weights[weight] + delta(a, ordered))


def test_rows_without_known_heads_are_refused_with_all_ways_out(tmp_path: Path) -> None:
    headless = base_model(tmp_path / "base.gguf", "llama", MODEL.weights(), block_count=3)
    for weight, shape in ROTATED.items():
        source = foreign(tmp_path / "lora.ggla", some_factors({weight: shape}))
        for base in None, headless:
            with pytest.raises(CheckpointError) as caught:
                ggcl_fast.convert(source, tmp_path / "out", base=base)
            assert all(part in str(caught.value) for part in (weight, "--base", "--heads", "--rows"))
        ggcl_fast.convert(source, tmp_path / "told.gguf", base=headless, heads=(4, 2), force=True)
        assert len(ggcl_fast.convert(source, tmp_path / "as.gguf", rows="gguf", force=True).notes) == 1
    assert sorted(os.listdir(tmp_path)) == ["as.gguf", "base.gguf", "lora.ggla", "told.gguf"]


@pytest.mark.parametrize("to", TARGETS)
def test_heads_that_contradict_the_base_are_refused(to: str, tmp_path: Path) -> None:
    MODEL.write(tmp_path / "base.gguf")
    source = foreign(tmp_path / "lora.ggla", some_factors(ROTATED))
    rows = "gguf" if to == "peft" else "auto"
    for heads in (2, 2), (4, 4):
        with pytest.raises(CheckpointError, match=r"base\.gguf: heads: .*expected \d,\d, found 4,2 .*leave --heads"):
            ggcl_fast.convert(source, tmp_path / "out", to=to, base=tmp_path / "base.gguf", heads=heads, rows=rows)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((3, 2), r"n_head: expected a divisor of half of 64, the rows of blk\.0\.attn_q\.weight, found 3 .*--heads"),
        ((64, 2), "n_head: expected a divisor of half of 64, .*found 64"),
        ((4, 3), r"n_head_kv: expected a divisor of half of 32, the rows of blk\.0\.attn_k\.weight, found 3"),
        ((4, 32), "n_head_kv: expected a divisor of half of 32, .*found 32"),
    ],
)
def test_heads_that_do_not_divide_the_rows_are_refused(heads: tuple[int, int], message: str, tmp_path: Path) -> None:
    source = foreign(tmp_path / "lora.ggla", some_factors(ROTATED))
    with pytest.raises(CheckpointError, match=message):
        ggcl_fast.convert(source, tmp_path / "out", heads=heads)
    with pytest.raises(CheckpointError, match=message):
        ggcl_fast.convert(source, tmp_path / "out", to="peft", heads=heads, rows="gguf")
    assert os.listdir(tmp_path) == ["lora.ggla"]


@pytest.mark.parametrize("heads", [(4, 4), (8, 8), (8, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize("order", [1, -1])
def test_heads_by_which_q_and_k_differ_are_refused(heads: tuple[int, int], order: int, tmp_path: Path) -> None:
    """`--heads 4` means as many for keys, which a model with grouped queries has not."""
    source = foreign(tmp_path / "lora.ggla", some_factors(dict([*ROTATED.items()][::order])))
    message = f"by {heads[0]} heads and {heads[1]} of keys, heads have different lengths: expected .*, found .*N_KV"
    for to, rows in ("adapter", "auto"), ("peft", "gguf"):
        with pytest.raises(CheckpointError, match=message):
            ggcl_fast.convert(source, tmp_path / "out", to=to, heads=heads, rows=rows)
    contradicts_itself = base_model(
        tmp_path / "base.gguf", "llama", MODEL.weights(), block_count=3,
        **{"attention.head_count": heads[0], "attention.head_count_kv": heads[1]},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        ggcl_fast.convert(source, tmp_path / "out", to="merged", base=contradicts_itself)
    assert sorted(os.listdir(tmp_path)) == ["base.gguf", "lora.ggla"]


def test_rows_of_other_architectures_are_taken_only_as_they_stand(tmp_path: Path) -> None:
    fused = {"blk.0.attn_qkv.weight": (96, 32)}
    for arch, shapes in ("falcon", fused), ("llama", fused), ("qwen2", ROTATED):
        factors = some_factors(shapes)
        source = foreign(tmp_path / "lora.ggla", factors)
        with pytest.raises(CheckpointError, match=f"Hugging Face's order.*'{arch}'.*--rows gguf"):
            ggcl_fast.convert(source, tmp_path / "out", arch=arch, heads=(4, 2))
        report = ggcl_fast.convert(source, tmp_path / "a.gguf", arch=arch, rows="gguf", force=True)
        modules = " and ".join(sorted(weight.split(".")[2] for weight in shapes))
        assert report.notes == (
            f"the rows of {modules} were taken as they stand: they are in Hugging Face's order, which may not be the "
            "order of GGUF's models",
        )
        for weight, (_, b) in factors.items():
            assert read_gguf(tmp_path / "a.gguf")[f"{weight}.lora_b"].tobytes() == b.tobytes()


def test_other_weights_of_other_architectures_need_no_order(tmp_path: Path) -> None:
    source = foreign(tmp_path / "lora.ggla", some_factors({"blk.0.ffn_up.weight": (96, 64)}))
    assert ggcl_fast.convert(source, tmp_path / "a.gguf", arch="falcon").notes == ()


def test_peft_takes_rows_of_hugging_faces_as_they_stand(tmp_path: Path) -> None:
    factors = some_factors(ROTATED)
    source = foreign(tmp_path / "lora.ggla", factors)
    ggcl_fast.convert(source, tmp_path / "peft", to="peft")
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, weight in ("q_proj", "blk.0.attn_q.weight"), ("k_proj", "blk.0.attn_k.weight"):
        found = tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight"]
        assert found.tobytes() == factors[weight][1].tobytes()


def test_what_was_put_into_order_comes_back_in_peft(tmp_path: Path) -> None:
    source = foreign(tmp_path / "lora.ggla", some_factors(ROTATED))
    ggcl_fast.convert(source, tmp_path / "straight", to="peft")
    ggcl_fast.convert(source, tmp_path / "a.gguf", heads=(4, 2))
    ggcl_fast.convert(tmp_path / "a.gguf", tmp_path / "around", to="peft", heads=(4, 2))
    name = "adapter_model.safetensors"
    assert (tmp_path / "around" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


# --- vocabulary -----------------------------------------------------------------------------------------------------

TRAINED_TOKENS, ALL_TOKENS = 20, 23
SMALL = Model(n_layer=1, n_vocab=TRAINED_TOKENS)
NOTE = "the base model has 23 tokens, of which training knew 20: the others have no delta"
OF_TOKENS = ("token_embd.weight", "output.weight")


def with_tokens(model: Model, n: int) -> Model:
    return Model(**{**vars(model), "n_vocab": n})


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
def test_tokens_that_came_later_stay_as_they_are(kind: Type, tied: bool, engine: Any, tmp_path: Path) -> None:
    """The rows that were trained come out as with a base of so many tokens, bit for bit."""
    small = Model(n_layer=1, n_vocab=TRAINED_TOKENS, kind=kind, tied=tied)
    large, factors = with_tokens(small, ALL_TOKENS), small.factors()
    weights = large.weights()
    cut = {name: w[:TRAINED_TOKENS] if name in OF_TOKENS else w for name, w in weights.items()}
    large.write(tmp_path / "large.gguf", weights)
    small.write(tmp_path / "small.gguf", cut)
    merged = {}
    for size in "large", "small":
        with small.checkpoint(factors) as checkpoint:
            report = ggcl_fast.convert(
                checkpoint, tmp_path / f"{size}-m.gguf", to="merged", base=tmp_path / f"{size}.gguf", engine=engine
            )
        assert (NOTE in report.notes) == (size == "large")
        merged[size] = {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{size}-m.gguf").tensors}
    before = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "large.gguf").tensors}
    assert list(merged["large"]) == list(merged["small"])
    for name, data in merged["large"].items():
        expected = merged["small"][name]
        if name in OF_TOKENS:
            rest = before["token_embd.weight" if tied else name][TRAINED_TOKENS:]
            assert data[TRAINED_TOKENS:].tobytes() == rest.tobytes()
            data = data[:TRAINED_TOKENS]
        assert data.tobytes() == expected.tobytes()


def rows_of_later_tokens(path: Path, name: str) -> bytes:
    (found,) = (tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return found[TRAINED_TOKENS:].tobytes()


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_zeros_below_zero_of_later_tokens_stay_below_zero(engine: Any, tmp_path: Path) -> None:
    weights = with_tokens(SMALL, ALL_TOKENS).weights()
    weights["output.weight"][TRAINED_TOKENS:] = -0.0
    with_tokens(SMALL, ALL_TOKENS).write(tmp_path / "base.gguf", weights)
    with SMALL.checkpoint(SMALL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf", engine=engine)
    before, after = (rows_of_later_tokens(tmp_path / name, "output.weight") for name in ("base.gguf", "m.gguf"))
    assert before == after


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_blocks_of_later_tokens_are_not_rounded_anew(engine: Any, tmp_path: Path) -> None:
    """llama-quantize with an importance matrix picks other scales than gguf does."""
    weights: dict[str, Any] = with_tokens(SMALL, ALL_TOKENS).weights()
    low, high = np.random.default_rng(7).integers(5, 12, (2, ALL_TOKENS, 2, 18), np.uint8)
    blocks = low | high << 4
    blocks[:, :, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    for name, values in weights.items():
        is_output = name == "output.weight"
        writer.add_tensor(
            name, blocks.reshape(ALL_TOKENS, -1) if is_output else values, raw_dtype=Type.Q4_0 if is_output else None
        )
    finish(writer)
    with SMALL.checkpoint(SMALL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf", engine=engine)
    before, after = (rows_of_later_tokens(tmp_path / name, "output.weight") for name in ("base.gguf", "m.gguf"))
    assert before == after


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_adapters_have_no_delta_for_tokens_that_came_later(outtype: str, tmp_path: Path) -> None:
    with_tokens(SMALL, ALL_TOKENS).write(tmp_path / "base.gguf")
    with SMALL.checkpoint(SMALL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "short.gguf", to="adapter", outtype=outtype)
        ggcl_fast.convert(checkpoint, tmp_path / "short", to="peft", outtype=outtype)
        for to in "adapter", "peft":
            target = tmp_path / ("long" if to == "peft" else "long.gguf")
            report = ggcl_fast.convert(checkpoint, target, to=to, base=tmp_path / "base.gguf", outtype=outtype)
            assert NOTE in report.notes
    short, long = read_gguf(tmp_path / "short.gguf"), read_gguf(tmp_path / "long.gguf")
    for name in "token_embd.weight.lora_a", "output.weight.lora_b":
        assert long[name].shape == (ALL_TOKENS, 2)
        assert not long[name][TRAINED_TOKENS:].any()
        long[name] = long[name][:TRAINED_TOKENS]
    assert {n: v.tobytes() for n, v in short.items()} == {n: v.tobytes() for n, v in long.items()}
    of_short, of_long = (
        safetensors.numpy.load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("short", "long")
    )
    embedding = of_long["base_model.model.model.embed_tokens.lora_embedding_A"]
    assert embedding.shape == (2, ALL_TOKENS)
    assert not embedding[:, TRAINED_TOKENS:].any()
    np.testing.assert_array_equal(
        embedding[:, :TRAINED_TOKENS], of_short["base_model.model.model.embed_tokens.lora_embedding_A"]
    )
    head = of_long["base_model.model.lm_head.lora_B.weight"]
    assert head.shape == (ALL_TOKENS, 2)
    assert not head[TRAINED_TOKENS:].any()


def test_later_tokens_and_rows_of_hugging_faces_at_once(tmp_path: Path) -> None:
    factors = some_factors({**ROTATED, "output.weight": (TRAINED_TOKENS, 64)})
    weights = with_tokens(SMALL, ALL_TOKENS).write(tmp_path / "base.gguf")
    source = foreign(tmp_path / "lora.ggla", factors)
    report = ggcl_fast.convert(source, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf")
    assert NOTE in report.notes
    merged = read_gguf(tmp_path / "m.gguf")
    for weight, n_head in N_HEADS.items():
        close(merged[weight], weights[weight] + delta(factors[weight][0], in_order(factors[weight][1], n_head)))
    close(merged["output.weight"][:TRAINED_TOKENS], weights["output.weight"][:TRAINED_TOKENS] + delta(
        *factors["output.weight"]
    ))  # fmt: skip
    np.testing.assert_array_equal(merged["output.weight"][TRAINED_TOKENS:], weights["output.weight"][TRAINED_TOKENS:])


@pytest.mark.parametrize("to", TARGETS)
def test_fewer_tokens_than_trained_are_an_error(to: str, tmp_path: Path) -> None:
    with_tokens(SMALL, TRAINED_TOKENS - 1).write(tmp_path / "base.gguf")
    with (
        SMALL.checkpoint(SMALL.factors()) as checkpoint,
        pytest.raises(CheckpointError, match=r"'token_embd\.weight': dims: .*\(64, 19\) as in .*, found \(64, 20\)"),
    ):
        ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, base=tmp_path / "base.gguf")
    assert os.listdir(tmp_path) == ["base.gguf"]


@pytest.mark.parametrize("to", ["adapter", "peft"])
@pytest.mark.parametrize("shape", [(7, 64), (ALL_TOKENS, 64), (TRAINED_TOKENS, 32)])
def test_embeddings_that_are_left_out_are_not_looked_at(shape: tuple[int, int], to: str, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    SMALL.write(base, {**SMALL.weights(), "token_embd.weight": np.ones(shape, np.float32)})
    with SMALL.checkpoint(SMALL.factors()) as checkpoint:
        if shape[0] != ALL_TOKENS:
            with pytest.raises(CheckpointError, match=r"'token_embd\.weight': dims"):
                ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, base=base)
        report = ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, base=base, token_embd=False)
    assert not any("tokens" in note for note in report.notes)
    if to == "adapter":
        assert not [name for name in read_gguf(tmp_path / "out") if name.startswith("token_embd")]
    else:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert "embed_tokens" not in config["target_modules"]


@pytest.mark.parametrize("to", TARGETS)
def test_another_width_is_refused_with_the_dims_that_the_file_has(to: str, tmp_path: Path) -> None:
    Model(n_layer=1, n_vocab=ALL_TOKENS, head_dim=32).write(tmp_path / "base.gguf")
    with SMALL.checkpoint(SMALL.factors()) as checkpoint:
        unrotated = replace(checkpoint, parameters=checkpoint.parameters._replace(n_rot=0))
        with pytest.raises(CheckpointError, match=r"expected \(128, 23\) as in .*base\.gguf, found \(64, 20\)"):
            ggcl_fast.convert(unrotated, tmp_path / "out", to=to, base=tmp_path / "base.gguf")


@pytest.mark.parametrize("arch", ["ll\nma", "../xy", "l\u00e4ma", " lama", "x" * 65, ""])
def test_an_architecture_is_a_plain_name(arch: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the name of an architecture"):
        ggcl_fast.convert(DATA / "trained.ggla", tmp_path / "out", to="adapter", arch=arch)
    if len(arch.encode()) == len("llama"):
        data = (DATA / "wild" / "peft-qkv-adapter.gguf").read_bytes()
        with pytest.raises(CheckpointError, match=r"general\.architecture .*expected the name of an architecture"):
            ggcl_fast.open_checkpoint(data.replace(b"llama", arch.encode(), 1))
