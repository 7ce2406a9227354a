"""Text of others, such as the name of a file, in a form that is safe to show in a terminal."""

from __future__ import annotations

import unicodedata

# Categories of control characters, lone surrogates (bytes that are not UTF-8), line and paragraph separators.
_COMMANDS = {"Cc", "Cs", "Zl", "Zp"}
# What turns the direction of the text beside it unseen, and so can show one name as another: signs, and marks.
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = "\u200e\u200f\u061c"


def printable(text: str) -> str:
    r"""Return text as one line that a terminal only shows.

    Args:
      text: Any string, e.g. a file name as `os.fsdecode` gives it.

    Returns:
      The text with an escape, as `repr` writes it, in the place of every control character (line ends and tabs too), of
      what turns the direction of writing, and of every byte that was not UTF-8.

    Example:
      >>> from repvgg_jax.terminal import printable
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


def one_line(message: str) -> str:
    """Return a message as one line that a terminal only shows.

    Its line ends become spaces, and names in it are escaped as by `printable`.
    """
    return printable(" ".join(message.split("\n")))
