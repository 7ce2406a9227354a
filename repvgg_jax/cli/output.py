"""The output of a command, and readers of it that go away."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from repvgg_jax.terminal import one_line


def fail(message: str, status: int) -> int:
    """Print `error: MESSAGE` on standard error, as one line, and return the exit status."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return status


class Output:
    """The fate of standard output.

    Attributes:
      failure: The error of the first write that failed, or None.
    """

    # A pipe without a reader, a terminal that has hung up, a descriptor that is closed or not for writing.
    _ENDS = (errno.EPIPE, errno.ESHUTDOWN, errno.EIO, errno.EBADF)

    def __init__(self) -> None:
        self.failure: OSError | None = None

    @property
    def ended(self) -> bool:
        """Whether the reader has gone away, as `head` does when it has seen enough."""
        return self.failure is not None and self.failure.errno in self._ENDS

    @property
    def lost(self) -> bool:
        """Whether something was to be read and could not be written, e.g. because the disk is full."""
        return self.failure is not None and not self.ended


def run_command(command: Callable[[Output], int]) -> int:
    """Run a command whose work does not depend on what it prints.

    No `print` fails. What cannot be written is skipped, whether the reader of a pipe has gone away, a terminal has hung
    up, a disk is full, or a stream was closed from the start. A character that the encoding lacks is escaped.

    Args:
      command: The command. It returns an exit status, and is told what becomes of its output, which may be all that it
        is there for.

    Returns:
      Its exit status. Where that is 0 and what it printed is lost, it is 2, with the reason on standard error.
    """
    output = Output()
    try:
        with _tolerant(output):
            status = command(output)
    except SystemExit as exit_:  # of a --help
        if exit_.code or not output.lost:
            raise
        status = 0
    return 2 if output.lost and status == 0 else status


@contextlib.contextmanager
def _tolerant(output: Output) -> Iterator[None]:
    # One that was closed stays open from now on: the next file would get its number, and what libraries print.
    streams: list[Any] = [stream or io.TextIOWrapper(io.FileIO(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]
    wrappers = [stream for stream in streams if isinstance(stream, io.TextIOWrapper)]
    handlers = [(stream, stream.errors) for stream in wrappers]
    for stream in wrappers:
        stream.reconfigure(errors="backslashreplace")
    shown: list[Any] = [_Tolerant(streams[0], output), _Tolerant(streams[1], Output())]
    sys.stdout, sys.stderr = shown
    try:
        yield
    finally:
        sys.stdout.flush()
        if output.lost:
            fail(f"standard output cannot be written: {output.failure}", 2)
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for stream, errors in handlers:
            stream.reconfigure(errors=errors)


class _Tolerant:
    """A stream whose writes do not fail; all else is the stream's own."""

    def __init__(self, stream: TextIO, output: Output):
        self._stream, self._output = stream, output

    def write(self, text: str) -> int:
        """Write a text, or skip it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write out what is in the buffer, or skip it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self._output.failure is not None:
            return
        try:
            action()
        except OSError as error:
            self._output.failure = error
            # Python writes out what is still in the buffer when it ends, and would complain.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
