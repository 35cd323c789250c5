"""What outputs say about themselves, and that the same deltas are not added twice."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.targets import about
from ggcl_fast.targets.options import Options
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..adapters import made as made_pair
from ..adapters import write_adapter
from ..gguf_parts import ARRAY, STRING, Record, ggla_bytes, string
from ..hostile import places, put
from ..models import BASE, Floats, Model, field_value, is_norm, read_gguf
from ..reference import DATA
from ..routes import contents
from .test_rewriting import parts_of

TRAINED = DATA / "trained.ggcl"
ID = "meta-llama/Llama-2-7b-hf"
MODEL = Model(n_layer=1)


def said(path: Path) -> dict[str, Any]:
    """What a file says about itself: the keys that this project writes."""
    names = ("general.name", "general.base_model.", "ggcl_fast.")
    return {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if name.startswith(names)
    }  # fmt: skip


def training(path: Path) -> str:
    return str(field_value(path, "ggcl_fast.training"))


def named_base(path: Path, name: bytes = b"Base") -> Path:
    """A base for `MODEL`, with arrays among its keys."""
    MODEL.write(path)
    parts = parts_of(path)
    parts.keys[b"general.name"] = STRING, string(name)
    parts.keys[b"tokenizer.ggml.tokens"] = ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string(b"\xff")
    parts.keys[b"tokenizer.ggml.token_type"] = ARRAY, struct.pack("<IQ2i", 5, 2, 1, 6)
    parts.keys[b"odd.empty"] = ARRAY, struct.pack("<IQ", 12, 0)
    parts.keys[b"odd.nan"] = 6, b"\1\0\xc0\xff"
    path.write_bytes(parts.build())
    return path


# --- names and bases ------------------------------------------------------------------------------------------------


def test_an_adapter_alone_has_its_sources_name(tmp_path: Path) -> None:
    ggcl_fast.convert(TRAINED, tmp_path / "a.gguf", to="adapter")
    keys = said(tmp_path / "a.gguf")
    assert len(keys.pop("ggcl_fast.training")) == 32
    assert keys == {
        "general.name": "trained", "ggcl_fast.version": ggcl_fast.__version__, "ggcl_fast.left_out": "norms"
    }  # fmt: skip
    names = [name for name in gguf.GGUFReader(tmp_path / "a.gguf").fields if not name.startswith("GGUF.")]
    assert len(names) == len(set(names)) == 8


def test_outputs_of_a_base_have_both_names(tmp_path: Path) -> None:
    base = named_base(tmp_path / "file.gguf")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base=base)
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=base)
    files = {"a.gguf": "Base + made", "file-a.gguf": "Base + made (norms)", "m.gguf": "Base + made"}
    holds = {"a.gguf": None, "file-a.gguf": "deltas of norms", "m.gguf": "every delta"}
    for name, title in files.items():
        keys = said(tmp_path / name)
        assert keys.pop("ggcl_fast.left_out", None) == ("norms" if name == "a.gguf" else None)
        assert keys.pop("ggcl_fast.training") == training(tmp_path / "a.gguf")
        assert keys.pop("ggcl_fast.holds", None) == holds[name]
        assert keys == {
            "general.name": title, "ggcl_fast.version": ggcl_fast.__version__, "general.base_model.count": 1,
            "general.base_model.0.name": "Base",
        }  # fmt: skip


def test_a_base_without_a_name_is_called_after_its_file(tmp_path: Path) -> None:
    MODEL.write(tmp_path / "some.base.gguf")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "some.base.gguf")
    assert field_value(tmp_path / "m.gguf", "general.name") == "some.base + made"
    assert field_value(tmp_path / "m.gguf", "general.base_model.0.name") == "some.base"


@pytest.mark.parametrize("name", ["My model", "模型 🦙", 'a"b\nc'])
def test_a_name_that_is_asked_for_is_taken(name: str, tmp_path: Path) -> None:
    base = named_base(tmp_path / "base.gguf")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base=base, name=name)
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=base, name=name)
    assert field_value(tmp_path / "a.gguf", "general.name") == name
    assert field_value(tmp_path / "base-a.gguf", "general.name") == f"{name} (norms)"
    assert field_value(tmp_path / "m.gguf", "general.name") == name
    assert field_value(tmp_path / "m.gguf", "general.base_model.0.name") == "Base"


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("model_id", "owner", "model"), [(ID, "meta-llama", "Llama-2-7b-hf"), ("gpt2", None, "gpt2")])
def test_an_id_at_hugging_face_is_told(
    model_id: str, owner: str | None, model: str, with_base: bool, tmp_path: Path
) -> None:
    base = named_base(tmp_path / "base.gguf")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        options: dict[str, Any] = {"base": base} if with_base else {}
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base_model_id=model_id, **options)
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base_model_id=model_id, base=base)
    for name in ("a.gguf", "base-a.gguf", "m.gguf") if with_base else ("a.gguf",):
        keys = {key: value for key, value in said(tmp_path / name).items() if "base_model" in key}
        assert keys == {
            "general.base_model.count": 1,
            "general.base_model.0.name": "Base" if with_base else model,
            **({"general.base_model.0.organization": owner} if owner else {}),
            "general.base_model.0.repo_url": f"https://huggingface.co/{model_id}",
        }


def test_what_a_base_says_of_its_own_base_is_not_said_of_what_is_made_of_it(tmp_path: Path) -> None:
    base = named_base(tmp_path / "base.gguf")
    parts = parts_of(base).u32("general.base_model.count", 2)
    for i, name in enumerate(("One", "Two")):
        parts.put(f"general.base_model.{i}.name", STRING, name).put(f"general.base_model.{i}.doi", STRING, "10.1")
    base.write_bytes(parts.build())
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=base)
    keys = {key: value for key, value in said(tmp_path / "m.gguf").items() if "base_model" in key}
    assert keys == {"general.base_model.count": 1, "general.base_model.0.name": "Base"}


@pytest.mark.parametrize("to", ["adapter", "merged", "peft"])
@pytest.mark.parametrize("odd", ["source", "base"])
def test_file_names_that_are_no_text_are_no_obstacle(odd: str, to: str, tmp_path: Path) -> None:
    no_text = os.fsdecode(b"\xff")
    source = tmp_path / f"{no_text if odd == 'source' else 'trained'}.ggcl"
    base = tmp_path / f"{no_text if odd == 'base' else 'base'}.gguf"
    shutil.copy(TRAINED, source)
    base.write_bytes(parts_of(BASE).without("general.name").build())
    ggcl_fast.convert(source, tmp_path / "out", to=to, base=base)
    if to != "peft":
        assert field_value(tmp_path / "out", "general.name").encode()


@pytest.mark.parametrize("to", ["adapter", "merged", "peft"])
def test_a_base_whose_name_is_no_text_is_no_obstacle(to: str, tmp_path: Path) -> None:
    base = named_base(tmp_path / "base.gguf", b"\xff\xfe\x00")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "out", to=to, base=base)


# --- keys of the base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["adapter", "merged"])
@pytest.mark.parametrize("own", [False, True])
def test_all_other_keys_of_the_base_are_as_they_stand(own: bool, to: str, tmp_path: Path) -> None:
    with ggcl_fast.open_checkpoint(TRAINED) if own else MODEL.checkpoint(MODEL.factors()) as checkpoint:
        base = BASE if own else named_base(tmp_path / "base.gguf")
        copy = tmp_path / "copy.gguf" if to == "adapter" else None
        ggcl_fast.convert(checkpoint, tmp_path / "out.gguf", to=to, base=base, base_out=copy)
    after = contents((copy or tmp_path / "out.gguf").read_bytes()).keys
    before = contents(base.read_bytes()).keys
    new = [name for name in after if name.startswith((b"ggcl_fast.", b"general.base_model.", b"general.name"))]
    assert next(iter(after)) == b"general.architecture"
    assert list(after)[1 : 1 + len(new)] == new
    kept = {name: value for name, value in before.items() if name not in new}
    assert list(kept.items()) == [(name, value) for name, value in after.items() if name not in new]


def test_the_architecture_comes_first_wherever_the_base_has_it(tmp_path: Path) -> None:
    parts = parts_of(named_base(tmp_path / "base.gguf"))
    parts.keys[b"general.architecture"] = parts.keys.pop(b"general.architecture")
    (tmp_path / "base.gguf").write_bytes(parts.build())
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "base.gguf")
    after = contents((tmp_path / "m.gguf").read_bytes()).keys
    assert next(iter(after)) == b"general.architecture"
    assert parts.keys.items() - after.items() == {(b"general.name", parts.keys[b"general.name"])}


def test_alpha_is_the_rank_where_there_is_one(tmp_path: Path) -> None:
    of_norms = dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), 1)
    cases: tuple[tuple[dict[str, int], float], ...] = (({}, 2.0), (of_norms, 2.0), ({"attn_q": 3, **of_norms}, 0.0))
    for ranks, alpha in cases:
        model = Model(n_layer=1, ranks=ranks)
        with model.checkpoint(model.factors(), 0.5) as checkpoint:
            ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", force=True)
        assert field_value(tmp_path / "a.gguf", "adapter.lora.alpha") == alpha


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_everything_made_of_a_checkpoint_is_of_the_same_training(tmp_path: Path) -> None:
    def make(source: Path, target: str, to: str, **options: Any) -> Path:
        ggcl_fast.convert(source, tmp_path / target, to=to, **options)
        return tmp_path / target

    trained_gguf = make(TRAINED, "trained.gguf", "checkpoint")
    files = [
        make(TRAINED, "a.gguf", "adapter"),
        make(TRAINED, "half.gguf", "adapter", outtype="f16"),
        make(TRAINED, "part.gguf", "adapter", token_embd=False),
        make(TRAINED, "with.gguf", "adapter", base=BASE, base_out=tmp_path / "copy.gguf"),
        tmp_path / "copy.gguf",
        make(TRAINED, "m.gguf", "merged", base=BASE),
        make(trained_gguf, "of-gguf.gguf", "adapter"),
        make(trained_gguf, "m-gguf.gguf", "merged", base=BASE),
        make(tmp_path / "part.gguf", "again.gguf", "adapter"),
        make(tmp_path / "half.gguf", "once-more.gguf", "adapter", base=BASE),
        make(tmp_path / "half.gguf", "m-again.gguf", "merged", base=BASE),
    ]
    assert len({training(path) for path in files}) == 1
    with ggcl_fast.open_checkpoint(TRAINED) as checkpoint:
        assert about.fingerprint(checkpoint) == training(files[0])


def test_later_tokens_and_heads_do_not_change_the_training(tmp_path: Path) -> None:
    large = Model(**{**vars(MODEL), "n_vocab": MODEL.n_vocab + 3})
    large.write(tmp_path / "large.gguf")
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter")
        ggcl_fast.convert(checkpoint, tmp_path / "m.gguf", to="merged", base=tmp_path / "large.gguf")
    assert training(tmp_path / "a.gguf") == training(tmp_path / "m.gguf")
    rng = np.random.default_rng(0)
    records = [
        Record(f"blk.0.attn_q.weight.lora{end}".encode(), (2, 64), rng.normal(0, 1, (64, 2)).astype("f4").tobytes())
        for end in "AB"
    ]
    (tmp_path / "hf.ggla").write_bytes(ggla_bytes(records, rank=2, alpha=2))
    for target, options in (("1", {"heads": (4, 4)}), ("2", {"heads": (2, 2)}), ("3", {"rows": "gguf"})):
        ggcl_fast.convert(tmp_path / "hf.ggla", tmp_path / target, **options)
    assert len({training(tmp_path / target) for target in "123"}) == 1


def one_step_further(data: bytes) -> bytes:
    """Every value changes with a step; one is enough."""
    return put(data, places(data).records[1].data, "<f", 0.125)


def other_rank(_: bytes) -> bytes:
    return checkpoint_bytes(Shape(ranks={**Shape().ranks, "w2": 5}))


def other_values(_: bytes) -> bytes:
    return checkpoint_bytes(Shape(), seed=1)


@pytest.mark.parametrize("change", [one_step_further, other_rank, other_values])
def test_another_checkpoint_is_another_training(change: Callable[[bytes], bytes]) -> None:
    data = checkpoint_bytes(Shape())
    with ggcl_fast.open_checkpoint(data) as one, ggcl_fast.open_checkpoint(change(data)) as other:
        assert about.fingerprint(one) != about.fingerprint(other)


# --- not twice ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what can be made of `TRAINED` and `BASE`."""
    folder = tmp_path_factory.mktemp("made")
    ggcl_fast.convert(TRAINED, folder / "trained.gguf")
    ggcl_fast.convert(TRAINED, folder / "merged.gguf", to="merged", base=BASE)
    ggcl_fast.convert(TRAINED, folder / "a.gguf", to="adapter", base=BASE, base_out=folder / "copy.gguf")
    return folder


