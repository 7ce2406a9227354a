"""Every block of Python on the pages runs, every command is one, every link leads somewhere, and tables are true."""

import argparse
import ast
import importlib
import importlib.util
import re
import sys
import tomllib

import huggingface_hub.constants
import numpy as np
import pytest
import tyro

from repvgg_jax import VARIANTS, create_model, summarize
from repvgg_jax.cli.exit_status import ExitStatus
from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.cli.predict import predict_command
from repvgg_jax.cli.train import train_command
from repvgg_jax.training import PRESETS
from tests.docs.pages import PAGES, ROOT, blocks, commands, name
from tests.interop.hub_cache import write_hub_cache
from tests.random_variables import random_variables

REFERENCE = ROOT / "docs" / "reference"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = {" ".join(command): command for page in PAGES for command in commands(page)}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_what_the_python_blocks_import_is_there(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    for block in blocks(page, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty directory to run in, where TFDS and the hub hold nothing but published weights made at random."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_blocks_run_in_order(page, workplace):
    if "load_pretrained" in page.read_text():
        published = create_model("repvgg_a0")
        write_hub_cache(workplace / "hub", published, random_variables(published, dtype=np.float32))
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


class Parsed(BaseException):
    """The arguments of a command were understood."""


def parse(command, arguments, monkeypatch):
    """Let a command parse its arguments, and no more."""

    def and_stop(function):
        def parsing(*given, **named):
            function(*given, **named)
            raise Parsed

        return parsing

    monkeypatch.setattr(tyro, "cli", and_stop(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", and_stop(argparse.ArgumentParser.parse_args))
    with pytest.raises(SystemExit if "--help" in arguments else Parsed):
        command(arguments)


OURS = {
    ("python", "train.py"): train_command,
    ("repvgg-train",): train_command,
    ("python", "fuse.py"): fuse_command,
    ("repvgg-fuse",): fuse_command,
    ("python", "-m", "repvgg_jax.predict"): predict_command,
    ("repvgg-predict",): predict_command,
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_every_command_is_understood_by_its_own_parser(command, monkeypatch, capsys):
    command = command[command[0] == "srun" :]
    for start, function in OURS.items():
        if tuple(command[: len(start)]) == start:
            return parse(function, command[len(start) :], monkeypatch)
    if command[:2] == ["python", "-m"] and command[2].startswith("benchmarks."):
        monkeypatch.setattr(sys, "argv", command[2:])
        benchmark = importlib.import_module(command[2])
        return parse(lambda _: benchmark.main(), command[3:], monkeypatch)
    if command[0] == "python" and command[1].startswith("examples/"):
        assert (ROOT / command[1]).is_file()
        return None
    assert command[0] in ("pip", "pytest", "sphinx-build", "tensorboard") or command[:2] == ["python", "-c"], command
    for argument in command[2:] if command[0] == "pip" else []:
        if argument.endswith(".txt"):
            assert (ROOT / argument).is_file()
        if argument.startswith(".["):
            assert set(argument[2:-1].split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_longer_than_110_characters_but_for_tables_addresses_and_what_was_printed(page):
    for line in re.sub(r"```text\n.*?```", "", page.read_text(), flags=re.DOTALL).splitlines():
        assert len(line) <= 110 or line.startswith("|") or " " not in line.strip(), line


def test_the_readme_is_no_longer_than_130_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_into_the_repository_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_table_of_variants_is_true(variant):
    total = summarize(create_model(variant), (224, 224, 3)).total
    row = (
        f"| `{variant}` | {total.training_parameters:,} | {total.deploy_parameters:,} | "
        f"{total.training_multiply_adds / 1e9:.2f} | {total.deploy_multiply_adds / 1e9:.2f} |"
    )
    assert row in (REFERENCE / "variants.md").read_text()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_table_of_presets_is_true(preset):
    config = PRESETS[preset]
    size = str(config.data.image_size)
    if config.data.evaluation_size != config.data.image_size:
        size += f", tested at {config.data.evaluation_size}"
    optimizer = "Muon and SGD" if config.optimization.muon_learning_rate else "SGD"
    row = f"{size} | {config.optimization.epochs} | {config.optimization.batch_size} | {optimizer} |"
    first_table = (REFERENCE / "presets.md").read_text().split("## ")[0]
    (found,) = re.findall(rf"^\| `{preset}` \| .+ \|$", first_table, re.MULTILINE)
    assert found.endswith(f"| {row}")


def test_the_page_of_flags_is_the_one_that_its_script_writes():
    spec = importlib.util.spec_from_file_location("flags", REFERENCE / "flags.py")
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    assert (REFERENCE / "flags.md").read_text() == flags.page()


def test_the_table_of_exit_statuses_is_that_of_the_commands():
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", (REFERENCE / "exit-statuses.md").read_text(), re.MULTILINE)
    assert rows == [(str(each.value), each.name.lower()) for each in ExitStatus]


def test_the_table_of_files_names_all_that_a_run_leaves(finished):
    listed = set(re.findall(r"`([\w.]+)/?`", (REFERENCE / "run-directory.md").read_text()))
    assert {path.name for path in finished.workdir.iterdir()} <= listed


def test_ci_calls_the_test_command_of_the_readme_literally():
    (test_command,) = [block.strip() for block in blocks(ROOT / "README.md", "bash") if "pytest" in block]
    assert f"\n{test_command}\n" in (ROOT / ".ci" / "run").read_text()
