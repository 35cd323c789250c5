"""The reader of GGUF headers: against gguf's own, against lies, and within its bounds."""

import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggcl_fast import CheckpointError, NotACheckpointError, TruncatedError
from ggcl_fast.formats import cursor
from ggcl_fast.formats.gguf_header import GGUFHeader, read_header
from ggcl_fast.storage import sources
from ggcl_fast.storage.sources import Source, SourceBuffer, SourceFile

from ..gguf_parts import ARRAY, STRING, Parts, Tensor, edited, string
from ..hostile import Hostile
from ..hostile_gguf import HEADERS, PARTS, SOUND
from ..models import finish
from ..mutations import CONSTANT, GUARDED, MEMORY, within_bounds
from ..reference import DATA

V = gguf.GGUFValueType


def header_of(data: bytes) -> GGUFHeader:
    return read_header(SourceBuffer(GUARDED.holding(data)))


def compare(header: GGUFHeader, path: Path) -> None:
    """Hold `header` against what gguf's reader says of the file."""
    reader = gguf.GGUFReader(path)
    data = path.read_bytes()
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.fields) == list(fields)
    start = header.keys_span[0]
    for name, field in fields.items():
        ours = header.fields[name]
        assert ours.type == field.types[0]
        assert (ours.start, ours.stop) == (field.offset, field.offset + sum(part.nbytes for part in field.parts))
        assert ours.start == start
        start = ours.stop
        if field.types[0] == V.ARRAY:
            assert name not in header.keys
            assert (ours.element, ours.length) == (field.types[-1] if field.data else ours.element, len(field.data))
        else:
            assert header.keys[name] == field.contents()
    assert header.keys_span == (24, start)
    assert header.data_offset == reader.data_offset
    assert header.alignment == reader.alignment
    assert header.names == tuple(tensor.name for tensor in reader.tensors)
    for row, tensor in zip(header.table, reader.tensors):
        assert row["ne"].tolist()[: row["n_dims"]] == tensor.shape.tolist()
        assert row["ne"].tolist()[row["n_dims"] :] == [1] * (4 - row["n_dims"])
        assert (row["type"], row["offset"], row["nbytes"]) == (
            tensor.tensor_type, tensor.data_offset, tensor.n_bytes,
        )  # fmt: skip
        assert row["info"] == tensor.field.offset
        assert struct.unpack_from("<Q", data, row["dims"])[0] == row["ne"][0]


