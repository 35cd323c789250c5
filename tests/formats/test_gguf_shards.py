"""Models in one file and in several: the same tensors, whichever is named, and what is said where one is wrong."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import ggcl_fast
from ggcl_fast import CheckpointError, NotACheckpointError, SourceChangedError, TruncatedError
from ggcl_fast.formats.gguf_shards import open_model
from ggcl_fast.storage import sources, streams
from ggcl_fast.storage.sources import read_at

from ..models import Model, finish, read_gguf
from ..reference import DATA

V = gguf.GGUFValueType
Arrays = dict[str, npt.NDArray[Any]]
Keys = Mapping[str, tuple[V, Any]]

COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"


def tensors() -> Arrays:
    rng = np.random.default_rng(0)
    found: Arrays = {"token_embd.weight": rng.normal(size=(5, 32)).astype(np.float16)}
    for i in range(3):
        found[f"blk.{i}.attn_norm.weight"] = rng.normal(size=i + 1).astype(np.float32)
        found[f"blk.{i}.ffn_up.weight"] = rng.normal(size=(3, 7)).astype(np.float32)
    return found


def shard_name(number: int, n_files: int, stem: str = "model") -> str:
    return f"{stem}-{number + 1:05}-of-{n_files:05}.gguf"


def write(path: Path, some: Arrays, keys: Keys, *, alignment: int = 32) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a model")
    writer.add_custom_alignment(alignment)
    for key, (type, value) in keys.items():
        writer.add_key_value(key, value, type)
    for name, values in some.items():
        writer.add_tensor(name, values)
    finish(writer)


def split_keys(number: int, n_files: int, n_tensors: int) -> dict[str, tuple[V, Any]]:
    """Return the keys that llama.cpp writes."""
    return {COUNT: (V.UINT16, n_files), NUMBER: (V.UINT16, number), TENSORS: (V.INT32, n_tensors)}


def parts_of(whole: Arrays, n_files: int) -> list[Arrays]:
    names = list(whole)
    step = -(-len(names) // n_files)
    return [{name: whole[name] for name in names[i * step : (i + 1) * step]} for i in range(n_files)]


def write_shards(
    folder: Path, parts: list[Arrays], edits: Mapping[int, Keys] | None = None, *, stem: str = "model"
) -> list[Path]:
    """Write a file for each of `parts`; `edits` are other keys for some of them."""
    folder.mkdir(exist_ok=True)
    paths = []
    for i, part in enumerate(parts):
        paths.append(folder / shard_name(i, len(parts), stem))
        write(paths[-1], part, {**split_keys(i, len(parts), sum(map(len, parts))), **(edits or {}).get(i, {})})
    return paths


def compare(path: Path | str, whole: Arrays) -> None:
    """Hold what is opened by `path` against `whole`."""
    source, header = open_model(path)
    with contextlib.closing(source):
        assert header.names == tuple(whole)
        assert header.keys["general.name"] == "a model"
        for tensor, (name, values) in zip(header.tensors(), whole.items()):
            assert tensor.name == name
            assert tensor.dims == values.shape[::-1]
            assert tensor.type.name == {2: "F16", 4: "F32"}[values.itemsize]
            assert tensor.nbytes == values.nbytes
            assert read_at(source, tensor.offset, tensor.nbytes) == values.tobytes()
            assert header.tensor(header.names.index(name)) == tensor
        source.check_unchanged()
    assert source.closed


def n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- sound ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in windows"])
@pytest.mark.parametrize("n_files", [1, 2, 3])
def test_any_of_the_files_gives_all_tensors(
    n_files: int, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    whole = tensors()
    before = n_open()
    for path in write_shards(tmp_path, parts_of(whole, n_files)):
        compare(path, whole)
        compare(f"file://{path}", whole)
    assert n_open() == before


@pytest.mark.parametrize("keys", [{}, {COUNT: (V.UINT16, 0)}, split_keys(0, 1, 7)], ids=["none", "0", "1"])
def test_a_model_in_one_file_may_have_any_name(keys: Keys, tmp_path: Path) -> None:
    write(tmp_path / "any name", tensors(), keys)
    compare(tmp_path / "any name", tensors())


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("most", [1, 3, 4])
def test_what_gguf_splits_is_read(most: int, small_first: bool, tmp_path: Path) -> None:
    """With a small first file that one has keys, and no tensors."""
    whole = tensors()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=most, small_first_shard=small_first)
    writer.add_name("a model")
    for name, values in whole.items():
        writer.add_tensor(name, values)
    finish(writer)
    names = sorted(os.listdir(tmp_path))
    n_files = -(-len(whole) // most) + small_first
    assert names == [shard_name(i, n_files) for i in range(n_files)]
    for name in names:
        compare(tmp_path / name, whole)


@pytest.mark.parametrize("stem", ["", "-00001-of-00002", "a.gguf", "two\nlines", "é", "a-00002-of-00003.gguf"])
def test_what_stands_before_the_number_may_be_anything(stem: str, tmp_path: Path) -> None:
    for path in write_shards(tmp_path, parts_of(tensors(), 2), stem=stem):
        compare(path, tensors())


def test_a_name_without_a_folder_is_one_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, parts_of(tensors(), 2))
    monkeypatch.chdir(tmp_path)
    compare(shard_name(1, 2), tensors())


@pytest.mark.parametrize("type", [V.UINT8, V.INT8, V.UINT16, V.INT16, V.UINT32, V.INT32, V.UINT64, V.INT64])
def test_counts_may_be_integers_of_any_type(type: V, tmp_path: Path) -> None:
    keys = {i: {key: (type, value) for key, (_, value) in split_keys(i, 2, 7).items()} for i in range(2)}
    for path in write_shards(tmp_path, parts_of(tensors(), 2), keys):
        compare(path, tensors())


def test_each_file_has_its_own_alignment(tmp_path: Path) -> None:
    whole, parts = tensors(), parts_of(tensors(), 3)
    for i, alignment in enumerate((64, 8, 4096)):
        write(tmp_path / shard_name(i, 3), parts[i], split_keys(i, 3, len(whole)), alignment=alignment)
    compare(tmp_path / shard_name(2, 3), whole)


def test_a_change_of_any_file_is_noticed(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts_of(tensors(), 3))
    for path in paths:
        source, _ = open_model(paths[0])
        with contextlib.closing(source):
            os.utime(path, ns=(1, 1))
            with pytest.raises(SourceChangedError, match=re.escape(str(path))):
                source.check_unchanged()


def split_model(folder: Path, model: Model) -> tuple[Path, list[Path]]:
    """Write a model in one file and in three."""
    whole = folder / "whole.gguf"
    model.write(whole)
    reader = gguf.GGUFReader(whole)
    arrays: Arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    keys = {name: (f.types[0], f.contents()) for name, f in reader.fields.items() if name.startswith("llama.")}
    return whole, write_shards(folder, parts_of(arrays, 3), {0: keys})


def test_what_is_merged_is_the_same_from_one_file_and_from_several(tmp_path: Path) -> None:
    model = Model()
    whole, paths = split_model(tmp_path, model)
    with model.checkpoint(model.factors(), 0.75) as checkpoint:
        for base in (whole, *paths):
            ggcl_fast.convert(checkpoint, base.with_suffix(".out"), to="merged", base=base)
    expected = read_gguf(whole.with_suffix(".out"))
    for path in paths:
        found = read_gguf(path.with_suffix(".out"))
        assert list(found) == list(expected)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
        fields = gguf.GGUFReader(path.with_suffix(".out")).fields
        assert not [name for name in fields if name.startswith("split.")]


def test_none_of_the_files_is_written_over(tmp_path: Path) -> None:
    model = Model()
    paths = split_model(tmp_path, model)[1]
    before = [path.read_bytes() for path in paths]
    with model.checkpoint(model.factors()) as checkpoint:
        for target in paths:
            for base in paths:
                with pytest.raises(shutil.SameFileError):
                    ggcl_fast.convert(checkpoint, target, to="merged", base=base, force=True)
    assert [path.read_bytes() for path in paths] == before


# --- those that are not ---------------------------------------------------------------------------------------------


def renamed(name: str, index: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_shards(folder, parts_of(tensors(), 2))[index].rename(folder / name)

    return make


def edited(index: int, named: int, **keys: tuple[V, Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        changed = {{"count": COUNT, "no": NUMBER, "tensors": TENSORS}[key]: value for key, value in keys.items()}
        return write_shards(folder, parts_of(tensors(), 3), {index: changed})[named]

    return make


def twin(folder: Path) -> Path:
    first, second = parts_of(tensors(), 2)
    return write_shards(folder, [first, second | {"token_embd.weight": first["token_embd.weight"]}])[1]


def swapped(folder: Path) -> Path:
    paths = write_shards(folder, parts_of(tensors(), 3))
    paths[1].rename(folder / "x")
    paths[2].rename(paths[1])
    (folder / "x").rename(paths[2])
    return paths[0]


def from_another(folder: Path) -> Path:
    """The second file is of a model that is split at another place."""
    whole = tensors()
    names = list(whole)
    path = write_shards(folder, parts_of(whole, 2))[1]
    other = write_shards(folder, [{names[0]: whole[names[0]]}, {name: whole[name] for name in names[1:]}], stem="other")
    return other[1].rename(path)


def copied_as(number: int) -> Callable[[Path], Path]:
    """All files are there, and one more, whose number is none of theirs."""

    def make(folder: Path) -> Path:
        paths = write_shards(folder, parts_of(tensors(), 2))
        return Path(shutil.copy(paths[0], folder / shard_name(number, 2)))

    return make


U16 = V.UINT16
WHICH = "not the file that its name says"
NAMES = r"one of 2 files, and its name does not tell those of the others: expected a name that ends in -00001-of-00002"
INTEGER = "expected an integer of 0 to 2147483647"
WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another name": (renamed("model.gguf"), rf"/model\.gguf: split\.count: {NAMES}\.gguf, found 2$"),
    "no number": (renamed("model-of-00002.gguf"), NAMES),
    "short number": (renamed("model-1-of-2.gguf"), NAMES),
    "long number": (renamed("model-000001-of-000002.gguf"), NAMES),
    "another suffix": (renamed("model-00001-of-00002.bin"), NAMES),
    "longer suffix": (renamed("model-00001-of-00002.gguf.part"), NAMES),
    "upper case": (renamed("model-00001-of-00002.GGUF"), NAMES),
    "newline behind it": (renamed("model-00001-of-00002.gguf\n"), NAMES),
    "name of another count": (renamed("model-00001-of-00003.gguf"), NAMES),
    "no file of that number": (copied_as(6), "00007-of-00002"),
    "file number 0": (copied_as(-1), "00000-of-00002"),
    "number in the first": (edited(0, 1, no=(U16, 1)), rf"00001-of.*split\.no: {WHICH}: expected 0, found 1"),
    "number in the last": (edited(2, 0, no=(U16, 0)), rf"00003-of.*split\.no: {WHICH}: expected 2, found 0"),
    "number from 1": (edited(1, 1, no=(U16, 2)), rf"00002-of.*split\.no: {WHICH}: expected 1, found 2"),
    "swapped": (swapped, rf"00002-of.*split\.no: {WHICH}: expected 1, found 2"),
    "count in the named": (edited(1, 1, count=(U16, 4)), r"00002-of-00003\.gguf: split\.count: one of 4 files"),
    "count in another": (edited(1, 0, count=(U16, 4)), rf"00002-of.*split\.count: {WHICH}: expected 3, found 4"),
    "no count in another": (edited(2, 0, count=(U16, 0)), rf"00003-of.*split\.count: {WHICH}: expected 3, found 0"),
    "one in another": (edited(0, 1, count=(U16, 1)), rf"00001-of.*split\.count: {WHICH}: expected 3, found 1"),
    "huge count": (
        edited(0, 0, count=(V.UINT64, 2**64 - 1)),
        rf"split\.count at offset .* {INTEGER}, found 18446744073709551615",
    ),
    "negative count": (edited(0, 0, count=(V.INT32, -3)), rf"split\.count at offset \d+ .* {INTEGER}, found -3"),
    "count of text": (edited(0, 0, count=(V.STRING, "3")), rf"split\.count at offset .* {INTEGER}, found string"),
    "count of a float": (edited(0, 0, count=(V.FLOAT32, 3.0)), rf"split\.count at offset .* {INTEGER}, found float32"),
    "counts, several": (
        edited(0, 0, count=(V.ARRAY, [3])), rf"split\.count at offset .* {INTEGER}, found array",
    ),
    "true as count": (edited(0, 0, count=(V.BOOL, True)), rf"split\.count at offset .* {INTEGER}, found bool"),
    "number of text": (edited(1, 0, no=(V.STRING, "1")), rf"00002-of.*split\.no at offset .* {INTEGER}, found string"),
    "too many tensors": (
        edited(0, 1, tensors=(V.INT32, 8)),
        r"split\.tensors\.count: the files do not belong together: expected 8, found 7$",
    ),
    "no tensors": (edited(0, 0, tensors=(V.INT32, 0)), r"split\.tensors\.count: .*: expected 0, found 7"),
    "tensors of text": (
        edited(0, 0, tensors=(V.STRING, "7")), rf"split\.tensors\.count at offset .* {INTEGER}, found string",
    ),
    "of another model": (from_another, r"split\.tensors\.count: the files do not belong .*: expected 7, found 10$"),
    "a name twice": (twin, r"tensor 7 'token_embd\.weight': the name is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "read in windows"])
@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_files_that_do_not_belong_together_are_refused(
    make: Callable[[Path], Path], message: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(sources, "SMALL", -1)
    path = make(tmp_path / "folder")
    before = n_open()
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        open_model(path)
    assert n_open() == before
    assert caught.value.source.startswith(str(tmp_path))


@pytest.mark.parametrize("missing", range(3))
def test_a_file_that_is_missing_is_named(missing: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts_of(tensors(), 3))
    paths[missing].unlink()
    before = n_open()
    for path in paths:
        with pytest.raises(FileNotFoundError, match=re.escape(paths[missing].name)) as caught:
            open_model(path)
        assert caught.value.filename == str(paths[missing])
        assert n_open() == before
        with pytest.raises(FileNotFoundError, match=re.escape(paths[missing].name)):
            ggcl_fast.convert(DATA / "trained.ggcl", tmp_path / "out.gguf", to="merged", base=path)
        assert n_open() == before
    assert not (tmp_path / "out.gguf").exists()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILED: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 40), TruncatedError),
    "empty": (lambda path: os.truncate(path, 0), NotACheckpointError),
    "a page": (lambda path: path.write_text("<!DOCTYPE html>" + 100 * " "), NotACheckpointError),
    "a folder": (a_folder, IsADirectoryError),
    "a pipe": (a_pipe, OSError),
}


@pytest.mark.parametrize(("spoil", "kind"), SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("spoiled", range(3))
def test_a_file_that_is_not_sound_is_named(
    spoiled: int, spoil: Callable[[Path], object], kind: type[Exception], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(streams, "_PATIENCE", 0.05)
    paths = write_shards(tmp_path, parts_of(tensors(), 3))
    spoil(paths[spoiled])
    before = n_open()
    for path in paths:
        with pytest.raises(kind, match=re.escape(paths[spoiled].name)):
            open_model(path)
        assert n_open() == before