@pytest.mark.parametrize(
    ("source", "base", "to", "holds"),
    [
        ("trained.ggcl", "merged.gguf", "merged", "every delta"),
        ("trained.gguf", "merged.gguf", "merged", "every delta"),
        ("a.gguf", "merged.gguf", "merged", "every delta"),
        ("trained.ggcl", "merged.gguf", "adapter", "every delta"),
        ("trained.ggcl", "copy.gguf", "merged", "deltas of norms"),
        ("trained.ggcl", "copy.gguf", "adapter", "deltas of norms"),
        ("trained.gguf", "copy.gguf", "adapter", "deltas of norms"),
        ("trained.ggcl", "copy.gguf", "peft", "deltas of norms"),
    ],
)
def test_what_is_there_already_is_refused(
    source: str, base: str, to: str, holds: str, made: Path, tmp_path: Path
) -> None:  # fmt: skip
    path = TRAINED if source == TRAINED.name else made / source
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(path, tmp_path / "out", to=to, base=made / base)
    assert f"{base}: ggcl_fast.training: this model has {holds} of the same training already" in str(caught.value)
    assert "--force" in str(caught.value)
    assert os.listdir(tmp_path) == []
    ggcl_fast.convert(path, tmp_path / "out", to=to, base=made / base, force=True)
    assert os.listdir(tmp_path)


