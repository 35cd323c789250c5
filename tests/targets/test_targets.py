"""What the outputs hold, against plain numpy: adapters, base models with changed norms, merged models, PEFT folders."""

import dataclasses
import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import CheckpointError, targets
from ggcl_fast.targets import adding
from ggcl_fast.targets.peft import MODULE_NAMES

from ..gguf_parts import parse
from ..models import BASE, Floats, Model, Type, delta, field_value, finish, is_norm, kinds_of, read_gguf
from ..reference import DATA, MODULES

TRAINED = DATA / "trained.ggcl"
TIED = ("token_embd.weight", "output.weight")

head_counts = st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)])
models = st.builds(
    lambda heads, **rest: Model(n_head=heads[0], n_head_kv=heads[1], **rest),
    heads=head_counts,
    n_layer=st.sampled_from([0, 1, 2, 3]),
    head_dim=st.just(32),
    n_ff=st.sampled_from([32, 96]),
    n_vocab=st.integers(1, 40),
    tied=st.booleans(),
    kind=st.sampled_from([Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_1, Type.Q4_0]),
    alignment=st.sampled_from([32, 64, 8]),
    ranks=st.fixed_dictionaries(dict.fromkeys(MODULES.values(), st.integers(1, 5))),
)
scales = st.sampled_from([1.0, 0.5, -3.0, 1 / 3])
# How far a value may be from what it stands for, relative to the largest of its tensor.
PRECISION = {
    Type.F32: 1e-6, Type.F16: 1e-3, Type.BF16: 8e-3, Type.Q8_0: 1 / 127, Type.Q5_1: 1 / 15, Type.Q4_0: 1 / 7,
}  # fmt: skip


def close(found: Any, expected: Any, kind: Type = Type.F32) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=PRECISION[kind] * float(np.abs(expected).max()))


def adapter_delta(tensors: dict[str, Floats], weight: str) -> Floats:
    """What llama.cpp makes of an adapter's pair: the sum it adds to the weight, in numpy's (n_out, n_in)."""
    a, b = tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"]
    return a @ b.T if weight == "token_embd.weight" else b @ a


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@settings(max_examples=25, deadline=None)
@given(model=models, scale=scales, outtype=st.sampled_from(targets.OUTTYPES), token_embd=st.booleans())
def test_an_adapter_holds_every_delta_but_those_of_norms(
    model: Model, scale: float, outtype: str, token_embd: bool, folder: Path
) -> None:
    factors = model.factors()
    out = folder / "adapter.gguf"
    with model.checkpoint(factors, scale) as checkpoint:
        report = ggcl_fast.convert(
            checkpoint, out, to="adapter", outtype=outtype, token_embd=token_embd, force=True
        )  # fmt: skip
    assert [field_value(out, key) for key in ("general.architecture", "general.type", "adapter.type")] == [
        "llama", "adapter", "lora"
    ]  # fmt: skip
    ranks = {len(a[0]) for w, (a, _) in factors.items() if not is_norm(w) and (token_embd or w != "token_embd.weight")}
    assert field_value(out, "adapter.lora.alpha") == (ranks.pop() if len(ranks) == 1 else 0)
    tensors, kind = read_gguf(out), gguf.GGMLQuantizationType[outtype.upper()]
    assert set(kinds_of(out).values()) == {kind}
    expected = [w for w in factors if not is_norm(w) and (token_embd or w != "token_embd.weight")]
    assert list(tensors) == [f"{w}.lora_{end}" for w in expected for end in "ab"]
    assert report.n_tensors == len(tensors)
    for weight in expected:
        a, b = factors[weight]
        ends = "ba" if weight == "token_embd.weight" else "ab"
        close(tensors[f"{weight}.lora_{ends[0]}"], a if ends == "ba" else a.T, kind)
        close(tensors[f"{weight}.lora_{ends[1]}"], scale * b.astype(np.float64), kind)
        if kind == Type.F32:
            close(adapter_delta(tensors, weight), delta(a, b, scale).reshape(len(b), len(a)))


