"""Writing a text file whole or not at all."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a process killed at any moment leaves the old or the new text."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