def test_force_adds_once_more(made: Path, tmp_path: Path) -> None:
    ggcl_fast.convert(TRAINED, tmp_path / "m.gguf", to="merged", base=made / "merged.gguf", force=True)
    base, once, twice = (read_gguf(path) for path in (BASE, made / "merged.gguf", tmp_path / "m.gguf"))
    for name, values in base.items():
        np.testing.assert_allclose(twice[name] - once[name], once[name] - values, atol=1e-2)
        assert is_norm(name) or np.abs(twice[name] - values).max() > 0


def test_an_adapter_is_merged_into_the_copy_with_its_norms(made: Path, tmp_path: Path) -> None:
    ggcl_fast.convert(made / "a.gguf", tmp_path / "m.gguf", to="merged", base=made / "copy.gguf")
    both, merged = read_gguf(tmp_path / "m.gguf"), read_gguf(made / "merged.gguf")
    assert list(both) == list(merged)
    for name in both:
        np.testing.assert_array_equal(both[name], merged[name])
    assert field_value(tmp_path / "m.gguf", "ggcl_fast.holds") == "every delta"
    assert training(tmp_path / "m.gguf") == training(made / "merged.gguf")
    with pytest.raises(CheckpointError, match="every delta of the same training already"):
        ggcl_fast.convert(made / "a.gguf", tmp_path / "out", to="merged", base=tmp_path / "m.gguf")


