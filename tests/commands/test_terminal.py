"""Signals, whatever becomes of the exception that they raise."""

import os
import signal
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
