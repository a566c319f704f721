"""A standard error that says it is a terminal."""

import sys
from io import StringIO

import pytest


class Terminal(StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called by the test itself: between a fixture and its test pytest puts back what it captures with."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal
