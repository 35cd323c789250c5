"""The programs that load what is written: what they compute is what training computed.

llama.cpp comes as the wheel ``xllamacpp`` with the extra ``test``; PEFT, transformers and torch with ``clients``.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import ggcl_fast
from ggcl_fast.targets.peft import MODULE_NAMES

from ..models import BASE, Model, Type, delta, read_gguf
from ..reference import DATA

TRAINED = DATA / "trained.ggcl"
EXPECTED = json.loads((DATA / "expected.json").read_text())["llama_cpp"]
TOP = {name: dict(case["top"]) for name, case in EXPECTED["first_token_top_logprobs"].items()}
ALONE, ADAPTER, PATCHED, MERGED = TOP
PROMPT: str = EXPECTED["request"]["prompt"]
# llama.cpp puts a space before, writes U+2581 for spaces, and falls back to bytes, of which token 3 is the first.
TOKENS = [1, *(3 + byte for byte in (" " + PROMPT).replace(" ", "\u2581").encode())]
N_VOCAB = 288

needs_llama_cpp = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import xllamacpp"], capture_output=True, check=False).returncode != 0,
    reason="xllamacpp (llama.cpp) is not installed: pip install xllamacpp",
)

_ASK = """
import json, sys
import xllamacpp
model, adapters, request, exact = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = model, request.pop("n_ctx"), 1, 0
params.warmup, params.verbosity = False, -1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
if exact:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
answer = xllamacpp.Server(params).handle_completions(request)
if isinstance(answer, (str, bytes)):
    answer = json.loads(answer)
if answer["choices"][0]["logprobs"] is None:
    sys.exit(f"no log-probabilities: {answer}")
