"""What the system offers beyond Python's ``os``; whoever asks knows from the answer where it does not.

On Linux: renameat2 (man 2 renameat2), by which a name is taken only where nothing has it, or two names change places
in one step; fallocate (man 2 fallocate) as the kernel has it: posix_fallocate writes to every block of a file where
the file system cannot reserve; and leases (man 2 fcntl).  Elsewhere nothing of these is there.  Locks are flock's, on
every system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

__all__ = [
    "exchange", "is_linked", "is_there", "is_written_elsewhere", "lock", "lock_soon", "n_cpus", "rename_to_free_name",
    "reserve", "share_cpus", "unlock", "without_blas_threads", "write_all",
]  # fmt: skip

_MOST_BYTES: Final = 1 << 30  # of one call; some systems refuse 2 GiB
_AT_FDCWD: Final = -100
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_SHORTEST_PAUSE: Final = 0.5e-3  # seconds; the next is twice as long
_LONGEST_PAUSE: Final = 0.6
_sharers = 1
_CANNOT: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@functools.cache
def _function(name: str) -> Any:
    """Return a function of the C library, None where it has none."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    found = getattr(library, f"{name}64", None) or getattr(library, name, None)  # the former where off_t has 32 bits
    if found is not None:
        arguments = {
            "renameat2": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint),
            "fallocate": (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong),
        }
        found.argtypes = arguments[name]
    return found


def _call(name: str, *arguments: object) -> bool:
    function = _function(name)
    if function is None:
        return False
    while function(*arguments):
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def exchange(one: str, other: str) -> bool:
    """Let two files or folders change places in one step; false where the system or the file system cannot."""
    return _call("renameat2", _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)


def rename_to_free_name(old: str, new: str) -> bool:
    """Rename `old` to `new`, `FileExistsError` where that is there; false where it cannot be done in one step."""
    return _call("renameat2", _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE)


def reserve(fd: int, nbytes: int) -> bool:
    """Reserve `nbytes` of disk for the file `fd`, and make it as long; false where the file system cannot."""
    return _call("fallocate", fd, 0, 0, nbytes)


def write_all(fd: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Write `pieces`, as many as one gather takes, in order and without copying them together; return their bytes."""
    total = sum(map(len, pieces))
    written = os.writev(fd, pieces) if total <= _MOST_BYTES else 0
    if written < total:  # a short write, rare on disks
        _write_rest(fd, pieces, written)
    return total


def _write_rest(fd: int, pieces: Sequence[bytes | memoryview], written: int) -> None:
    """Write what follows the first `written` bytes of `pieces`, one piece after the other."""
    for piece in pieces:
        if written >= len(piece):
            written -= len(piece)
            continue
        rest = memoryview(piece)[written:]
        written = 0
        while rest:
            n = os.write(fd, rest[:_MOST_BYTES])
            if n == 0:
                raise OSError(errno.EIO, "Nothing could be written")
            rest = rest[n:]


def lock(fd: int) -> bool | None:
    """Take the lock that marks a temporary place as alive; false: somebody holds it, None: there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def lock_soon(fd: int) -> bool:
    """Take the lock of `fd` from somebody who is about to give it up; false where that takes longer than a second."""
    pause = _SHORTEST_PAUSE
    while lock(fd) is False:
        if pause > _LONGEST_PAUSE:
            return False
        time.sleep(pause)
        pause *= 2
    return True


def unlock(fd: int) -> None:
    """Give up the lock of `fd`, for those too who have inherited it."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_UN)


def is_there(path: str) -> bool:
    """Tell whether there is something of this name, a link to nowhere too; `OSError` where that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_linked(fd: int, path: str) -> bool:
    """Tell whether `path` is still the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def is_written_elsewhere(fd: int) -> bool:
    """Tell whether somebody has this file, which `fd` reads, open for writing or mapped; False where nothing tells.

    Linux gives a lease for reading only where nobody has.  It is given back at once; whoever comes in between waits as
    long, and the signal that tells of it is one that nobody listens to.  A network file system may say yes always.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:  # the file system has no leases, or it is another user's file
        return error.errno == errno.EAGAIN
    return False


def n_cpus() -> int:
    """Return the number of processors that this process may use."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, n // _sharers)


def share_cpus(n_processes: int) -> None:
    """Let this process be one of `n_processes` that share the processors."""
    global _sharers
    _sharers = n_processes


def without_blas_threads() -> None:
    """Let numpy, which must not be imported yet, form products without threads, unless the user asks for them.

    Products are many and small here, and several threads of ours form them.  Threads of the BLAS's own, which wait for
    each other in each, made merging take almost twice as long at ranks 16 and 64.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(name, "1")
