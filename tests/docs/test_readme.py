"""What the README tells to type first works as it is typed, from training to fusing, and prints what it shows."""

import re

import pytest

from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.cli.train import train_command
from tests.docs.pages import ROOT, blocks, commands

README = ROOT / "README.md"
# The shortest run: the flags of the README come after and win.
SHORT = ["--depths", "1", "1", "1", "1", "--width-multiplier", "0.25", "0.125", "0.0625", "0.0625", "--epochs", "1"]


@pytest.mark.long
def test_the_two_commands_train_and_fuse_and_print_the_table_that_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, fuse = (command for command in commands(README) if command[0] == "python")
    assert train == ["python", "train.py"]
    assert train_command([*SHORT, *train[2:], "--workdir", "RUN_DIR"]) == 0
    printed = capsys.readouterr().out
    assert fuse_command(fuse[2:]) == 0
    printed_again = capsys.readouterr().out
    (table,) = blocks(README, "text")
    labels = [re.split(r"\s{2,}", line.strip())[0] for line in table.splitlines()]
    assert len(labels) == 9
    for label in labels:
        label = re.sub(r"batch \d+", "batch", label)
        assert label.split("(")[0].strip() in printed
        assert label.split("(")[0].strip() in printed_again
