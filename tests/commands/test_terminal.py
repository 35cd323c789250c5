"""Signals, whatever becomes of the exception that they raise."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from ggcl_fast.commands.terminal import Stopped, signals_as_exceptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_even_where_an_import_makes_something_else_of_it(number: signal.Signals) -> None:
    """As C code does that is importing: numpy's said \"could not import module datetime\"."""
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, signals_as_exceptions("ggcl-fast"):
        try:
            os.kill(os.getpid(), number)
        except Stopped:
            raise ImportError("could not import module") from None
    assert caught.value.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform != "linux", reason="tells threads by /proc")
@pytest.mark.parametrize(("asked", "n_threads"), [(None, 1), ("2", 2)])
def test_commands_have_no_threads_of_the_blas(asked: str | None, n_threads: int) -> None:
    """Unless the user asks for them."""
    code = """
import os, sys
from ggcl_fast.commands.terminal import leave

def main():
    assert "numpy" not in sys.modules
    import numpy
    print(numpy.show_config("dicts")["Build Dependencies"]["blas"]["name"], len(os.listdir("/proc/self/task")))
    return 0

leave(main)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    if asked is not None:
        environment["OPENBLAS_NUM_THREADS"] = asked
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    blas, found = done.stdout.split()
    if "openblas" not in blas or len(os.sched_getaffinity(0)) < n_threads:
        pytest.skip("numpy has another BLAS, or there are fewer processors")
    assert int(found) == n_threads


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ImportError), signals_as_exceptions("ggcl-fast"):
        raise ImportError("no such module")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_signal_says_has_a_line_of_its_own(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a bar stands, it is wiped off."""
    said = b""

    def write(_: int, data: bytes) -> None:
        nonlocal said
        said += data

    with signals_as_exceptions("ggcl-fast") as signals, monkeypatch.context() as patch:
        signals.stop = threading.Event()
        patch.setattr(os, "write", write)
        patch.setattr(os, "isatty", lambda _: is_terminal)
        signal.raise_signal(signal.SIGTERM)
    assert signals.stop.is_set()
    assert said.startswith(b"\r\x1b[Kggcl-fast: SIGTERM: " if is_terminal else b"ggcl-fast: SIGTERM: ")
    assert said.endswith(b"\n")