def test_another_training_is_added_to_a_merged_model(made: Path, tmp_path: Path) -> None:
    data = TRAINED.read_bytes()
    (tmp_path / "other.ggcl").write_bytes(one_step_further(data))
    for to in "merged", "adapter", "peft":
        ggcl_fast.convert(tmp_path / "other.ggcl", tmp_path / to, to=to, base=made / "merged.gguf")
    assert field_value(tmp_path / "merged", "general.base_model.0.name") == field_value(
        made / "merged.gguf", "general.name"
    )


def test_one_training_after_the_other_is_remembered(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other.ggcl").write_bytes(one_step_further(TRAINED.read_bytes()))
    ggcl_fast.convert(tmp_path / "other.ggcl", tmp_path / "both.gguf", to="merged", base=made / "merged.gguf")
    assert field_value(tmp_path / "both.gguf", "ggcl_fast.before") == training(made / "merged.gguf")
    for source in TRAINED, tmp_path / "other.ggcl", made / "a.gguf":
        for to in "merged", "adapter", "peft":
            with pytest.raises(CheckpointError, match="the same training already"):
                ggcl_fast.convert(source, tmp_path / "out", to=to, base=tmp_path / "both.gguf")
    ggcl_fast.convert(tmp_path / "other.ggcl", tmp_path / "b.gguf", to="adapter", base=made / "merged.gguf")
    copy = tmp_path / "merged-b.gguf"
    assert (training(copy), field_value(copy, "ggcl_fast.before")) == (
        training(tmp_path / "both.gguf"), training(made / "merged.gguf")
    )  # fmt: skip
    for source in TRAINED, made / "a.gguf", tmp_path / "other.ggcl":
        with pytest.raises(CheckpointError, match="the same training already"):
            ggcl_fast.convert(source, tmp_path / "out", to="merged", base=copy)
    ggcl_fast.convert(tmp_path / "b.gguf", tmp_path / "m.gguf", to="merged", base=copy)
    assert field_value(tmp_path / "m.gguf", "ggcl_fast.holds") == "every delta"


def test_norms_alone_are_remembered_as_such(made: Path, tmp_path: Path) -> None:
    source = DATA / "wild" / "peft-qkv.ggla"
    ggcl_fast.convert(source, tmp_path / "m.gguf", to="merged", base=made / "copy.gguf", rows="gguf")
    assert field_value(tmp_path / "m.gguf", "ggcl_fast.before") == training(made / "copy.gguf") + ":norms"
    with pytest.raises(CheckpointError, match="deltas of norms of the same training already"):
        ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "m.gguf")
    ggcl_fast.convert(made / "a.gguf", tmp_path / "all.gguf", to="merged", base=tmp_path / "m.gguf")
    assert field_value(tmp_path / "all.gguf", "ggcl_fast.holds") == "every delta"