def test_an_unscaled_adapter_is_exact_to_the_bit(tmp_path: Path) -> None:
    ggcl_fast.convert(TRAINED, tmp_path / "a.gguf", to="adapter")
    tensors = read_gguf(tmp_path / "a.gguf")
    with ggcl_fast.open_checkpoint(TRAINED) as checkpoint:
        a = checkpoint.tensors["blk.1.ffn_down.weight.lora_a"]
        assert tensors["blk.1.ffn_down.weight.lora_a"].tobytes() == a.T.tobytes()
        for end, flipped in ("ab", "ba"):
            expected = checkpoint.tensors[f"token_embd.weight.lora_{flipped}"]
            assert tensors[f"token_embd.weight.lora_{end}"].tobytes() == expected.tobytes()


def test_what_is_left_out_is_said_with_its_size(tmp_path: Path) -> None:
    model = Model()
    factors = model.factors()
    deltas = np.concatenate([delta(*ab, 2.0) for weight, ab in factors.items() if is_norm(weight)])
    said = f"5 norm deltas (at most {np.abs(deltas).max():.3g}, RMS {np.sqrt(np.mean(deltas**2)):.3g}, "
    with model.checkpoint(factors, 2.0) as checkpoint:
        for to in ("adapter", "peft"):
            (note,) = ggcl_fast.convert(checkpoint, tmp_path / to, to=to).notes
            assert note.startswith(f"left out: {said}")
            assert "--base" in note
            notes = ggcl_fast.convert(checkpoint, tmp_path / f"{to}-2", to=to, token_embd=False).notes
            assert any("token_embd.weight" in note for note in notes)
        factors = {weight: ab for weight, ab in factors.items() if not is_norm(weight)}
    with model.checkpoint(factors) as checkpoint:
        assert ggcl_fast.convert(checkpoint, tmp_path / "none", to="adapter").notes == ()


@settings(max_examples=25, deadline=None)
@given(model=models, scale=scales)
def test_only_norms_of_the_base_change(model: Model, scale: float, folder: Path) -> None:
    model = replace(model, tied=False)
    base, factors = folder / "in.gguf", model.factors()
    weights = model.write(base, extra={"rope_freqs.weight": np.ones(3, np.float32)})
    with model.checkpoint(factors, scale) as checkpoint:
        report = ggcl_fast.convert(checkpoint, folder / "adapter.gguf", to="adapter", base=base, force=True)
    out = folder / "in-adapter.gguf"
    assert report.extra_outputs == (str(out),)
    assert report.target_bytes == out.stat().st_size + (folder / "adapter.gguf").stat().st_size
    before, after = ({one.name: one for one in gguf.GGUFReader(path).tensors} for path in (base, out))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type
        if is_norm(name):
            close(after[name].data, weights[name] + delta(*factors[name], scale))
        else:
            assert tensor.data.tobytes() == after[name].data.tobytes()


@settings(max_examples=25, deadline=None)
@given(model=models, scale=scales)
def test_a_merged_model_has_every_delta(model: Model, scale: float, folder: Path) -> None:
    base, out, factors = folder / "base.gguf", folder / "merged.gguf", model.factors()
    weights = model.write(base, extra={"rope_freqs.weight": np.arange(5, dtype=np.float32)})
    with model.checkpoint(factors, scale) as checkpoint:
        report = ggcl_fast.convert(checkpoint, out, to="merged", base=base, force=True)
    found, kinds = read_gguf(out), kinds_of(out)
    order = [*kinds_of(base), *(["output.weight"] if model.tied else [])]
    assert list(found) == order
    assert report.n_tensors == len(order)
    np.testing.assert_array_equal(found["rope_freqs.weight"], np.arange(5))
    for weight, ab in factors.items():
        kind = Type.F32 if is_norm(weight) else model.kind
        assert kinds[weight] == kind
        origin = weights["token_embd.weight" if model.tied and weight == "output.weight" else weight]
        close(found[weight], origin + delta(*ab, scale).reshape(origin.shape), kind)
    before, after = ({name: f.contents() for name, f in gguf.GGUFReader(p).fields.items()} for p in (base, out))
    own = {"general.name", "general.base_model.count", "general.base_model.0.name"}
    own |= {f"ggcl_fast.{key}" for key in ("version", "training", "holds")}
    assert after.keys() - before.keys() == own
    for name in before.keys() - {"GGUF.tensor_count", "GGUF.kv_count"}:
        assert after[name] == before[name]
    is_rounded = model.kind in (Type.Q8_0, Type.Q5_1, Type.Q4_0, Type.BF16)
    assert any("rounded anew" in note for note in report.notes) == is_rounded


