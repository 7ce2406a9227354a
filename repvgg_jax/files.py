"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a text, in UTF-8, or bytes, as `replace_whole` does.

    Raises:
      OSError: If it could not be written. The file is named.
    """
    encoded = content.encode() if isinstance(content, str) else content
    replace_whole(path, lambda partial: partial.write_bytes(encoded))


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside a file and rename, so that a process killed at any moment leaves the old file or the new.

    Args:
      path: The file.
      write: Writes to the path that it is given, with the permissions that the umask leaves.

    Raises:
      OSError: If it could not be written. The file is named, and the half of it that was written is gone.
    """
    partial = _partial(path)
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        _remove(partial)
        raise _named(error, path) from error
    except BaseException:
        _remove(partial)
        raise


def require_writable(path: Path) -> None:
    """Check that a file can be written, before the work that makes its content.

    Raises:
      OSError: If its folder is missing or cannot be written to, or something else than a file has its name.
    """
    partial = _partial(path)
    try:
        partial.touch()
    except OSError as error:
        raise _named(error, path) from error
    _remove(partial)


def _partial(path: Path) -> Path:
    # A rename would put a file in the place of a device, e.g. /dev/null.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "there is something other than a file of this name", str(path))
    return path.with_name(path.name + ".partial")


def _named(error: OSError, path: Path) -> OSError:
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def _remove(partial: Path) -> None:
    try:
        partial.unlink()
    except OSError:  # It was never there, or cannot be removed, as the error that led here says.
        return