tops = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("\\n" + json.dumps({top["id"]: top["logprob"] for top in tops}))
"""


def llama_cpp(
    model: Path, *adapters: Path, exact: bool = False, prompt: str | list[int] = PROMPT, n_vocab: int = N_VOCAB
) -> dict[int, float]:
    """Log-probabilities of the first token after the prompt, by llama.cpp in a process of its own: it may abort.

    Its attention computes with F16, which costs the third digit of unlikely tokens; not so if `exact`.
    """
    request = EXPECTED["request"] | {"prompt": prompt, "n_probs": n_vocab}
    arguments = json.dumps([str(model), [str(adapter) for adapter in adapters], request, exact])
    done = subprocess.run([sys.executable, "-c", _ASK, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(token): value for token, value in json.loads(done.stdout.splitlines()[-1]).items()}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Largest difference of two distributions' log-probabilities, over their likely tokens."""
    likely = [token for token in one if max(one[token], other[token]) > -8]
    return max(abs(one[token] - other[token]) for token in likely)


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything made from trained.ggcl."""
    folder = tmp_path_factory.mktemp("made")
    ggcl_fast.convert(TRAINED, folder / "adapter.gguf", to="adapter", base=BASE, base_out=folder / "patched.gguf")
    ggcl_fast.convert(TRAINED, folder / "merged.gguf", to="merged", base=BASE)
    for outtype in ("f16", "bf16"):
        ggcl_fast.convert(TRAINED, folder / f"{outtype}.gguf", to="adapter", outtype=outtype)
    return folder


@needs_llama_cpp
@pytest.mark.parametrize(
    ("case", "files"),
    [
        (ALONE, [str(BASE)]),
        (ADAPTER, [str(BASE), "adapter.gguf"]),
        (PATCHED, ["patched.gguf", "adapter.gguf"]),
        (MERGED, ["merged.gguf"]),
    ],
)
def test_llama_cpp_computes_what_is_expected(case: str, files: list[str], made: Path) -> None:
    found = llama_cpp(*(made / file for file in files))
    for token, expected in TOP[case].items():
        assert found[token] == pytest.approx(expected, abs=1e-3)


@needs_llama_cpp
@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 0.01), ("bf16", 0.05)])
def test_llama_cpp_loads_shorter_floats(outtype: str, tolerance: float, made: Path) -> None:
    whole = llama_cpp(made / "patched.gguf", made / "adapter.gguf")
    assert distance(whole, llama_cpp(made / "patched.gguf", made / f"{outtype}.gguf")) < tolerance


@needs_llama_cpp
@pytest.mark.parametrize(
    ("checkpoint", "adapter"), [("trained.ggcl", "trained.ggla"), ("finetune-v1.gguf", "finetune-v1.ggla")]
)
def test_a_checkpoint_and_the_adapter_beside_it_behave_alike(checkpoint: str, adapter: str, tmp_path: Path) -> None:
    found = []
    for name in (checkpoint, adapter):
        out = tmp_path / name / "lora.gguf"
        out.parent.mkdir()
        report = ggcl_fast.convert(DATA / name, out, to="adapter", base=BASE)
        found.append((llama_cpp(BASE, out), llama_cpp(Path(report.extra_outputs[0]), out)))
    (alone, whole), (other_alone, other_whole) = found
    assert distance(alone, other_alone) < 1e-3
    assert distance(whole, other_whole) < 1e-3
    assert distance(alone, whole) > 0.1  # the norms matter


def requantized(folder: Path, kind: Type) -> tuple[Path, Path]:
    """base.gguf in the type `kind`, and a base of the values that this has, in F32."""
    model = Model(n_head=4, n_head_kv=4, head_dim=16, n_ff=192, kind=kind)
    stored = model.write(folder / "base.gguf", read_gguf(BASE), tokenizer=True)
    replace(model, kind=Type.F32).write(folder / "same.gguf", stored, tokenizer=True)
    return folder / "base.gguf", folder / "same.gguf"


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "merged_tolerance"), [(Type.F16, 0.02), (Type.Q8_0, 0.1), (Type.Q4_0, 3.0)])
def test_quantized_bases_stay_what_they_are(kind: Type, merged_tolerance: float, tmp_path: Path) -> None:
    """An adapter upon the quantized base is as near to the truth as quantized arithmetic; merging rounds."""
    base, same = requantized(tmp_path, kind)
    ggcl_fast.convert(TRAINED, tmp_path / "a.gguf", to="adapter", base=base)
    ggcl_fast.convert(TRAINED, tmp_path / "true.gguf", to="merged", base=same)
    ggcl_fast.convert(TRAINED, tmp_path / "merged.gguf", to="merged", base=base)
    true = llama_cpp(tmp_path / "true.gguf")
    with_adapter = llama_cpp(tmp_path / "base-a.gguf", tmp_path / "a.gguf")
    merged = llama_cpp(tmp_path / "merged.gguf")
    assert distance(true, with_adapter) < 0.1
    assert distance(true, merged) < merged_tolerance


@needs_llama_cpp
def test_a_tied_model_is_merged_as_if_it_had_two_weights(tmp_path: Path) -> None:
    weights = read_gguf(BASE)
    model = Model(n_head=4, n_head_kv=4, head_dim=16, n_ff=192)
    weights["output.weight"] = weights["token_embd.weight"]
    model.write(tmp_path / "two.gguf", weights, tokenizer=True)
    del weights["output.weight"]
    model.write(tmp_path / "one.gguf", weights, tokenizer=True)
    for name in ("one", "two"):
        ggcl_fast.convert(TRAINED, tmp_path / f"{name}-m.gguf", to="merged", base=tmp_path / f"{name}.gguf")
    merged = llama_cpp(tmp_path / "one-m.gguf")
    assert distance(merged, llama_cpp(tmp_path / "two-m.gguf")) < 1e-3
    ggcl_fast.convert(
        TRAINED, tmp_path / "a.gguf", to="adapter", base=tmp_path / "one.gguf", token_embd=False,
        base_out=tmp_path / "patched.gguf",
    )  # fmt: skip
    assert distance(merged, llama_cpp(tmp_path / "patched.gguf", tmp_path / "a.gguf")) > 0.1  # loads, and falls short


GROUPED = Model(n_head=4, n_head_kv=2, head_dim=16, n_ff=96, ranks={"attn_k": 5, "ffn_down": 1, "output": 3})


@pytest.fixture(scope="module", params=[1.0, 0.5])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A model with fewer heads of keys and values, mixed ranks and a scale: everything made for it, in a folder."""
    folder = tmp_path_factory.mktemp("grouped")
    base = folder / "base.gguf"
    GROUPED.write(base, tokenizer=True)
    with GROUPED.checkpoint(GROUPED.factors(), request.param) as checkpoint:
        ggcl_fast.convert(checkpoint, folder / "a.gguf", to="adapter", base=base, base_out=folder / "patched.gguf")
        ggcl_fast.convert(checkpoint, folder / "merged.gguf", to="merged", base=base)
        ggcl_fast.convert(checkpoint, folder / "peft", to="peft", base=base)
    return folder, request.param