def test_an_adapter_without_norms_upon_what_has_its_deltas_is_refused(tmp_path: Path) -> None:
    source, base = DATA / "wild" / "peft-qkv.ggla", DATA / "wild" / "peft-qkv-base.gguf"
    ggcl_fast.convert(source, tmp_path / "m.gguf", to="merged", base=base)
    with pytest.raises(CheckpointError, match="every delta of the same training already"):
        ggcl_fast.convert(source, tmp_path / "a.gguf", base=tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({}, "deltas, but none of norms,"),
        ({"token_embd": False}, "deltas, but none of norms and token_embd.weight,"),
    ],
)
def test_a_model_does_not_say_that_it_has_what_its_adapter_left_out(
    options: dict[str, Any], holds: str, tmp_path: Path
) -> None:
    ggcl_fast.convert(TRAINED, tmp_path / "a.gguf", to="adapter", **options)
    ggcl_fast.convert(tmp_path / "a.gguf", tmp_path / "half.gguf", outtype="f16")
    for name in "a.gguf", "half.gguf":
        ggcl_fast.convert(tmp_path / name, tmp_path / "m.gguf", to="merged", base=BASE, force=True)
        assert field_value(tmp_path / "m.gguf", "ggcl_fast.holds") == holds
        with pytest.raises(CheckpointError, match=f"this model has {holds} of the same training already"):
            ggcl_fast.convert(TRAINED, tmp_path / "out", to="merged", base=tmp_path / "m.gguf")


