"""Paths of run directories: which are taken, and how a directory of any name is shown to Orbax."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repvgg_jax.terminal import printable

# To Orbax '[', '?' and '*' are patterns, to TensorStore a backslash and 'gs:' are syntax; what is not UTF-8 is no text
# to it, and 4096 bytes, from which the names inside a checkpoint are still to be taken, are the system's limit.
_PLAIN = re.compile(r"[\w./\\,=+@%~ -]*" if os.name == "nt" else r"[\w./,=+@%~ -]*")
_LONGEST = 2000
# One letter would be a drive of Windows.
_URL = re.compile(r"\w[\w+.-]+:/")
_UNREADABLE = "is a path that Orbax would misread: name a directory of letters, digits and ._-,=+"


def run_directory(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a run directory, with `~` replaced.

    A later change of the working directory moves nothing then.

    Raises:
      ValueError: If the path is a URL, begins with the `~` of nobody, or holds a NUL.
    """
    path = Path(path)
    if _URL.match(os.fspath(path)):
        raise ValueError(
            f"{path} is a URL: expected a directory of this machine; mount the bucket (gcsfuse, mount-s3), or copy the "
            "run afterwards"
        )
    if "\0" in os.fspath(path):
        raise ValueError(f"{str(path)!r} holds a NUL: expected a path that the system allows")
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{path} has no such home directory ({error}): expected a path without ~") from None


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Yield a path to a directory, made if it is not there, that Orbax and TensorStore take for nothing else.

    It is the directory's own path where that is plain. Otherwise it is a link in a temporary directory, which is gone
    at the end.

    Raises:
      ValueError: If no link can be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if _is_plain(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="repvgg_jax-run-") as place:
        link = Path(place) / "directory"
        try:
            link.symlink_to(directory, target_is_directory=True)
        except OSError as error:
            raise ValueError(f"{directory} {_UNREADABLE}, and no link to it can be made ({error})") from None
        if not _is_plain(link):
            raise ValueError(f"{directory} {_UNREADABLE}, and so is the temporary directory {place}: set TMPDIR")
        yield link


def _is_plain(path: Path) -> bool:
    name = os.fspath(path)
    return _PLAIN.fullmatch(name) is not None and printable(name) == name and len(os.fsencode(name)) <= _LONGEST
