"""Tensors as they are shown: against a reference that decodes element by element, for any range of bytes."""

import os
import random
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggcl_fast import CheckpointError, SourceChangedError
from ggcl_fast.formats.decoded import Decoded, EncodedTensor, can_decode, to_gguf_rows, to_hf_rows
from ggcl_fast.storage import sources
from ggcl_fast.storage.sources import WINDOW, Source, SourceBuffer, SourceFile, read_at

Type = gguf.GGMLQuantizationType
Floats = npt.NDArray[np.float32]

TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0)
BLOCK = 32


# --- the reference --------------------------------------------------------------------------------------------------


def stored(type: Type, n: int, rng: np.random.Generator) -> tuple[bytes, Floats]:
    """Return the bytes of `n` random values, and the values."""
    if type == Type.F32:
        data = rng.normal(0, 1, n).astype("<f4").tobytes()
        return data, np.frombuffer(data, "<f4")
    if type == Type.F16:
        data = rng.normal(0, 1, n).astype("<f2").tobytes()
        return data, np.array(struct.unpack(f"<{n}e", data), np.float32)
    if type == Type.BF16:
        words = rng.normal(0, 1, n).astype("<f4").view("<u4") >> 16
        return words.astype("<u2").tobytes(), (words << 16).view(np.float32)
    blocks, values = [], np.empty((n // BLOCK, BLOCK), np.float32)
    for row in values:
        scale = np.float16(rng.normal())
        quants = rng.integers(0, 256, 32 if type == Type.Q8_0 else 16, np.uint8)
        blocks.append(scale.tobytes() + quants.tobytes())
        signed = quants.view(np.int8) if type == Type.Q8_0 else np.concatenate([quants % 16, quants // 16]) - 8.0
        row[:] = np.float32(scale) * signed.astype(np.float32)
    return b"".join(blocks), values.reshape(-1)


def interleaved(rows: Floats, n_head: int) -> Floats:
    """Return rows in GGUF's order: head by head, one of the first half, one of the second."""
    d = len(rows) // n_head
    order = [head * d + half * (d // 2) + i for head in range(n_head) for i in range(d // 2) for half in (0, 1)]
    return rows[order]


def as_shown(values: Floats, tensor: EncodedTensor) -> bytes:
    matrix = values.reshape(tensor.shape)
    if tensor.is_transposed:
        matrix = matrix.T
    if tensor.n_head:
        matrix = interleaved(matrix, tensor.n_head)
    rows = b"".join(row.astype("<f4").tobytes() for row in matrix)
    return rows + bytes(max(0, tensor.n_rows - len(matrix)) * matrix.shape[1] * 4)


class Made(NamedTuple):
    """A source, what is in it, and what is to be shown of it."""

    data: bytes
    tensors: list[EncodedTensor]
    shown: bytes

    def decoded(self) -> Decoded:
        return Decoded(SourceBuffer(self.data, "made"), self.tensors)


Kind = tuple[Type, int, int, int, bool, int]  # type, heads, rows and columns as they are shown, transposed, more rows


def made(kinds: list[Kind], seed: int = 0) -> Made:
    """Make tensors that stand in the source in another order than they are shown."""
    rng = np.random.default_rng(seed)
    placed: list[tuple[int, EncodedTensor, bytes]] = []
    data = b"odd"
    for i in rng.permutation(len(kinds)).tolist():
        type, n_head, n_rows, n_columns, is_transposed, more = kinds[i]
        shape = (n_columns, n_rows) if is_transposed else (n_rows, n_columns)
        encoded, values = stored(type, n_rows * n_columns, rng)
        tensor = EncodedTensor(
            len(data), len(encoded), type, shape, is_transposed, n_head, (n_rows + more) * (more > 0)
        )
        placed.append((i, tensor, as_shown(values, tensor)))
        data += encoded + bytes(rng.integers(1, 256, int(rng.integers(0, 5)), np.uint8))
    placed.sort()
    shown = b""
    for _, _, one in placed:
        shown += bytes(-len(shown) % 32) + one
    return Made(data, [tensor for _, tensor, _ in placed], shown)


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    type = draw(st.sampled_from(TYPES))
    is_transposed = draw(st.booleans())
    n_head = draw(st.sampled_from([0, 0, 1, 2, 3]))
    n_rows = 2 * n_head * draw(st.integers(1, 4)) if n_head else draw(st.integers(1, 9))
    n_columns = draw(st.integers(1, 9))
    if type in (Type.Q8_0, Type.Q4_0):  # rows as they are stored are of whole blocks
        if is_transposed:
            n_rows = BLOCK * max(1, n_head)
        else:
            n_columns = BLOCK * draw(st.integers(1, 2))
    return type, n_head, n_rows, n_columns, is_transposed, draw(st.sampled_from([0, 0, 1, 5]))


ALL = [
    (type, n_head, 64, 32, is_transposed, more)
    for type in TYPES
    for n_head, is_transposed, more in ((0, False, 0), (0, True, 0), (2, False, 0), (4, True, 3), (0, False, 2))
]


# --- what is shown --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(some=st.lists(kinds(), max_size=5), seed=st.integers(0, 2**32 - 1), rng=st.randoms(use_true_random=False))
def test_any_range_is_what_the_reference_has(some: list[Kind], seed: int, rng: random.Random) -> None:
    file = made(some, seed)
    source = file.decoded()
    assert source.size == len(file.shown)
    borders = [0, source.size, *source.offsets, *source._stops]
    for _ in range(20):
        ends = [
            rng.choice(borders) + rng.randrange(-5, 6) if rng.random() < 0.5 else rng.randrange(source.size + 1)
            for _ in range(2)
        ]
        start, stop = sorted(min(max(0, end), source.size) for end in ends)
        buffer = bytearray(b"\xee" * (stop - start + 2))
        source.read_into(start, memoryview(buffer)[1:-1])
        assert buffer[1:-1] == file.shown[start:stop]
        assert buffer[:1] + buffer[-1:] == b"\xee\xee"
        assert read_at(source, start, stop - start + 1) == file.shown[start : stop + 1]
    assert source.map() == file.shown


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 32, 100, 4095, 8192])
def test_steps_of_any_length_give_the_whole(n: int) -> None:
    file = made(ALL[::3])
    source = file.decoded()
    shown = b"".join(bytes(read_at(source, at, n)) for at in range(0, min(source.size, 2000 * n), n))
    assert shown == file.shown[: 2000 * n]


def test_windows_and_maps_are_of_what_is_shown() -> None:
    file = made(ALL)
    source: Source = file.decoded()
    for offset in (0, 4, 8192, source.size - 8, source.size):
        start, window = source.window(offset)
        assert start == offset
        assert window == file.shown[offset : offset + WINDOW]
    whole = source.map()
    assert whole == file.shown
    assert whole.readonly
    assert source.map() is whole
    source.prefetch([0, 4096])


def test_each_tensor_begins_at_a_multiple_of_32_and_gaps_are_zero() -> None:
    file = made([(Type.F16, 0, 1, 1, False, 0), (Type.F32, 0, 3, 3, True, 0), (Type.BF16, 0, 1, 9, False, 0)])
    source = file.decoded()
    assert source.offsets == [0, 32, 96]
    assert [tensor.shown for tensor in file.tensors] == [4, 36, 36]
    assert source.size == 132
    for start, stop in ((4, 32), (5, 31), (68, 96), (95, 96)):
        buffer = bytearray(b"\xee" * (stop - start))
        source.read_into(start, memoryview(buffer))
        assert not any(buffer)


def test_of_nothing_nothing_is_shown() -> None:
    source = Decoded(SourceBuffer(b"junk"), [])
    assert (source.size, source.file_size, source.offsets) == (0, 4, [])
    assert bytes(source.map()) == bytes(read_at(source, 0, 10)) == b""


def test_halves_are_exact() -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    data = bits.tobytes()
    tensors = [EncodedTensor(0, len(data), type, (256, 256)) for type in (Type.F16, Type.BF16)]
    shown = Decoded(SourceBuffer(data), tensors).map()
    halves, bfloats = (shown[at : at + (1 << 18)] for at in (0, 1 << 18))
    expected = np.array(struct.unpack(f"<{1 << 16}e", data), np.float32)
    np.testing.assert_array_equal(np.frombuffer(halves, "<f4"), expected)
    assert (np.signbit(np.frombuffer(halves, "<f4")) == (bits >= 1 << 15)).all()
    assert (np.frombuffer(bfloats, "<u4") == bits.astype(np.uint32) << 16).all()


INFINITE = {
    Type.F32: struct.pack("<f", np.inf) * BLOCK, Type.F16: b"\x00\x7c" * BLOCK, Type.BF16: b"\x80\x7f" * BLOCK,
    Type.Q8_0: b"\x00\x7c" + bytes(BLOCK), Type.Q4_0: b"\x00\x7c" + b"\x88" * (BLOCK // 2),
}  # fmt: skip


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_is_not_finite_is_shown_without_a_word(type: Type, is_transposed: bool) -> None:
    """Blocks have a scale, and an infinite one times zero is an invalid operation for numpy."""
    data = INFINITE[type]
    source = Decoded(SourceBuffer(data), [EncodedTensor(0, len(data), type, (1, BLOCK), is_transposed)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = np.frombuffer(source.map(), "<f4")
    assert not np.isfinite(shown).any()


def test_what_gguf_cannot_decode_is_known() -> None:
    assert all(map(can_decode, TYPES))
    assert can_decode(Type.Q4_K)
    assert not can_decode(Type.I8)


def test_threads_get_the_right_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", -1)
    file = made(ALL)
    (tmp_path / "a").write_bytes(file.data)
    source = Decoded(SourceFile(tmp_path / "a"), file.tensors)
    wrong: list[Any] = []
    begin = threading.Barrier(8)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        begin.wait()
        try:
            for _ in range(150):
                start = rng.randrange(source.size)
                nbytes = rng.choice([3, 4, 1000, 4096, 20_000])
                if read_at(source, start, nbytes) != file.shown[start : start + nbytes]:
                    wrong.append((start, nbytes))
            if source.map() != file.shown:
                wrong.append("map")
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert wrong == []


# --- the source behind it -------------------------------------------------------------------------------------------


def test_it_goes_by_the_name_of_its_source(tmp_path: Path) -> None:
    file = made(ALL[:3])
    (tmp_path / "a").write_bytes(file.data)
    behind = SourceFile(tmp_path / "a")
    source: Source = Decoded(behind, file.tensors)
    assert (source.name, source.identity, source.far) == (str(tmp_path / "a"), behind.identity, False)
    assert source.memory is None
    assert (source.file_size, source.size) == (len(file.data), len(file.shown))
    behind.close()
    behind.far = True
    assert Decoded(behind, []).far


def test_it_is_closed_with_its_source(tmp_path: Path) -> None:
    file = made(ALL)
    (tmp_path / "a").write_bytes(file.data)
    behind = SourceFile(tmp_path / "a")
    source = Decoded(behind, file.tensors)
    whole, window = source.map(), source.window(0)[1]
    last = read_at(source, source.offsets[-1], 10)
    assert not source.closed
    source.close()
    source.close()
    assert source.closed
    assert behind.closed
    assert whole == file.shown
    assert window == file.shown[:WINDOW]
    assert last == file.shown[source.offsets[-1] :][:10]
    for offset in source.offsets:
        with pytest.raises(CheckpointError, match="the checkpoint is closed"):
            read_at(source, offset, 10)
    for use in (source.map, source.check_unchanged):
        with pytest.raises(CheckpointError, match="the checkpoint is closed"):
            use()
    other = Decoded(SourceFile(tmp_path / "a"), [])
    other._source.close()
    assert other.closed


CHANGES: dict[str, Callable[[Path], object]] = {
    "shortened": lambda path: os.truncate(path, 10),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "written": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_its_source_is_told(change: Callable[[Path], object], tmp_path: Path) -> None:
    file = made(ALL[:2])
    path = tmp_path / "a"
    path.write_bytes(file.data)
    source = Decoded(SourceFile(path), file.tensors)
    source.check_unchanged()
    change(path)
    with pytest.raises(SourceChangedError, match="a: the file changed while it was read"):
        source.check_unchanged()
    source.close()


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in windows"])
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind[0].name}-{kind[1]}-{kind[4]}-{kind[5]}")
def test_a_source_that_was_shortened_is_an_error(
    kind: Kind, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    file = made([kind])
    path = tmp_path / "a"
    path.write_bytes(file.data)
    source = Decoded(SourceFile(path), file.tensors)
    os.truncate(path, 100)
    for offset, nbytes in ((4000, 16), (4001, 3), (0, source.size)):
        with pytest.raises(SourceChangedError, match="the file changed while it was read"):
            read_at(source, offset, nbytes)
    with pytest.raises(SourceChangedError, match="the file changed while it was read"):
        source.map()
    source.close()


# --- rows of heads --------------------------------------------------------------------------------------------------


@given(n_head=st.integers(1, 6), half=st.integers(1, 6), n=st.integers(1, 5), is_transposed=st.booleans())
def test_rows_are_reordered_head_by_head_and_back(n_head: int, half: int, n: int, is_transposed: bool) -> None:
    n_rows = 2 * half * n_head
    values = np.arange(n_rows * n, dtype=np.float32)
    rows = values.reshape(n, n_rows).T if is_transposed else values.reshape(n_rows, n)
    expected = np.empty_like(rows)
    for head in range(n_head):
        for i in range(half):
            expected[head * 2 * half + 2 * i] = rows[head * 2 * half + i]
            expected[head * 2 * half + 2 * i + 1] = rows[head * 2 * half + half + i]
    np.testing.assert_array_equal(to_gguf_rows(rows, n_head), expected)
    np.testing.assert_array_equal(to_hf_rows(expected, n_head), rows)
    np.testing.assert_array_equal(to_gguf_rows(to_hf_rows(rows, n_head), n_head), rows)
    assert to_gguf_rows(rows, n_head).flags.c_contiguous
    assert to_hf_rows(rows, n_head).flags.c_contiguous


def test_the_order_is_that_of_the_converter_of_llama_cpp() -> None:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    rows = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    for n_head in (1, 2, 3, 4, 6):
        permuted = rows.reshape(n_head, 2, len(rows) // n_head // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        np.testing.assert_array_equal(to_gguf_rows(rows, n_head), permuted)