def test_a_merged_model_is_changed_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(kind=Type.Q8_0)
    model.write(tmp_path / "base.gguf")
    with model.checkpoint(model.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "whole.gguf", to="merged", base=tmp_path / "base.gguf")
        monkeypatch.setattr(adding, "_ROWS", 5 * 4 * 64)
        ggcl_fast.convert(checkpoint, tmp_path / "rows.gguf", to="merged", base=tmp_path / "base.gguf")
    whole, rows = read_gguf(tmp_path / "whole.gguf"), read_gguf(tmp_path / "rows.gguf")
    for name in whole:  # sums of another order may fall on the other side of a rounding
        close(rows[name], whole[name], Type.Q8_0)


def test_types_that_gguf_only_reads_are_written_as_f16(tmp_path: Path) -> None:
    """Blocks of zeros are sound in every type; a K-quant's rows have 256 values."""
    model = Model(n_head=4, head_dim=64, n_ff=256)
    weights = model.weights()
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    for name, values in weights.items():
        is_k = name.endswith(("attn_v.weight", "output.weight"))
        shape = (*values.shape[:-1], values.shape[-1] // 256 * 144)
        if is_k and not is_norm(name):
            writer.add_tensor(name, np.zeros(shape, np.uint8), raw_dtype=Type.Q4_K)
        else:
            writer.add_tensor(name, values)
    finish(writer)
    factors = model.factors()
    with model.checkpoint(factors) as checkpoint:
        (note,) = ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf").notes
    assert note.endswith(
        "output.weight (Q4_K), blk.*.attn_v.weight (Q4_K, 2 times), blk.*.attn_output.weight (Q4_K, 2 times)"
    )
    kinds, found = kinds_of(tmp_path / "m.gguf"), read_gguf(tmp_path / "m.gguf")
    assert kinds["blk.1.attn_v.weight"] == Type.F16
    assert kinds["blk.1.attn_q.weight"] == Type.F32
    close(found["blk.1.attn_v.weight"], delta(*factors["blk.1.attn_v.weight"]), Type.F16)
    close(found["blk.1.attn_q.weight"], weights["blk.1.attn_q.weight"] + delta(*factors["blk.1.attn_q.weight"]))


def test_a_tied_model_is_untied_only_where_training_changed_it(tmp_path: Path) -> None:
    model = Model(tied=True)
    weights = model.write(tmp_path / "base.gguf")
    factors = model.factors()
    for left_out, is_untied in ((), True), (("output.weight",), True), (TIED, False):
        kept = {weight: ab for weight, ab in factors.items() if weight not in left_out}
        out = tmp_path / f"{len(left_out)}.gguf"
        with model.checkpoint(kept) as checkpoint:
            notes = ggcl_fast.convert(checkpoint, out, to="merged", base=tmp_path / "base.gguf").notes
        found = read_gguf(out)
        assert ("output.weight" in found) == is_untied == any("no longer tied" in note for note in notes)
        if left_out == ("output.weight",):
            np.testing.assert_array_equal(found["output.weight"], weights["token_embd.weight"])


def hf_to_gguf(rows: Floats, n_head: int) -> Floats:
    """The order that llama.cpp's converter gives the rows of q and k, said again and in another way."""
    half = len(rows) // n_head // 2
    order = [h * 2 * half + i + j * half for h in range(n_head) for i in range(half) for j in range(2)]
    return rows[order]


@settings(max_examples=25, deadline=None)
@given(model=models, scale=scales, with_base=st.booleans(), outtype=st.sampled_from(["f32", "f16"]))
def test_a_peft_folder_holds_every_delta(
    model: Model, scale: float, with_base: bool, outtype: str, folder: Path
) -> None:
    factors, base = model.factors(), folder / "base.gguf"
    weights = model.write(base)
    with model.checkpoint(factors, scale) as checkpoint:
        ggcl_fast.convert(
            checkpoint, folder / "peft", to="peft", base=base if with_base else None, outtype=outtype, force=True
        )  # fmt: skip
    tensors = safetensors.numpy.load_file(folder / "peft" / "adapter_model.safetensors")
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    for weight, (a, b) in factors.items():
        last = weight.split(".")[-2]
        module = MODULE_NAMES[last].format(weight.split(".")[1])
        prefix = f"base_model.model.{module}"
        if is_norm(weight):
            if with_base:
                close(tensors.pop(f"{prefix}.weight"), weights[weight] + delta(a, b, scale))
                assert module.rpartition(".")[2] in config["modules_to_save"]
            continue
        leaf = module.rpartition(".")[2]
        assert leaf in config["target_modules"]
        assert config["rank_pattern"].get(leaf, config["r"]) == a.shape[1]
        factor = a.shape[1] / config["lora_alpha"]  # what PEFT divides by
        if last == "token_embd":
            up, down = tensors.pop(f"{prefix}.lora_embedding_A").T, tensors.pop(f"{prefix}.lora_embedding_B").T
        else:
            up, down = tensors.pop(f"{prefix}.lora_B.weight"), tensors.pop(f"{prefix}.lora_A.weight")
        if last in ("attn_q", "attn_k"):
            up = hf_to_gguf(up, model.n_head if last == "attn_q" else model.n_head_kv)
        close(up, b * scale * factor, kind)
        close(down, a.T, kind)
    assert tensors == {}
    assert config["alpha_pattern"] == {}
    assert config["lora_alpha"] == config["r"]


def test_one_alpha_holds_for_every_rank(tmp_path: Path) -> None:
    """Programs that do not know alpha_pattern would take other deltas than were trained, in silence."""
    model = Model(ranks={"attn_q": 6, "attn_k": 3, "attn_v": 8, "ffn_up": 5})
    factors = model.factors()
    with model.checkpoint(factors) as checkpoint:
        report = ggcl_fast.convert(checkpoint, tmp_path / "peft", to="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert config["alpha_pattern"] == {}
    assert not any("alpha" in note for note in report.notes)
    for weight, module in ("blk.1.attn_v.weight", "self_attn.v_proj"), ("blk.0.ffn_up.weight", "mlp.up_proj"):
        a, b = factors[weight]
        found = tensors[f"base_model.model.model.layers.{weight[4]}.{module}.lora_B.weight"]
        exact = b.astype(np.float64) * a.shape[1] / config["lora_alpha"]
        assert np.abs(found - exact).max() <= np.spacing(np.abs(found).max()) / 2


def test_norms_that_nobody_trained_are_no_weights_of_peft(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    model.write(tmp_path / "base.gguf")
    factors = {name: (a, b * (not is_norm(name))) for name, (a, b) in model.factors().items()}
    with model.checkpoint(factors) as checkpoint:
        for base in None, tmp_path / "base.gguf":
            report = ggcl_fast.convert(checkpoint, tmp_path / "peft", to="peft", base=base, force=True)
            assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] is None
            assert not any("norm" in note for note in report.notes)
        assert ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter").notes == ()
        told = ggcl_fast.convert(
            checkpoint, tmp_path / "b.gguf", to="adapter", base=tmp_path / "base.gguf", base_out=tmp_path / "copy.gguf"
        )
    assert told.notes == (f"{tmp_path / 'copy.gguf'} is not written: no norm was trained",)


def test_ranks_that_differ_between_layers_are_named_by_layer(tmp_path: Path) -> None:
    model = Model(n_layer=12)
    factors = model.factors()
    a, b = factors["blk.1.attn_q.weight"]
    factors["blk.1.attn_q.weight"] = np.hstack([a, a]), np.hstack([b, b])
    with model.checkpoint(factors) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "peft", to="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 4
    assert config["rank_pattern"]["model.layers.11.self_attn.q_proj"] == 2


def test_forty_layers(tmp_path: Path) -> None:
    model = Model(n_layer=40, n_head=2, n_head_kv=1, head_dim=16, n_ff=32, n_vocab=8)
    factors, weights = model.factors(), model.write(tmp_path / "base.gguf")
    with model.checkpoint(factors) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base=tmp_path / "base.gguf")
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf")
    adapter, patched, merged = (read_gguf(tmp_path / f"{n}.gguf") for n in ("a", "base-a", "m"))
    for weight in factors:
        added = 0 if is_norm(weight) else adapter_delta(adapter, weight)
        close(patched[weight] + added, merged[weight])
        close(merged[weight], weights[weight] + delta(*factors[weight]))


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["adapter", "merged", "peft"])
def test_another_model_is_refused_with_both_shapes_and_files(to: str, tmp_path: Path) -> None:
    other = Model(head_dim=32)
    other.write(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(TRAINED, tmp_path / "out", to=to, base=tmp_path / "other.gguf")
    assert str(caught.value) == (
        f"{TRAINED}: n_head_kv: not the shape of the base model: expected 2 as in {tmp_path}/other.gguf, found 4 "
        "(it was trained on another model)"
    )
    assert os.listdir(tmp_path) == ["other.gguf"]


def test_a_model_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    Model(n_layer=1, n_head_kv=4, n_ff=192).write(tmp_path / "base.gguf")
    with pytest.raises(CheckpointError, match=r"n_layer: not the shape .* expected 1 as in .*base\.gguf, found 2"):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "base.gguf")


