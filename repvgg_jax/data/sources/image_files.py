"""Search for image files in directories. Training and prediction both read what is found here, and nothing else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from repvgg_jax.terminal import printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What archives, network drives and file systems put among one's files: copies and thumbnails of them, and rubbish.
_SYSTEM_DIRECTORIES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_KINDS_SHOWN = 5


class LeftOut(NamedTuple):
    """Something that was found and is not read.

    Attributes:
      kind: What it is, e.g. '.tif' or 'broken link'.
      path: Its path.
    """

    kind: str
    path: str


@dataclass
class Found:
    """The result of a search.

    Attributes:
      images: Paths of image files.
      directories: Paths of directories that the search did not enter.
      left_out: All else.
      unreadable: The reason for each directory that could not be read.
    """

    images: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def list_directory(directory: str | os.PathLike[str]) -> Found:
    """Sort the entries of one directory into images, directories and what is left out.

    Links count as what they lead to. Hidden names, which start with a dot, and directories of the system such as
    `__MACOSX` are not mentioned at all.

    Args:
      directory: The directory.

    Returns:
      What is in it, each list sorted by name. An image is a file with one of `EXTENSIONS`, in capital or small letters.
    """
    found = Found()
    directory = str(Path(directory))
    try:
        with os.scandir(directory) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        found.unreadable[directory] = error.strerror or str(error)
        return found
    for entry in entries:
        if entry.name.startswith(".") or entry.name in _SYSTEM_DIRECTORIES:
            continue
        path = entry.name if directory == os.curdir else entry.path
        kind = _kind(entry)
        if kind == "directory":
            found.directories.append(path)
        elif kind in EXTENSIONS:
            found.images.append(path)
        else:
            found.left_out.append(LeftOut(kind, path))
    return found


def find_images(directory: str | os.PathLike[str], read: set[tuple[int, int]] | None = None) -> Found:
    """Find the images in a directory and below it, as `list_directory` does in one.

    Linked directories are entered, but none is read twice, and neither is one that the directory itself lies in: links
    may lead in circles.

    Args:
      directory: Where to search.
      read: Directories (device, inode) that earlier searches have read. This one leaves them out, and adds its own.

    Returns:
      What was found. The images are sorted by path, and no directory is left to enter.
    """
    found = Found()
    pending = deque([str(Path(directory))])
    read = set() if read is None else read
    around = {_identity(above) for above in Path(directory).resolve().parents}
    while pending:
        path = pending.popleft()
        try:
            identity = _identity(path)
        except OSError as error:
            found.unreadable[path] = error.strerror or str(error)
            continue
        if identity in read or identity in around:
            found.left_out.append(LeftOut("link in a circle, or to a directory that is read already", path))
            continue
        read.add(identity)
        here = list_directory(path)
        # Links come last, so that a file is found where it lies rather than by a link to its directory.
        pending.extendleft(below for below in reversed(here.directories) if not os.path.islink(below))
        pending.extend(below for below in here.directories if os.path.islink(below))
        found.images += here.images
        found.left_out += here.left_out
        found.unreadable |= here.unreadable
    found.images.sort()
    return found


def describe_left_out(left_out: Iterable[LeftOut], root: str | os.PathLike[str]) -> str:
    """Return one line that counts what was left out by kind, with an example of each; empty where nothing was."""
    kinds: dict[str, list[str]] = {}
    for kind, path in left_out:
        kinds.setdefault(kind, []).append(os.path.relpath(path, root))
    if not kinds:
        return ""
    total = sum(map(len, kinds.values()))
    shown = sorted(kinds.items(), key=lambda item: -len(item[1]))[:_KINDS_SHOWN]
    parts = [f"{len(paths)} {kind} ({paths[0]}{', …' if len(paths) > 1 else ''})" for kind, paths in shown]
    others = total - sum(len(paths) for _, paths in shown)
    parts += [f"{others} of other kinds"] if others else []
    return printable(f"{os.fspath(root)}: {total} left out: {', '.join(parts)}")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "directory"
        if not entry.is_file():
            return "no regular file" if os.path.exists(entry.path) else "broken link"
    except OSError:  # a link that leads in a circle, or behind a directory that may not be entered
        return "broken link"
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix if suffix[1:].isalnum() and len(suffix) <= 6 else "without a known extension"
