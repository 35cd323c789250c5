"""Adapters that others wrote, by every route, against the log-probabilities that PEFT computes with the originals.

The files are what convert-lora-to-ggml.py and today's converter made of two PEFT adapters; see tests/data/wild.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast.targets.peft import MODULE_NAMES

from ..adapters import foreign_ggla, made
from ..models import Type, read_gguf
from ..reference import DATA
from .test_clients import GROUPED, first_token, llama, llama_cpp, needs_llama_cpp, with_peft
from .test_clients import distance as apart

WILD = DATA / "wild"
EXPECTED: dict[str, Any] = json.loads((WILD / "expected-peft.json").read_text())
NAMES = sorted(EXPECTED)
SOURCES = pytest.mark.parametrize("source", [f"{name}{end}" for name in NAMES for end in (".ggla", "-adapter.gguf")])
TOLERANCE = 0.02
LIKELY = -12.0

pytestmark = pytest.mark.filterwarnings("default")  # what other people's packages warn of is not ours


def name_of(source: str) -> str:
    return next(name for name in NAMES if source.startswith(name))


def distance(found: dict[int, float], expected: list[float]) -> float:
    """Largest difference from PEFT's log-probabilities, over its likely tokens."""
    return max(abs(found[token] - value) for token, value in enumerate(expected) if value > LIKELY)


def ask(name: str, *files: Path) -> dict[int, float]:
    case = EXPECTED[name]
    return llama_cpp(*files, prompt=case["prompt_ids"], n_vocab=len(case["logprobs_peft"]))


@needs_llama_cpp
@pytest.mark.parametrize("name", NAMES)
def test_the_adapters_matter(name: str) -> None:
    """Or every other test here could pass by chance."""
    base = WILD / f"{name}-base.gguf"
    assert distance(ask(name, base), EXPECTED[name]["logprobs_base"]) < TOLERANCE
    assert distance(ask(name, base), EXPECTED[name]["logprobs_peft"]) > 1


@needs_llama_cpp
@SOURCES
def test_an_adapter_upon_its_base(source: str, tmp_path: Path) -> None:
    name, out = name_of(source), tmp_path / "out.gguf"
    base = WILD / f"{name}-base.gguf"
    report = ggcl_fast.convert(WILD / source, out, to="adapter", base=base)
    assert report.extra_outputs == ()  # no norm was trained
    assert distance(ask(name, base, out), EXPECTED[name]["logprobs_peft"]) < TOLERANCE


@needs_llama_cpp
@SOURCES
def test_a_merged_model(source: str, tmp_path: Path) -> None:
    name, out = name_of(source), tmp_path / "out.gguf"
    ggcl_fast.convert(WILD / source, out, to="merged", base=WILD / f"{name}-base.gguf")
    assert distance(ask(name, out), EXPECTED[name]["logprobs_peft"]) < TOLERANCE


@needs_llama_cpp
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_made_of_an_adapter_is_merged_alike(name: str, tmp_path: Path) -> None:
    """From the old form to the new one without a base model, with halves, and then into the base."""
    base = WILD / f"{name}-base.gguf"
    ggcl_fast.convert(WILD / f"{name}.ggla", tmp_path / "a.gguf", to="adapter", heads=(4, 4), outtype="f16")
    ggcl_fast.convert(tmp_path / "a.gguf", tmp_path / "merged.gguf", to="merged", base=base)
    assert distance(ask(name, tmp_path / "merged.gguf"), EXPECTED[name]["logprobs_peft"]) < TOLERANCE


@needs_llama_cpp
def test_rows_as_they_stand_are_what_llama_cpp_of_2023_computed(tmp_path: Path) -> None:
    base, out = WILD / "peft-qkv-base.gguf", tmp_path / "out.gguf"
    report = ggcl_fast.convert(WILD / "peft-qkv.ggla", out, to="adapter", base=base, rows="gguf")
    assert "as they stand" in report.notes[0]
    assert distance(ask("peft-qkv", base, out), EXPECTED["peft-qkv"]["logprobs_peft"]) > 1


@SOURCES
def test_peft_computes_what_it_computed_with_the_original(
    source: str,
    hugging_face: tuple[Any, Any, Any],
    tmp_path: Path,
) -> None:
    name = name_of(source)
    heads = None if source.endswith("ggla") else (4, 4)  # rows of the one are as they go
    ggcl_fast.convert(WILD / source, tmp_path / "lora", to="peft", heads=heads)
    found = with_peft(hugging_face, WILD / f"{name}-base.gguf", tmp_path / "lora", EXPECTED[name]["prompt_ids"])
    assert distance(found, EXPECTED[name]["logprobs_peft"]) < 1e-4


@needs_llama_cpp
@pytest.mark.parametrize(("rank", "type"), [(1, Type.F32), (3, Type.F16), (5, Type.F16), (8, Type.F32)])
def test_grouped_heads_halves_and_odd_ranks(
    rank: int, type: Type, hugging_face: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    """Against transformers with the deltas in its weights, added here."""
    base, torch = tmp_path / "base.gguf", hugging_face[1]
    GROUPED.write(base, tokenizer=True)
    model = llama(hugging_face, base)
    shapes = {name: values.shape for name, values in read_gguf(base).items() if name.startswith("blk.")}
    loras = [
        made(name.removesuffix(".weight"), shape[1], rank, shape[0], (type, Type.F32), seed=i)
        for i, (name, shape) in enumerate(shapes.items())
        if len(shape) == 2
    ]
    (tmp_path / "in.ggla").write_bytes(foreign_ggla(loras, r=rank, alpha=2 * rank))
    with torch.no_grad():
        for lora in loras:
            module = model.get_submodule(MODULE_NAMES[lora.module].format(lora.layer))
            module.weight += torch.from_numpy(lora.delta(2.0).astype(np.float32))
    expected = first_token(hugging_face, model)
    assert apart(first_token(hugging_face, llama(hugging_face, base)), expected) > 0.1
    for to in ("adapter", "merged", "peft"):
        ggcl_fast.convert(tmp_path / "in.ggla", tmp_path / to, to=to, base=base)
    ggcl_fast.convert(tmp_path / "adapter", tmp_path / "again", to="merged", base=base)
    assert apart(llama_cpp(base, tmp_path / "adapter", exact=True), expected) < 1e-3
    assert apart(llama_cpp(tmp_path / "merged", exact=True), expected) < 1e-3
    assert apart(llama_cpp(tmp_path / "again", exact=True), expected) < 1e-3
    assert apart(with_peft(hugging_face, base, tmp_path / "peft"), expected) < 1e-4


def test_a_folder_with_an_id_finds_its_base_by_itself(hugging_face: tuple[Any, Any, Any], tmp_path: Path) -> None:
    peft = hugging_face[0]
    base, case = WILD / "peft-qkv-base.gguf", EXPECTED["peft-qkv"]
    llama(hugging_face, base).save_pretrained(tmp_path / "base")
    ggcl_fast.convert(WILD / "peft-qkv.ggla", tmp_path / "lora", to="peft", base_model_id=str(tmp_path / "base"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert distance(first_token(hugging_face, model.eval(), case["prompt_ids"]), case["logprobs_peft"]) < 1e-4
