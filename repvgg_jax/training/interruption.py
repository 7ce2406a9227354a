"""Signals that ask a run to stop: finish the step, save, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(RuntimeError):
    """SIGTERM came, as a scheduler sends it before it takes the machine away; the run was saved."""


class Interruption:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def exception(self, message: str) -> BaseException:
        """What to raise when the run has been saved."""
        return KeyboardInterrupt(message) if self.signal == signal.SIGINT else TerminatedError(message)


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Note SIGTERM and the first SIGINT (Ctrl-C, a notebook's stop button) instead of stopping at once.

    The second SIGINT stops at once. Outside of the main thread, where Python allows no handlers, nothing is noted.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interruption and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.signal = signal.Signals(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