def test_other_files_are_no_base(tmp_path: Path) -> None:
    with pytest.raises(ggcl_fast.NotACheckpointError, match="not a GGUF file: it is a finetune checkpoint"):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=TRAINED)
    ggcl_fast.convert(TRAINED, tmp_path / "a.gguf", to="adapter")
    no_base = r"general\.type at .*: not a base model .* expected 'model', found 'adapter'"
    with pytest.raises(CheckpointError, match=no_base):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "a.gguf")
    data = BASE.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:-1])
    with pytest.raises(ggcl_fast.TruncatedError, match=r"short\.gguf: tensor 20"):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "short.gguf")
    (tmp_path / "gemma.gguf").write_bytes(
        data.replace(b"\x05\0\0\0\0\0\0\0llama\x0c", b"\x05\0\0\0\0\0\0\0gemma\x0c", 1)
    )
    with pytest.raises(
        CheckpointError, match=r"architecture: not the architecture .*'gemma' of .*gemma\.gguf, found 'llama'"
    ):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "gemma.gguf")
    with pytest.raises(FileNotFoundError):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "none.gguf")


def test_tied_embeddings_are_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    model = Model(tied=True)
    model.write(tmp_path / "base.gguf")
    with model.checkpoint(model.factors()) as checkpoint:
        with pytest.raises(CheckpointError, match=r"'token_embd\.weight': .*tied.*--no-token-embd"):
            ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base=tmp_path / "base.gguf")
        report = ggcl_fast.convert(
            checkpoint, tmp_path / "a.gguf", to="adapter", base=tmp_path / "base.gguf", token_embd=False
        )
    assert report.notes[0] == "left out: the deltas of token_embd.weight and output.weight"
    assert not [name for name in read_gguf(tmp_path / "a.gguf") if name.startswith(("token_embd", "output."))]


