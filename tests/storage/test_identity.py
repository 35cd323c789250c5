"""No output is an input or another output, under whatever name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ggcl_fast
from ggcl_fast.storage.identity import Claims, identities

from ..models import BASE
from ..reference import DATA


def _hard_link(path: Path, other: Path) -> str:
    os.link(path, other)
    return str(other)


def _symbolic_link(path: Path, other: Path) -> str:
    other.symlink_to(path)
    return str(other)


NAMES: dict[str, Callable[[Path, Path], str]] = {
    "itself": lambda path, _: str(path),
    "with dots": lambda path, _: f"{path.parent}/./{path.parent.name}/../{path.name}".replace(
        f"{path.parent.name}/..", "."
    ),
    "file URL": lambda path, _: f"file://{path}",
    "file URL with dots": lambda path, _: f"file://{path.parent}/./{path.name}",
    "local URL": lambda path, _: f"local://{path}",
    "hard link": _hard_link,
    "symbolic link": _symbolic_link,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("role", ["source", "base"])
def test_a_target_is_never_what_is_read(role: str, name: Callable[[Path, Path], str], tmp_path: Path) -> None:
    source, base = tmp_path / "in.ggcl", tmp_path / "base.gguf"
    shutil.copy(DATA / "trained.ggcl", source)
    shutil.copy(BASE, base)
    victim = {"source": source, "base": base}[role]
    before = victim.read_bytes()
    target = name(victim, tmp_path / "other")
    for reading in (str, lambda path: f"file://{path}"):
        with pytest.raises(shutil.SameFileError, match="Source and target are the same file"):
            ggcl_fast.convert(reading(source), target, to="merged", base=reading(base), force=True)
    assert victim.read_bytes() == before


def test_the_copy_of_the_base_is_an_output_too(tmp_path: Path) -> None:
    shutil.copy(BASE, tmp_path / "base.gguf")
    shutil.copy(DATA / "trained.ggcl", tmp_path / "in.ggcl")
    for base_out, problem in (
        ("base.gguf", "Source and target"), ("in.ggcl", "Source and target"), ("out.gguf", "Two outputs"),
    ):  # fmt: skip
        with pytest.raises(shutil.SameFileError, match=problem):
            ggcl_fast.convert(
                tmp_path / "in.ggcl", tmp_path / "out.gguf", to="adapter", base=tmp_path / "base.gguf",
                base_out=tmp_path / base_out, force=True,
            )  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["base.gguf", "in.ggcl"]


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "lora" / "adapter_model.safetensors"
    source.parent.mkdir()
    shutil.copy(DATA / "trained.ggcl", source)
    with pytest.raises(shutil.SameFileError):
        ggcl_fast.convert(source, source.parent, to="peft", force=True)
    assert source.read_bytes() == (DATA / "trained.ggcl").read_bytes()


def test_objects_are_known_under_all_their_names() -> None:
    one = set(identities("s3://bucket/a/b"))
    for name in ("s3://bucket/a/./b", "s3a://bucket/a/b", "S3://bucket/c/../a/b", "s3://k:s@bucket/a/b?versionId=1"):
        assert one & set(identities(name)), name
    assert not one & set(identities("s3://bucket/a/c"))
    assert not one & set(identities("gs://bucket/a/b"))


def test_a_run_writes_nothing_that_it_reads_or_wrote(tmp_path: Path) -> None:
    claims = Claims()
    claims.add([tmp_path / "a"], [tmp_path / "b"])
    for inputs, outputs, problem in (
        (["x"], ["b"], "another job of this run writes"), (["x"], ["a"], "another job of this run reads"),
        (["b"], ["y"], "source is what another job"),
    ):  # fmt: skip
        with pytest.raises(shutil.SameFileError, match=problem):
            claims.add([tmp_path / name for name in inputs], [tmp_path / name for name in outputs])
    claims.add([tmp_path / "a"], [tmp_path / "x"])  # of what was refused nothing was noted
