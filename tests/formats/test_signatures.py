"""What a file is, by its first bytes, and what serves it: the same for checkpoints and for base models."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import ggcl_fast
from ggcl_fast import CheckpointError, NotACheckpointError, open_checkpoint
from ggcl_fast.formats import signatures
from ggcl_fast.formats.signatures import LONGEST_SIGNATURE, found, recognise

from ..models import finish
from ..reference import DATA

MODEL = DATA / "base.gguf"
SOURCE = DATA / "trained.ggcl"


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(SOURCE, "x" * 90)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return out.getvalue()


OLD = "an old model", "convert the original model anew with llama.cpp's convert_hf_to_gguf.py"
PACKED = "unpack it, and hand in what is in it"
PAGE = "an HTML page", "by /resolve/main/ and not by /blob/main/"
SERVER = "an error text of a server", "what the server said instead of the file: download it again, signed in"
TENSORS = "a safetensors file", "llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py"
ZEROS = "zeros where it begins", "a download that was never finished"
BOM = "byte order mark", "download it again"
LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca2\n"
)

OTHERS: dict[str, tuple[bytes, str, str]] = {
    "byte-swapped": (b"ggcl" + bytes(88), "a byte-swapped checkpoint (ggcl)", "from a big-endian machine"),
    "ggcp": (b"pcgg" + bytes(88), "a train-text-from-scratch checkpoint (ggcp)", "convert-train-checkpoint-to-gguf.py"),
    "ggml": (b"lmgg" + bytes(28), f"{OLD[0]} (ggml)", OLD[1]),
    "ggmf": (b"fmgg\1\0\0\0", f"{OLD[0]} (ggmf)", OLD[1]),
    "ggjt": (b"tjgg\3\0\0\0", f"{OLD[0]} (ggjt)", OLD[1]),
    "zip": (zipped(), "a zip archive, such as PyTorch's", "unpack it, or load it with torch.load"),
    "old PyTorch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "an old PyTorch file", "load it with torch.load"),
    "Git LFS": (LFS, "a Git LFS pointer", "git lfs pull fetches the file that it stands for"),
    "gzip": (gzip.compress(MODEL.read_bytes()[:999]), "a gzip archive", PACKED),
    "xz": (lzma.compress(b"GGUF"), "an xz archive", PACKED),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00\x21\x00\x00GGUF", "a zstd archive", PACKED),
    "bzip2": (bz2.compress(b"GGUF"), "a bzip2 archive", PACKED),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive", PACKED),
    "tar": (tarred(), "a tar archive", PACKED),
    "tar cut behind its magic": (tarred()[:262], "a tar archive", PACKED),
    "tar of zeros": (bytes(257) + b"ustar\x0000" + bytes(248), "a tar archive", PACKED),
    "BOM": (b"\xef\xbb\xbfhello", *BOM),
    "BOM before a checkpoint": (b"\xef\xbb\xbf" + SOURCE.read_bytes()[:200], *BOM),
    "not there": (b"Entry not found", *SERVER),
    "gated": (b"Access to model meta-llama/Llama-2-7b is restricted.", *SERVER),
    "no repository": (b"Repository not found", *SERVER),
    "no revision": (b"Invalid rev id: mian", *SERVER),
    "no credentials": (b"Invalid username or password.", *SERVER),
    "JSON of an error": (b'{"error":"Invalid credentials in Authorization header"}', *SERVER),
    "JSON of something else": (
        b'{"architectures": ["LlamaForCausalLM"]}', "a JSON text",
        "what a program says of a file, or a server instead of it: the values are elsewhere",
    ),
    "byte-swapped ggla": (
        b"ggla\0\0\0\1", "a byte-swapped adapter (ggla)",
        "from a big-endian machine; only little-endian ones can be read",
    ),
    "page behind a comment": (b"<!-- saved from url --><html>", *PAGE),
    "page that begins with its head": (b"<head><title>403 Forbidden", *PAGE),
    "page that begins with its body": (b"<body>Too many requests", *PAGE),
    "page": (b"<!doctype html>\n<html class=''>", *PAGE),
    "page in upper case": (b"<!DOCTYPE HTML PUBLIC '-//W3C//DTD HTML 4.01//EN'>", *PAGE),
    "page without doctype": (b"<html><head><title>404", *PAGE),
    "page in mixed case": (b"<Html lang=en>", *PAGE),
    "page behind blanks": (b" \t\r\n\n    <!DOCTYPE html>", *PAGE),
    "page behind many blanks": (b"\n" * (LONGEST_SIGNATURE - 14) + b"<!doctype html>", *PAGE),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", *PAGE),
    "safetensors": (safetensors.numpy.save({"x": np.zeros(3, np.float32)}), *TENSORS),
    "safetensors without tensors": (struct.pack("<Q", 2) + b"{}", *TENSORS),
    "safetensors with the longest header": (struct.pack("<Q", 100_000_000) + b'{"', *TENSORS),
    "zeros": (bytes(4096), *ZEROS),
    "nine zeros": (bytes(9), *ZEROS),
}  # fmt: skip
UNKNOWN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "one byte": (b"G", "b'G'"),
    "eight zeros": (bytes(8), r"b'\x00\x00\x00\x00'"),
    "zeros and more": (bytes(100) + b"\1", r"b'\x00\x00\x00\x00'"),
    "lower case": (b"gguf\3\0\0\0", "b'gguf'"),
    "half a magic": (b"GGU", "b'GGU'"),
    "blanks before a magic": (b" GGUF" + bytes(99), "b' GGU'"),
    "text": (b"hello, world", "b'hell'"),
    "HTML in the middle": (b"x<html>", "b'x<ht'"),
    "half a page": (b"<!doctype", "b'<!do'"),
    "blanks only": (b" \n" * 200, r"b' \n \n'"),
    "ustar too early": (bytes(256) + b"ustar\0", r"b'\x00\x00\x00\x00'"),
    "half of ustar": (b"x" * 257 + b"usta", "b'xxxx'"),
    "half of gzip": (b"\x1f", r"b'\x1f'"),
    "header of one byte": (struct.pack("<Q", 1) + b"{}", r"b'\x01\x00\x00\x00'"),
    "header too long": (struct.pack("<Q", 100_000_001) + b'{"', r"b'\x01\xe1\xf5\x05'"),
    "header that is no object": (struct.pack("<Q", 2) + b"[]", r"b'\x02\x00\x00\x00'"),
    "header that is not there": (struct.pack("<Q", 99), r"b'c\x00\x00\x00'"),
    "control codes": (b"\x1b[31m", r"b'\x1b[31'"),
}
READ = {
    "ggcl": (SOURCE.read_bytes(), signatures.GGCL),
    "gguf": (MODEL.read_bytes(), signatures.GGUF),
    "ggla": ((DATA / "trained.ggla").read_bytes(), signatures.GGLA),
}

CHECKPOINTS = "neither a finetune checkpoint nor an adapter"
MODELS = "not a GGUF file"


def refused(data: bytes, folder: Path) -> dict[str, CheckpointError]:
    """Return what is said of `data` as a checkpoint in memory and in a file, and as a base model."""
    path, target = folder / "it", folder / "out.gguf"
    path.write_bytes(data)
    errors = {}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(data)
    errors["<buffer>"] = caught.value
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    errors[str(path)] = caught.value
    with pytest.raises(CheckpointError) as caught:
        ggcl_fast.convert(SOURCE, target, to="merged", base=path)
    errors["base"] = caught.value
    assert not target.exists()
    return errors


@pytest.mark.parametrize(("data", "name", "hint"), OTHERS.values(), ids=OTHERS)
def test_what_is_something_else_is_called_by_its_name(data: bytes, name: str, hint: str, tmp_path: Path) -> None:
    shown, told = found(data[:LONGEST_SIGNATURE])
    assert told is not None
    assert hint in told
    assert name in shown
    for source, error in refused(data, tmp_path).items():
        assert type(error) is NotACheckpointError
        place, expected = (tmp_path / "it", MODELS) if source == "base" else (source, CHECKPOINTS)
        assert str(error) == f"{place}: this is {expected}: it is {shown} ({told})"
        assert error.hint == told


@pytest.mark.parametrize(("data", "shown"), UNKNOWN.values(), ids=UNKNOWN)
def test_of_what_is_not_known_the_first_bytes_are_shown(data: bytes, shown: str, tmp_path: Path) -> None:
    assert recognise(data[:LONGEST_SIGNATURE]) is None
    shown = f"something that begins with {shown}" if data else shown
    assert found(data[:LONGEST_SIGNATURE]) == (shown, None)
    for source, error in refused(data, tmp_path).items():
        assert type(error) is NotACheckpointError
        expected = MODELS if source == "base" else CHECKPOINTS
        assert str(error).endswith(f": this is {expected}: it is {shown}")
        assert error.hint is None


@pytest.mark.parametrize(("data", "format"), READ.values(), ids=READ)
def test_what_is_read_has_a_format_without_a_hint(data: bytes, format: signatures.Format) -> None:
    assert recognise(data[:LONGEST_SIGNATURE]) is format
    assert recognise(data[:4]) is format
    assert format.hint is None


@pytest.mark.parametrize("kind", ["ggcl", "ggla"])
def test_a_base_model_that_is_a_checkpoint_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    data, format = READ[kind]
    open_checkpoint(data).close()
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(NotACheckpointError) as caught:
        ggcl_fast.convert(SOURCE, tmp_path / "out.gguf", to="merged", base=tmp_path / "it")
    assert str(caught.value).endswith(f"this is {MODELS}: it is {format.name}")


def test_every_format_is_in_the_tables() -> None:
    starts = [data for data, *_ in OTHERS.values()] + [data for data, _ in READ.values()]
    formats = [recognise(data[:LONGEST_SIGNATURE]) for data in starts]
    for format in (*signatures._FORMATS, signatures._HTML, signatures._SAFETENSORS, signatures._ZEROS):
        assert format in formats
        assert format.offset + len(format.signature) <= LONGEST_SIGNATURE


def test_a_format_is_known_by_no_less_than_its_signature() -> None:
    for format in signatures._FORMATS:
        start = b"\1" * format.offset + format.signature
        assert recognise(start) is format
        assert recognise(start[:-1]) is not format
        assert recognise(start + b"anything") is format


@given(start=st.binary(max_size=LONGEST_SIGNATURE))
def test_anything_can_be_asked_for(start: bytes) -> None:
    shown, hint = found(start)
    format = recognise(start)
    assert shown.isprintable()
    assert hint == (format.hint if format else None)


VERSIONS: dict[str, tuple[bytes, int, str | None]] = {
    "0": (struct.pack("<I", 0), 0, None),
    "1": (struct.pack("<I", 1), 1, "llama.cpp of that autumn rewrites it, with its quantize IN OUT COPY"),
    "4": (struct.pack("<I", 4), 4, None),
    "2, big-endian": (struct.pack(">I", 2), 2 << 24, "gguf-convert-endian FILE little"),
    "3, big-endian": (struct.pack(">I", 3), 3 << 24, "gguf-convert-endian FILE little"),
    "1, big-endian": (struct.pack(">I", 1), 1 << 24, None),
}  # fmt: skip


@pytest.mark.parametrize(("packed", "version", "hint"), VERSIONS.values(), ids=VERSIONS)
def test_a_gguf_file_of_another_version_is_told_with_what_serves_it(
    packed: bytes, version: int, hint: str | None, tmp_path: Path
) -> None:
    data = b"GGUF" + packed + MODEL.read_bytes()[8:]
    for error in refused(data, tmp_path).values():
        assert type(error) is CheckpointError
        assert f": version at offset 4 (0x4): expected 2 or 3, found {version}" in str(error)
        assert error.hint is None if hint is None else f"{hint})" in str(error)


def test_a_real_file_from_a_big_endian_machine_is_told(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output.weight", np.zeros((2, 2), np.float32))
    finish(writer)
    for error in refused((tmp_path / "big.gguf").read_bytes(), tmp_path).values():
        assert "from a big-endian machine: gguf's command turns it, gguf-convert-endian FILE little" in str(error)
