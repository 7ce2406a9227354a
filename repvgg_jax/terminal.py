"""Text of others on a terminal: names of files and classes may hold what a terminal would obey."""

from __future__ import annotations

import unicodedata

# Categories of control characters, lone surrogates (bytes that are not UTF-8), line and paragraph separators.
_COMMANDS = {"Cc", "Cs", "Zl", "Zp"}
# What turns the direction of the text after it, and so can show one name as another.
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


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
    return unicodedata.category(character) in _COMMANDS or unicodedata.bidirectional(character) in _TURNS


def _escaped(character: str) -> str:
    # A surrogate stands for one byte; the others are escaped as in a literal of Python.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
