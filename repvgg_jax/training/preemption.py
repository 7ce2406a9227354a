"""Signals that ask a run to stop: finish the step, save, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class TerminatedError(RuntimeError):
    """SIGTERM came, as a scheduler sends it before it takes the machine away. The run was saved."""


class Interruption:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def at_step(self, step: int) -> bool:
        """Return whether to stop before this step, counted from 0. All processes call it at each, and stop at the same.

        Several processes leave SIGTERM to JAX, which tells all of them and finds a step that none has passed. Ctrl-C
        stops them at once.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return bool(self)

    def exception(self, message: str) -> BaseException:
        """Return what to raise when the run has been saved."""
        return KeyboardInterrupt(message) if self.signal == signal.SIGINT else TerminatedError(message)


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Note SIGTERM and the first SIGINT (Ctrl-C, a notebook's stop button) instead of stopping at once.

    The second SIGINT stops at once. No handlers are set outside of the main thread, where Python allows none, and among
    several processes, where JAX has its own.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
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