@pytest.mark.parametrize("fixture", ["base.gguf", "finetune-v1.gguf"])
@pytest.mark.parametrize("window", [None, 1, 100], ids=["whole", "tiny windows", "small windows"])
def test_real_files_read_as_with_gguf(fixture: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if window is not None:
        monkeypatch.setattr(sources, "SMALL", -1)
        monkeypatch.setattr(cursor, "_WINDOW", window)
    source = SourceFile(DATA / fixture)
    assert (source.memory is None) == (window is not None)
    compare(read_header(source), DATA / fixture)
    source.close()


SCALARS: dict[V, Any] = {
    V.UINT8: st.integers(0, 255), V.INT8: st.integers(-128, 127), V.UINT16: st.integers(0, 2**16 - 1),
    V.INT16: st.integers(-(2**15), 2**15 - 1), V.UINT32: st.integers(0, 2**32 - 1),
    V.INT32: st.integers(-(2**31), 2**31 - 1), V.FLOAT32: st.floats(width=32, allow_nan=False),
    V.BOOL: st.booleans(), V.UINT64: st.integers(0, 2**64 - 1), V.INT64: st.integers(-(2**63), 2**63 - 1),
    V.FLOAT64: st.floats(allow_nan=False), V.STRING: st.text(max_size=20),
}  # fmt: skip
values = st.sampled_from(list(SCALARS)).flatmap(lambda kind: st.tuples(st.just(kind), SCALARS[kind], st.none()))
arrays = st.sampled_from(list(SCALARS)).flatmap(
    lambda kind: st.tuples(st.just(V.ARRAY), st.lists(SCALARS[kind], min_size=1, max_size=9), st.just(kind))
)
names = st.text("abc.é", min_size=1, max_size=12)
QUANTIZED = [gguf.GGMLQuantizationType(n) for n in (0, 1, 8, 12, 24, 28, 30)]


@settings(max_examples=40, deadline=None)
@given(
    keys=st.dictionaries(names, values | arrays, max_size=8),
    tensors=st.dictionaries(
        names, st.tuples(st.sampled_from(QUANTIZED), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3)),
        max_size=6,
    ),
    alignment=st.sampled_from([None, 8, 64, 4096]),
)  # fmt: skip
def test_any_file_reads_as_with_gguf(
    keys: dict[str, Any],
    tensors: dict[str, tuple[gguf.GGMLQuantizationType, int, list[int]]],
    alignment: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, (kind, value, element) in keys.items():
        writer.add_key_value(name, value, kind, element)
    for name, (kind, n_blocks, outer) in tensors.items():
        block = gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor(name, np.ones((*outer, n_blocks * block), np.uint8), raw_dtype=kind)
    finish(writer)
    source = SourceFile(path)
    compare(read_header(source), path)
    source.close()
    shutil.rmtree(path.parent)


def test_both_versions_read_alike() -> None:
    new, old = header_of(SOUND), header_of(edited(PARTS, lambda parts: setattr(parts, "version", 2)))
    assert (new.version, old.version) == (3, 2)
    assert (new.table == old.table).all()
    assert new[1:-1] == old[1:-1]


def test_text_that_is_no_utf8_is_shown() -> None:
    parts = Parts(keys={b"general.name": (STRING, string(b"\xffb\xc3\xa9"))})
    assert header_of(parts.build()).keys == {"general.name": "\ufffdbé"}


@pytest.mark.parametrize("bad", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("small", [True, False], ids=["in memory", "in windows"])
def test_a_bad_header_is_told_by_kind_place_and_words(
    bad: Hostile, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
        monkeypatch.setattr(cursor, "_WINDOW", 64)
    path = tmp_path / "bad.gguf"
    path.write_bytes(bad.data())
    source = SourceFile(path)
    with pytest.raises(CheckpointError) as caught, within_bounds(source.size, traced=True):
        read_header(source)
    source.close()
    assert str(caught.value) == f"{path}: {bad.message}"
    assert type(caught.value) is bad.kind


def test_what_is_no_gguf_file_is_told() -> None:
    with pytest.raises(NotACheckpointError, match=r"this is not a GGUF file: it is a finetune checkpoint \(ggcl\)"):
        header_of((DATA / "adam.ggcl").read_bytes()[:5000])


def vocabulary(n: int) -> Parts:
    """Return a small base model with `n` tokens and as many merges."""
    tokens = struct.pack("<IQ", STRING, n) + b"".join(string(f"token{i}") for i in range(n))
    scores = struct.pack("<IQ", 6, n) + bytes(4 * n)
    parts = Parts(keys={b"general.architecture": (STRING, string("llama"))})
    parts.keys |= {b"tokens": (ARRAY, tokens), b"scores": (ARRAY, scores), b"merges": (ARRAY, tokens)}
    parts.u32("last", 7)
    for name, kind, dims, nbytes in (("token_embd.weight", 8, (32, 2, 2), 4 * 34), ("output_norm.weight", 0, (8,), 32)):
        parts.tensors[name] = Tensor(name.encode(), dims, kind, bytes(nbytes))
    return parts


def test_a_file_cut_at_any_byte_is_an_error() -> None:
    data = vocabulary(20).build()
    assert len(header_of(data).names) == 2
    for size in range(len(data)):
        with pytest.raises(TruncatedError if size >= 4 else NotACheckpointError):
            header_of(data[:size])


def test_a_large_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(vocabulary(250_000).build())
    source = SourceFile(path)
    assert source.memory is None
    header, peak = traced(source)
    assert peak < CONSTANT  # it is not decoded
    assert (header.fields["merges"].length, header.fields["merges"].element) == (250_000, V.STRING)
    assert header.keys["last"] == 7
    seconds = min(timed(source) for _ in range(3))
    source.close()
    assert seconds < 0.4  # 0.12 where nothing else runs; gguf's reader takes 26


def traced(source: Source) -> tuple[GGUFHeader, int]:
    """Return the header, and the most memory that reading it took."""
    tracemalloc.start()
    try:
        return read_header(source), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def timed(source: Source) -> float:
    begin = time.thread_time()
    read_header(source)
    return time.thread_time() - begin


def test_a_file_of_20_gb_is_read_in_no_time(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    shutil.copy(DATA / "base.gguf", path)
    path.chmod(0o644)
    os.truncate(path, 20_000_000_000)
    source = SourceFile(path)
    header, peak = traced(source)
    assert peak < CONSTANT
    assert timed(source) < 0.1
    source.close()
    assert len(header.names) == 21


def test_many_tensors_cost_in_proportion() -> None:
    n = 20_000
    head = struct.pack("<4sIQQ", b"GGUF", 3, n, 0)
    infos = b"".join(string(f"{i}") + struct.pack("<IQIQ", 1, 1, 24, 32 * i) for i in range(n))
    data = head + infos + bytes(-len(head + infos) % 32 + 32 * n)
    header, peak = traced(SourceBuffer(data))
    assert len(header.names) == n
    assert peak < MEMORY * len(data)


@pytest.mark.parametrize("kind", [0, 12], ids=["small numbers", "large numbers"])
def test_many_keys_cost_in_proportion(kind: int) -> None:
    value = bytes(1) if kind == 0 else struct.pack("<d", 0.1)
    parts = Parts(keys={f"{i:x}".encode(): (kind, value) for i in range(1 << 14)})
    data = parts.build()
    header, peak = traced(SourceBuffer(data))
    assert len(header.keys) == 1 << 14
    assert peak < MEMORY * len(data) + CONSTANT


@pytest.mark.parametrize("text", [b"\xff", b"a", "é".encode()], ids=["invalid", "ascii", "utf-8"])
def test_long_strings_cost_in_proportion(text: bytes) -> None:
    text = "\U0001f600".encode() + text * (4_000_000 // len(text))
    data = Parts(keys={b"x": (STRING, string(text))}).build()
    assert traced(SourceBuffer(data))[1] < MEMORY * len(data)
