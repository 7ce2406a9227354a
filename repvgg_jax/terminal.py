"""What a command prints: text of others, which a terminal might obey, and readers that go away."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Categories of control characters, lone surrogates (bytes that are not UTF-8), line and paragraph separators.
_COMMANDS = {"Cc", "Cs", "Zl", "Zp"}
# What turns the direction of the text beside it unseen, and so can show one name as another: signs, and marks.
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = "\u200e\u200f\u061c"


def printable(text: str) -> str:
    r"""Text as one line that a terminal only shows.

    Args:
        text: any string, e.g. a file name as `os.fsdecode` gives it.

    Returns:
        The text with an escape, as `repr` writes it, in the place of every control character (line ends and tabs too),
        of what turns the direction of writing, and of every byte that was not UTF-8.

    Example:
        >>> print(printable("cat\x1b[2J\n100 % dog"))
        cat\x1b[2J\n100 % dog
    """
    return "".join(_escaped(character) if _commands(character) else character for character in text)


def _commands(character: str) -> bool:
    turns = character in _MARKS or unicodedata.bidirectional(character) in _TURNS
    return turns or unicodedata.category(character) in _COMMANDS


def _escaped(character: str) -> str:
    # A surrogate stands for one byte; the others are escaped as in a literal of Python.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def fail(message: str, status: int) -> int:
    """Print `error: MESSAGE` on standard error, as one line, and return the exit status."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return status


def one_line(message: str) -> str:
    """A message as one line that a terminal only shows: its line ends become spaces, names in it as in `printable`."""
    return printable(" ".join(message.split("\n")))


class Output:
    """What became of standard output.

    Attributes:
      failure: of the first write that failed, or None.
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

    No `print` fails: what cannot be written is passed over, where the reader of a pipe has gone away, a terminal has
    hung up, a disk is full, or a stream was closed from the start. A character that the encoding lacks is escaped.

    Args:
      command: returns an exit status; it is told what becomes of its output, which may be all that it is there for.

    Returns:
      Its exit status; 2, with the reason on standard error, where that is 0 and what it printed is lost.
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
        """Write, or pass over."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write out, or pass over."""
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