def test_heads_that_cannot_be_are_an_error_for_peft(tmp_path: Path) -> None:
    model = Model()
    with model.checkpoint(model.factors()) as checkpoint:
        sound = checkpoint.parameters
        for field, value, message in (
            ("n_head", 0, "n_head: expected a divisor of half of 64, .*found nothing that tells it .*--base"),
            ("n_head_kv", 3, "n_head_kv: expected a divisor of half of 32, .*found 3"),
            ("n_rot", 8, "n_rot: .*expected 16, found 8"),
        ):
            odd = dataclasses.replace(checkpoint, parameters=sound._replace(**{field: value}))
            with pytest.raises(CheckpointError, match=message):
                ggcl_fast.convert(odd, tmp_path / "out", to="peft")
        odd = dataclasses.replace(checkpoint, parameters=sound._replace(n_head=0, n_head_kv=0, n_rot=0))
        model.write(tmp_path / "base.gguf")
        ggcl_fast.convert(odd, tmp_path / "out", to="peft", base=tmp_path / "base.gguf")


def test_values_too_large_for_f16_are_an_error(tmp_path: Path) -> None:
    model = Model()
    factors = model.factors()
    factors["blk.0.attn_q.weight"][1][3, 1] = 1e5
    with model.checkpoint(factors) as checkpoint:
        for to in ("adapter", "peft"):
            with pytest.raises(CheckpointError, match=r"attn_q\.weight.*too large for F16: .*65504, found 1000"):
                ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, outtype="f16")
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", outtype="bf16")
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gptq"}, "expected one of checkpoint, adapter, merged, peft, found 'gptq'"),
        ({"to": "merged"}, r"--to merged needs --base \(base=\)"),
        ({"base": BASE}, "--base .* means nothing with --to checkpoint"),
        ({"to": "adapter", "base_out": "x"}, "--base-out .* needs --base"),
        ({"to": "merged", "base": BASE, "base_out": "x"}, "--base-out .* means nothing with --to merged"),
        ({"token_embd": False}, "--no-token-embd .* means nothing"),
        ({"outtype": "f16"}, "--to checkpoint: expected f32, not f16"),
        ({"to": "peft", "outtype": "bf16"}, "--to peft: expected f32 or f16, not bf16"),
    ],
)
def test_options_that_mean_nothing_are_a_mistake_of_the_caller(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ggcl_fast.convert(TRAINED, tmp_path / "out", **options)


def test_a_target_that_is_the_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    shutil.copy(BASE, base)
    out = tmp_path / "a.gguf"
    same: list[dict[str, Any]] = [
        {"target": base},
        {"target": out, "base_out": base},
        {"target": out, "base_out": out},
    ]
    for arguments in same:
        with pytest.raises(shutil.SameFileError):
            ggcl_fast.convert(TRAINED, to="adapter", base=base, force=True, **arguments)
    with pytest.raises(shutil.SameFileError):
        ggcl_fast.convert(TRAINED, base, to="merged", base=base, force=True)
    assert base.read_bytes() == BASE.read_bytes()
    assert os.listdir(tmp_path) == ["base.gguf"]


ODD_KEYS: dict[str, tuple[str, int, bytes, str]] = {
    "an architecture that is 0": ("general.architecture", 4, bytes(4), "expected string, found uint32"),
    "an architecture that is false": (
        "general.architecture",
        7,
        bytes(1),
        "expected string, found bool",
    ),
    "a split count that is text": (
        "split.count",
        8,
        struct.pack("<Q", 1) + b"2",
        "expected an integer of 0 to 2147483647, found string",
    ),
    "heads that are true": ("llama.attention.head_count", 7, b"\1", "expected an integer of .*, found bool"),
    "heads that are half": ("llama.attention.head_count", 6, struct.pack("<f", 0.5), "found float32"),
    "heads below zero": ("llama.attention.head_count_kv", 5, struct.pack("<i", -1), "found -1"),
    "heads beyond counting": ("llama.attention.head_count", 10, struct.pack("<Q", 1 << 40), "found 1099511627776"),
    "heads by layer": ("llama.attention.head_count", 9, struct.pack("<IQ2I", 4, 2, 4, 4), "found array"),
}


@pytest.mark.parametrize(("key", "type_", "value", "message"), ODD_KEYS.values(), ids=ODD_KEYS)
def test_keys_of_a_base_have_the_types_that_they_must_have(
    key: str, type_: int, value: bytes, message: str, tmp_path: Path
) -> None:
    model = Model()
    model.write(tmp_path / "base.gguf")
    parts = parse((tmp_path / "base.gguf").read_bytes())
    parts.keys[key.encode()] = type_, value
    (tmp_path / "odd.gguf").write_bytes(parts.build())
    with model.checkpoint(model.factors()) as checkpoint, pytest.raises(CheckpointError, match=f"{key}.*{message}"):
        ggcl_fast.convert(checkpoint, tmp_path / "out", to="peft", base=tmp_path / "odd.gguf")