@needs_llama_cpp
def test_adapter_and_merged_model_agree_with_grouped_heads(grouped: tuple[Path, float]) -> None:
    folder, _ = grouped
    merged = llama_cpp(folder / "merged.gguf")
    assert distance(merged, llama_cpp(folder / "patched.gguf", folder / "a.gguf")) < 1e-3
    assert distance(merged, llama_cpp(folder / "base.gguf")) > 0.1


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def to_hugging_face(rows: npt.NDArray[np.float32], n_head: int) -> npt.NDArray[np.float32]:
    """Rows of q and k in Hugging Face's order: of each head the even ones, then the odd ones."""
    heads = np.split(rows, n_head)
    return np.concatenate([half for head in heads for half in (head[0::2], head[1::2])])


def llama(modules: tuple[Any, Any, Any], path: Path) -> Any:
    """A transformers model with the weights of the GGUF model `path`."""
    _, torch, transformers = modules
    fields = gguf.GGUFReader(path).fields

    def key(name: str) -> Any:
        return fields[f"llama.{name}"].contents()

    heads = {"attn_q": key("attention.head_count"), "attn_k": key("attention.head_count_kv")}
    config = transformers.LlamaConfig(
        vocab_size=len(read_gguf(path)["token_embd.weight"]), hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"), num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"], rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {}
    for name, values in read_gguf(path).items():
        last, layer = name.split(".")[-2], name.split(".")[1]
        rows = to_hugging_face(values, heads[last]) if last in heads else np.array(values)
        state[f"{MODULE_NAMES[last].format(layer)}.weight"] = torch.from_numpy(rows)
    model.load_state_dict(state, strict=True)
    return model


def first_token(modules: tuple[Any, Any, Any], model: Any, tokens: list[int] = TOKENS) -> dict[int, float]:
    """Log-probabilities of the first token after the prompt."""
    torch = modules[1]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
    return dict(enumerate(torch.log_softmax(logits, -1).tolist()))


def with_peft(modules: tuple[Any, Any, Any], path: Path, folder: Path, tokens: list[int] = TOKENS) -> dict[int, float]:
    return first_token(modules, modules[0].PeftModel.from_pretrained(llama(modules, path), str(folder)), tokens)


pytestmark = pytest.mark.filterwarnings("default")  # what other people's packages warn of is not ours


@pytest.mark.parametrize(("case", "base"), [(ALONE, None), (ADAPTER, None), (PATCHED, BASE)])
def test_peft_computes_what_llama_cpp_does(
    case: str, base: Path | None, hugging_face: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    if case == ALONE:
        found = first_token(hugging_face, llama(hugging_face, BASE))
    else:
        ggcl_fast.convert(TRAINED, tmp_path / "peft", to="peft", base=base)
        found = with_peft(hugging_face, BASE, tmp_path / "peft")
    for token, expected in TOP[case].items():
        assert found[token] == pytest.approx(expected, abs=2e-3)  # F16 in llama.cpp's attention


@needs_llama_cpp
def test_peft_and_llama_cpp_agree_in_float32(hugging_face: tuple[Any, Any, Any], made: Path, tmp_path: Path) -> None:
    ggcl_fast.convert(TRAINED, tmp_path / "peft", to="peft", base=BASE)
    found = llama_cpp(made / "patched.gguf", made / "adapter.gguf", exact=True)
    assert distance(with_peft(hugging_face, BASE, tmp_path / "peft"), found) < 1e-4


def test_peft_agrees_with_the_merged_model_with_grouped_heads(
    grouped: tuple[Path, float], hugging_face: tuple[Any, Any, Any]
) -> None:
    folder, scale = grouped
    found = with_peft(hugging_face, folder / "base.gguf", folder / "peft")
    merged = first_token(hugging_face, llama(hugging_face, folder / "merged.gguf"))
    assert distance(found, merged) < 1e-3
    for name, values in read_gguf(folder / "merged.gguf").items():
        base = GROUPED.weights()[name]
        np.testing.assert_allclose(values, base + delta(*GROUPED.factors()[name], scale), atol=1e-6)