def adapter_of_others(path: Path, **keys: str | list[int]) -> Path:
    """Write a GGUF adapter as converters of today do; dots in the names of its keys are double underscores."""
    write_adapter(path, [made_pair("blk.0.attn_v", 64, 4, 64)], alpha=8.0)
    parts = parts_of(path)
    for name, value in keys.items():
        key = name.replace("__", ".").encode()
        if isinstance(value, str):
            parts.keys[key] = STRING, string(value)
        else:
            parts.keys[key] = ARRAY, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
    path.write_bytes(parts.build())
    return path


TELLS = {
    "general__name": "Mine", "general__base_model__0__name": "Llama 2", "general__base_model__0__organization": "Meta",
    "general__base_model__0__repo_url": f"https://huggingface.co/{ID}", "adapter__lora__task_name": "tests",
    "adapter__lora__prompt_prefix": "Q: ",
}  # fmt: skip


def test_what_an_adapter_tells_of_itself_is_told_on(tmp_path: Path) -> None:
    source = adapter_of_others(tmp_path / "in.gguf", **TELLS)
    ggcl_fast.convert(source, tmp_path / "a.gguf", outtype="f16")
    for name, value in TELLS.items():
        assert field_value(tmp_path / "a.gguf", name.replace("__", ".")) == value
    ggcl_fast.convert(source, tmp_path / "p", to="peft", heads=(4, 4))
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ID
    card = (tmp_path / "p" / "README.md").read_text()
    assert f'base_model: "{ID}"' in card
    assert "\n# Mine\n" in card
    ggcl_fast.convert(source, tmp_path / "b.gguf", name="Yours", base_model_id="other/model")
    assert said(tmp_path / "b.gguf")["general.name"] == "Yours"
    assert said(tmp_path / "b.gguf")["general.base_model.0.repo_url"] == "https://huggingface.co/other/model"


@pytest.mark.parametrize("url", ["https://example.com/a/b", "https://huggingface.co/a/b/c", "https://huggingface.co/"])
def test_other_addresses_are_no_id(url: str, tmp_path: Path) -> None:
    source = adapter_of_others(tmp_path / "in.gguf", general__base_model__0__repo_url=url)
    ggcl_fast.convert(source, tmp_path / "p", to="peft", heads=(4, 4))
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


@pytest.mark.parametrize("to", ["adapter", "merged", "peft"])
def test_an_activated_lora_becomes_nothing_else(to: str, tmp_path: Path) -> None:
    source = adapter_of_others(tmp_path / "in.gguf", adapter__alora__invocation_tokens=[1, 2])
    MODEL.write(tmp_path / "base.gguf")
    with pytest.raises(CheckpointError, match=r"activated LoRA.*found 2 tokens"):
        ggcl_fast.convert(source, tmp_path / "out", to=to, base=tmp_path / "base.gguf")


@pytest.mark.parametrize("model_id", ["", "a/", "/b", "a/b/c", "https://huggingface.co/a/b", "a b", "a/b\n"])
def test_what_is_no_id_is_refused(model_id: str) -> None:
    with pytest.raises(ValueError, match="--base-model-id"):
        Options(to="peft", base_model_id=model_id)


