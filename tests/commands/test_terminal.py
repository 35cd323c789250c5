"""Signals, whatever becomes of the exception that they raise."""

import os
import signal

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
