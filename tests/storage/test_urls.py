"""Names: what is a URL, what is shown of it, and what may stand below a folder."""

import os
from pathlib import Path

import pytest

from ggcl_fast.storage.urls import below, is_url, located, public_name

LEADS_OUT = (
    "../x", "a/../../x", "..", ".", "a/./x", "/etc/x", "//x", "a//x", "a/", "", "a\0b", "a/..",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADS_OUT)
@pytest.mark.parametrize("folder", ["out", "s3://bucket/out/", "file:///out"])
def test_no_name_leads_out_of_a_folder(name: str, folder: str) -> None:
    with pytest.raises(OSError, match="could lead out of the output folder"):
        below(folder, name)


@pytest.mark.parametrize("name", ["..\\x", "a\\..\\..\\x", "C:x", "c:/x"])
def test_what_leads_out_on_other_systems_does_not_become_an_object(name: str) -> None:
    with pytest.raises(OSError, match="could lead out"):
        below("s3://bucket/out", name)


@pytest.mark.parametrize("name", ["x", "a/b/x", "a..b", ".hidden", "...", "a b", "\u4e2d", "ab:c", "?x", "x#"])
def test_other_names_stay_as_they_are(name: str, tmp_path: Path) -> None:
    path = below(str(tmp_path), name)
    assert path == os.path.join(tmp_path, name)
    assert os.path.realpath(path).startswith(str(tmp_path))
    assert below("s3://bucket/out/", name) == f"s3://bucket/out/{name}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host/a/b.ggcl?sig=secret#frag", "https://host/a/b.ggcl"),
        ("s3://key:sec/ret@bucket/a", "s3://bucket/a"),
        ("simplecache::s3://key:secret@bucket/a?b=secret", "simplecache::s3://bucket/a"),
        ("zip://in.ggcl::https://user:secret@host/x.zip?token=secret", "zip://in.ggcl::https://host/x.zip"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("a/b?c", "a/b?c"),
    ],
)
def test_secrets_are_left_out_of_every_link(url: str, shown: str) -> None:
    assert public_name(url) == shown


def test_local_urls_are_paths() -> None:
    assert located("file:///a/b") == located("FILE:///a/b") == located("local:///a/b") == "/a/b"
    assert is_url("s3://a/b")
    assert not is_url(located("file:///a"))