@pytest.mark.parametrize("what", ["no norms", "B is zero", "A is zero"])
def test_norms_that_nobody_trained_need_no_copy(what: str, tmp_path: Path) -> None:
    MODEL.write(tmp_path / "base.gguf")
    factors: dict[str, tuple[Floats, Floats]] = {}
    for name, (a, b) in MODEL.factors().items():
        if not is_norm(name):
            factors[name] = a, b
        elif what != "no norms":
            factors[name] = (a * 0, b) if what == "A is zero" else (a, b * 0)
    with MODEL.checkpoint(factors) as checkpoint:
        report = ggcl_fast.convert(checkpoint, tmp_path / "a.gguf", to="adapter", base=tmp_path / "base.gguf")
    assert report.extra_outputs == ()
    assert not any("norm" in note for note in report.notes)
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "base.gguf"]


# --- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True])
def test_a_folder_for_peft_names_its_base(with_base: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": BASE} if with_base else {}
    for name, model_id in (("told", ID), ("silent", None)):
        ggcl_fast.convert(TRAINED, tmp_path / name, to="peft", base_model_id=model_id, **options)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == model_id
        card = (tmp_path / name / "README.md").read_text().splitlines()
        front = card[: card.index("---", 1) + 1]
        assert front == [
            "---", "library_name: peft", *([f'base_model: "{ID}"'] if model_id else []), "---",
        ]  # fmt: skip
        (title,) = (line for line in card if line.startswith("# "))
        assert title.endswith("trained")
        assert f"converted by ggcl_fast {ggcl_fast.__version__} from `trained.ggcl`" in card[-1]
        assert sorted(os.listdir(tmp_path / name)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors")


def test_a_card_says_how_long_the_training_was(tmp_path: Path) -> None:
    data = TRAINED.read_bytes()
    (tmp_path / "long.ggcl").write_bytes(data[:8] + struct.pack("<I", 12345) + data[12:])
    ggcl_fast.convert(tmp_path / "long.ggcl", tmp_path / "peft", to="peft", name="My name")
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "\n# My name\n" in card
    assert card.endswith("from `long.ggcl` after 12,345 iterations.\n")


@pytest.mark.parametrize("name", ["a`<script>.ggcl", "![x](y)`.ggcl", "a\n# b\n---.ggcl", "*_[a]_*|\\.ggcl"])
def test_names_of_files_do_nothing_in_a_card(name: str, tmp_path: Path) -> None:
    shutil.copy(TRAINED, tmp_path / name)
    ggcl_fast.convert(tmp_path / name, tmp_path / "peft", to="peft")
    harmless_card((tmp_path / "peft" / "README.md").read_text(), None)


def harmless_card(card: str, model_id: str | None) -> None:
    lines = card.split("\n")
    front = [
        "---",
        "library_name: peft",
        *([f"base_model: {json.dumps(model_id)}"] if model_id is not None else []),
        "---",
        "",
    ]
    assert lines[: len(front)] == front
    title, empty, text, end = lines[len(front) :]
    assert (title[:2], empty, end) == ("# ", "", "")
    assert not set("`<>[]*|\\") & set(title[2:])
    assert text.count("`") == 2
    assert not set("<>[]*|\\") & set(text)
    assert card.encode().decode().replace("\n", "").isprintable()


@settings(deadline=None)
@given(
    name=st.text(st.characters(codec=None), max_size=30),
    model_id=st.none()
    | st.from_regex(r"[\w.-]{1,9}/[\w.-]{1,9}", fullmatch=True, alphabet=st.characters(codec="ascii")),
)
def test_no_name_does_anything_in_a_card(name: str, model_id: str | None) -> None:
    with MODEL.checkpoint(MODEL.factors()) as checkpoint:
        options = Options(to="peft", name=name, base_model_id=model_id)
        harmless_card(about.model_card(checkpoint, options, None), model_id)
