"""What is a URL, what may be shown of it, and what may be made of a name that comes from outside.

Every name that a message shows of a URL is made by `public_name`, and every place below a folder by `below`.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Final

__all__ = ["LINK", "StrPath", "below", "is_folder", "is_url", "last_part", "located", "public_name"]

StrPath = str | os.PathLike[str]

_URL: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL: Final = re.compile(r"(?:file|local)://", re.IGNORECASE)
LINK: Final = "::"
"""What stands between the links of fsspec's chained URLs."""
_DRIVE: Final = re.compile(r"[A-Za-z]:")


def is_url(path: StrPath) -> bool:
    """Tell whether `path` is a URL, for `remote`, and not a path; one of a local file is none once it is `located`."""
    return isinstance(path, str) and _URL.match(path) is not None


def located(name: StrPath) -> str:
    """Return `name` as a string, and as a path where it is a ``file://`` URL: what is local follows local rules."""
    text = os.fspath(name)
    match = _LOCAL.match(text) if isinstance(text, str) else None
    return text[match.end() :] if match else text


def public_name(name: StrPath) -> str:
    """Return `name` without what may be secret in it, where it is a URL: user and password, query and fragment.

    That holds for each link of a chained URL.  Where a colon before the first slash and an ``@`` behind it leave open
    where a password ends, everything up to the last ``@`` is taken for one.
    """
    text = os.fspath(name)
    if not is_url(text):
        return text
    shown, secret = [], False
    for link in text.split(LINK):
        scheme, separator, rest = link.partition("://")
        if separator:
            shown.append(f"{scheme}://{_without_secrets(rest)}")
        else:  # a protocol by itself, or the rest of a query with a double colon
            shown.append("..." if secret else link)
        secret = secret or any(c in link for c in "?#@")
    return LINK.join(shown)


def _without_secrets(rest: str) -> str:
    """Return what follows ``://`` without user, password, query and fragment."""
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    if ":" in authority and "@" in path:
        return path.rpartition("@")[2]
    return f"{authority.rpartition('@')[2]}{slash}{path}"


def last_part(name: StrPath) -> str:
    """Return the last part of a path or a URL, without query and fragment."""
    text = os.fspath(name)
    return os.path.basename(re.split(r"[?#]", text)[0] if is_url(text) else text)


def is_folder(name: StrPath) -> bool:
    """Tell whether `name` is a folder; a URL is one where it ends with a slash."""
    place = located(name)
    return place.endswith("/") if is_url(place) else os.path.isdir(place)


def below(folder: str, name: str) -> str:
    """Return the path or URL of `name` below `folder`.

    Parameters
    ----------
    folder
        A path or a URL.
    name
        Parts joined by ``/``, as a search of another folder, or a store's listing, gave them.

    Raises
    ------
    OSError
        `name` leads out of `folder`, or could on some system or store: it is absolute, or has an empty part, ``.``,
        ``..``, a NUL, or for a URL a backslash or a drive letter.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or (
        is_url(folder) and ("\\" in name or _DRIVE.match(name))
    ):
        raise OSError(errno.EINVAL, "Its name could lead out of the output folder", name)
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)
