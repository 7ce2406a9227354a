"""Writes flags.md, every flag of the commands, from the classes that parse them: `python docs/reference/flags.py`."""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any

from repvgg_jax.cli import fuse, predict, train
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.distributed import Cluster
from repvgg_jax.training.export.int8 import Int8Settings

PARTS = {field.name: type(getattr(TrainConfig(), field.name)) for field in dataclasses.fields(TrainConfig)}
INTRODUCTION = """# Flags

This page is generated from the classes that parse the commands (`python docs/reference/flags.py`).
Every command explains its flags with `--help`.

## Train

`python train.py [PRESET] [FLAGS]`, or `repvgg-train`. The defaults below are those of `TrainConfig`. A
[preset](presets.md) has its own, which `python train.py PRESET --help` shows. A switch such as `--flip` is
turned off by `--no-flip`. In Python each flag is a setting:
`PRESETS["cifar10"].replace(epochs=10, cutout=0)`.
"""


def explanations(kind: type) -> dict[str, str]:
    """The text below each field of a class, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def shown(value: Any) -> str:
    """A default as it would be typed."""
    if value in (None, "", (), dataclasses.MISSING):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def table(kind: type) -> str:
    """A row for each field of a class that has a text."""
    texts = explanations(kind)
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name in texts:
            name = {"as_json": "json"}.get(field.name, field.name).replace("_", "-")
            flag = name.upper() if "Positional" in str(field.type) else f"--{name}"
            text = texts[field.name].replace("|", "\\|")
            rows.append(f"| `{flag}` | {shown(field.default)} | {text} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    sections = [INTRODUCTION]
    for name, kind in PARTS.items():
        if dataclasses.is_dataclass(kind):
            sections.append(f"### {name.capitalize()}\n\n{kind.__doc__}\n\n{table(kind)}\n")
    seed = table(TrainConfig).splitlines()[-1]
    sections.append(f"### Run\n\n{table(train._Arguments)}\n{seed}\n")
    sections.append(f"### Cluster\n\n{Cluster.__doc__}\n\n{table(Cluster)}\n")
    sections.append(f"## Fuse\n\n`python fuse.py SOURCE [FLAGS]`, or `repvgg-fuse`.\n\n{table(fuse._Arguments)}\n")
    sections.append(f"### 8 bits\n\n{Int8Settings.__doc__}\n\n{table(Int8Settings)}\n")
    usage = "`python -m repvgg_jax.predict WEIGHTS IMAGES… [FLAGS]`, or `repvgg-predict`."
    sections.append(f"## Predict\n\n{usage}\n\n{table(predict._Arguments)}\n")
    return "\n".join(sections)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
