"""Files that end in zeros: told where nothing explains them, and not where a sound file has them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

import ggcl_fast
from ggcl_fast import CheckpointError
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

from ..adapters import Lora, adapter_bytes, foreign_ggla, made
from ..gguf_parts import converted, edited, parse
from ..hostile import places, with_optimizer, with_values
from ..models import Model, finish
from ..reference import DATA, FIXTURES, LATER_FIXTURES

TRAINED = (DATA / "trained.ggcl").read_bytes()
LATER = (DATA / "finetune-v1.gguf").read_bytes()
GGLA = (DATA / "trained.ggla").read_bytes()
LORA = (DATA / "wild" / "peft-all-f16-adapter.gguf").read_bytes()


LBFGS = (DATA / "lbfgs.ggcl").read_bytes()
QKV = (DATA / "wild" / "peft-qkv-adapter.gguf").read_bytes()
NOT_COUNTED = TRAINED[:8] + bytes(4) + TRAINED[12:]  # trained all the same: the iterations of L-BFGS never are

CUTS = [
    (TRAINED, 600), (TRAINED, 50_000), (LATER, 600), (LATER, 50_000), (GGLA, 600), (LORA, 600), (LORA, 20_000),
    (LBFGS, 50_000), (NOT_COUNTED, 2000), (converted(LBFGS), 390_000), (QKV, 12_288), (QKV, 11_264),
]  # fmt: skip


@pytest.mark.parametrize(("data", "n"), CUTS)
def test_an_unfinished_download_is_told_and_is_not_healthy(data: bytes, n: int) -> None:
    """Of a ggla file only what does not reach to the head of a record, which would be an error."""
    end = len(data.rstrip(b"\0")) - n
    with ggcl_fast.open_checkpoint(data[:end] + bytes(len(data) - end)) as checkpoint:
        assert checkpoint.zero_tail >= n
        assert f"the last {checkpoint.zero_tail:,} bytes are zeros" in checkpoint.warnings[-1]
        summary = ggcl_fast.summarise(checkpoint)
    assert summary.verdict == "incomplete"
    assert f"{checkpoint.zero_tail:,} bytes" in summary.reasons[0]


@pytest.mark.parametrize("name", [*FIXTURES, *LATER_FIXTURES[:-1], "wild/peft-qkv.ggla", "wild/peft-qkv-adapter.gguf"])
def test_real_files_end_in_something(name: str) -> None:
    with ggcl_fast.open_checkpoint(DATA / name) as checkpoint:
        assert checkpoint.zero_tail == 0


def test_what_was_never_trained_ends_in_zeros() -> None:
    early = with_optimizer("just_initialized", 1, TRAINED)  # no iteration yet: the moments are zero
    early = early[:-5000] + bytes(5000)
    filling = converted(LBFGS)  # whose memory is zero but for the first corrections
    filling = filling[:-50_000] + bytes(50_000)
    pairs = [made(f"blk.{i}.attn_v", 64, 4, 64) for i in range(3)]
    untrained = foreign_ggla([replace(pair, b=0 * pair.b) for pair in pairs], r=4, alpha=4)
    for data in (early, filling, untrained):
        with ggcl_fast.open_checkpoint(data) as checkpoint:
            assert checkpoint.zero_tail == 0
            assert checkpoint.warnings == ()


def test_zeros_in_the_middle_are_a_matter_of_values() -> None:
    data = checkpoint_bytes(Shape(ranks=dict.fromkeys(RANKS, 8)))
    record = places(data).records[5]
    with ggcl_fast.open_checkpoint(with_values(5, [0.0] * (record.nbytes // 4), data)) as checkpoint:
        assert checkpoint.zero_tail == 0


@pytest.mark.parametrize("data", [TRAINED, GGLA, LORA, LBFGS], ids=["ggcl", "ggla", "gguf", "lbfgs"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6])
def test_records_of_zeros_have_a_cause(data: bytes, share: float) -> None:
    """Whether it is an error or not depends on what the zeros hit; what is to be done is the same."""
    kept = data[: int(share * len(data))]
    try:
        with ggcl_fast.open_checkpoint(kept + bytes(len(data) - len(kept))) as checkpoint:
            assert checkpoint.zero_tail > 0
    except CheckpointError as error:
        assert "zeros follow, as a download leaves them" in str(error)  # noqa: PT017


def test_other_errors_keep_their_hints() -> None:
    for data in (
        TRAINED[:-4],
        TRAINED[: len(TRAINED) // 2],
        b"GGUF" + bytes(600),
        with_optimizer("version", 2, TRAINED),
    ):
        with pytest.raises(CheckpointError) as caught:
            ggcl_fast.open_checkpoint(data)
        assert ("zeros" in str(caught.value)) == data.endswith(bytes(600))


def zeroed(pair: Lora, rows: int) -> Lora:
    """Return `pair` with nothing in the last rows of B."""
    b = pair.b.copy()
    b[len(b) - rows :] = 0
    return replace(pair, b=b)


def sound_files(folder: Path) -> Iterator[bytes]:
    """Files that end in zeros because that is what they are to hold."""
    pairs = [made(f"blk.{i}.attn_v", 64, 4, 64) for i in range(3)]
    output, tokens = made("output", 64, 4, 512), made("token_embd", 64, 4, 512)
    for some in [*pairs[:2], zeroed(pairs[2], 64)], [*pairs, zeroed(output, 160)]:
        yield foreign_ggla(some, r=4, alpha=4)
        yield adapter_bytes(some)
    yield adapter_bytes([zeroed(tokens, 160)])
    reversed_tokens = parse(adapter_bytes([zeroed(tokens, 160)]))
    reversed_tokens.tensors = dict(reversed([*reversed_tokens.tensors.items()]))
    yield edited(reversed_tokens)
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_custom_alignment(4096)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    pair = made("blk.0.attn_v", 64, 5, 66)
    for end, values in ("a", pair.a), ("b", pair.b):
        writer.add_tensor(f"blk.0.attn_v.weight.lora_{end}", values)
    finish(writer, folder / "aligned.gguf")
    yield (folder / "aligned.gguf").read_bytes()
    yield converted(checkpoint_bytes(Shape(past=256)))
    model = Model(n_layer=1, n_vocab=448)
    model.write(folder / "base.gguf")
    (folder / "in.gguf").write_bytes(adapter_bytes([made("output", 64, 4, 288)]))
    ggcl_fast.convert(folder / "in.gguf", folder / "padded.gguf", base=folder / "base.gguf")
    yield (folder / "padded.gguf").read_bytes()


def test_sound_files_that_end_in_zeros_raise_no_alarm(tmp_path: Path) -> None:
    for i, data in enumerate(sound_files(tmp_path)):
        with ggcl_fast.open_checkpoint(data) as checkpoint:
            assert checkpoint.zero_tail == 0, i
            assert checkpoint.warnings == (), i
