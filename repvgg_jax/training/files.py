"""Writing a file whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text as `replace_whole` does.

    Raises:
      OSError: it could not be written; the file is named.
    """
    replace_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and rename, so that a process killed at any moment leaves the old file or the new.

    Args:
      path: of the file.
      write: writes to the path it is given.

    Raises:
      OSError: it could not be written; the file is named, and the half of it that was is gone.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
