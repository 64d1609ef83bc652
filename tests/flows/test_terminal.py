"""What all commands share."""

import ctypes
import sys
import time

import pytest

from flows.terminal import insist_on_interrupts


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_in_the_callback_of_a_library_is_not_lost(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    insist_on_interrupts()
    with pytest.raises(KeyboardInterrupt):
        ctypes.CFUNCTYPE(None)(interrupt)()  # returns as if nothing had happened
        time.sleep(10)


def test_other_errors_of_callbacks_are_told_as_ever(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    insist_on_interrupts()
    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    assert "ZeroDivisionError" in capsys.readouterr().err
