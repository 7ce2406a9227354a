"""Search for a data set that TFDS has prepared on disk, with advice on how to get it there."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from repvgg_jax.terminal import printable

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w+.-]+))?(:(?P<version>(\d+|\*)\.(\d+|\*)\.(\d+|\*)))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)


def tfds_directory(data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the directory of TFDS data sets.

    It is `data_dir`, or else that which `TFDS_DATA_DIR` names, or else `~/tensorflow_datasets`.

    Returns:
      An absolute path, so that nobody expands a `~` in it again.

    Raises:
      FileNotFoundError: If it begins with a home directory that is not known.
      ValueError: If its name is not UTF-8, as the files in it must have it.
    """
    root = expand_home(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").absolute()
    try:
        str(root).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data_dir {printable(str(root))} is not UTF-8: array_record files can neither be written nor read there; "
            "name another, or a link to it"
        ) from error
    return root


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` or `~USER` at its beginning replaced by the home directory.

    Args:
      path: The path as text, since a `Path` does not tell `./~USER`, which is a directory of that name, from `~USER`.

    Raises:
      FileNotFoundError: If there is no such user, or no home directory is known.
    """
    named = os.fspath(path)
    expanded = os.path.expanduser(named)
    if named.startswith("~") and expanded == named:
        raise FileNotFoundError(
            f"{printable(named)} begins with the home directory of a user, which is not known here: write "
            "the directory out, or ./~NAME for a directory of that name"
        )
    return Path(expanded)


def locate(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """Find the directory of a prepared data set, without importing its builder.

    Args:
      name: `NAME[/CONFIG][:VERSION]`. The newest matching version is taken. The config may be left out where only one
        is prepared.
      data_dir: Directory that TFDS prepares into, or None for its default.

    Returns:
      The directory, e.g. `DATA_DIR/cifar10/3.0.2`.

    Raises:
      FileNotFoundError: If `data_dir` is missing, or the data set has not been prepared there. The message gives the
        command that prepares it.
      ValueError: If there is no such name, there are several configs to choose from, or `data_dir` is not UTF-8.
    """
    root = tfds_directory(data_dir)
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is no data set name; expected 'digits', 'folder:PATH' or a TFDS name such as "
            "'cifar10', 'name/config' or 'name/config:1.0.0'"
        )
    base = root / match["name"]
    if not base.is_dir():
        _check_known(match["name"], root)
        if data_dir is not None and not root.is_dir():
            raise FileNotFoundError(
                f"data_dir {root} does not exist; create it, or prepare {name!r} into it once:\n"
                + prepare_command(name, root)
            )
    parent = base / match["config"] if match["config"] else _only_config(base, name)
    wanted = re.compile((match["version"] or "*.*.*").replace(".", r"\.").replace("*", r"\d+"))
    versions = [path for path in _versions(parent) if wanted.fullmatch(path.name)]
    if not versions:
        found = ", ".join(str(path.relative_to(root)) for path in _prepared(base)) or "nothing"
        raise FileNotFoundError(
            f"data set {name!r} has not been prepared in {root} (found: {found}). "
            "Preparing needs TensorFlow once, reading does not. Run, here or elsewhere:\n" + prepare_command(name, root)
        )
    return versions[-1]


def prepare_command(name: str, data_dir: str | os.PathLike[str]) -> str:
    """Return the shell command that prepares a TFDS data set so that it can be read without TensorFlow."""
    return (
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, data_dir={str(data_dir)!r}, file_format='array_record')"
        '.download_and_prepare()"'
    )


def _versions(parent: Path) -> list[Path]:
    """Return the prepared versions, oldest first. What an interrupted preparation left behind has another name."""
    if not parent.is_dir():
        return []
    found = [
        path for path in parent.iterdir() if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    ]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def _configs(base: Path) -> list[Path]:
    return [path for path in sorted(base.iterdir()) if _versions(path)] if base.is_dir() else []


def _prepared(base: Path) -> list[Path]:
    return _versions(base) + [version for config in _configs(base) for version in _versions(config)]


def _only_config(base: Path, name: str) -> Path:
    configs = _configs(base)
    if _versions(base) or not configs:
        return base
    if len(configs) > 1:
        names = ", ".join(f"'{base.name}/{config.name}'" for config in configs)
        raise ValueError(f"data set {name!r} has several configs in {base}; choose one of {names}")
    return configs[0]


def _check_known(name: str, root: Path) -> None:
    import tensorflow_datasets as tfds

    known = {"digits", *tfds.list_builders(with_community_datasets=False)}
    if name in known:
        return
    if root.is_dir():
        known |= {path.name for path in root.iterdir() if _prepared(path)}
    close = difflib.get_close_matches(name.lower(), sorted(known), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "nothing has a similar name;"
    raise ValueError(
        f"unknown data set {name!r}: {hint} Expected 'digits', 'folder:PATH', a TFDS name, or the name "
        f"of a data set prepared in {root}"
    )
