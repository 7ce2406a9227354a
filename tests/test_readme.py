"""Every code block of the README runs, and its table of variants is true."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import tensorflow_datasets as tfds

from repvgg_jax import VARIANTS, create_model, fuse_model, summarize
from repvgg_jax.cli import fuse as fuse_module
from repvgg_jax.cli import train as train_module
from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.cli.predict import predict_command
from repvgg_jax.cli.train import train_command
from repvgg_jax.interop.safetensors import save_deploy
from repvgg_jax.preprocess import Preprocess
from tests.data.tiny_data import encode, noise, write_tfds
from tests.interop.hub_cache import write_hub_cache
from tests.random_variables import random_variables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# The shortest run of each command; the flags of the README come after and win.
SHORT = ["--depths", "1", "1", "1", "1", "--width-multiplier", "0.25", "0.125", "0.0625", "0.0625", "--epochs", "1"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory to run in, with data of its own."""
    place = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TFDS_DATA_DIR", str(place / "tfds"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield place


def test_what_the_python_blocks_import_is_there(workplace):
    for block in blocks("python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


@pytest.mark.long
def test_the_python_blocks_run_in_order(workplace):
    published = create_model("repvgg_a0")
    write_hub_cache(workplace / "hub", published, random_variables(published, dtype=np.float32))
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["result"].comparison.agreement.predictions_changed == 0
    assert namespace["fused_ensemble"]["params"]["stem"]["reparam"]["kernel"].shape == (3, 3, 3, 3, 48)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_every_shell_command_is_of_a_kind_that_is_tested_here():
    kinds = {tuple(command[:2]) for command in commands()}
    assert kinds == {("pip", "install"), ("python", "train.py"), ("python", "fuse.py"), ("python", "-m"), ("pytest",)}


TRAIN = [c for c in commands() if c[:2] == ["python", "train.py"]]


@pytest.mark.parametrize("command", TRAIN, ids=" ".join)
def test_the_train_commands_are_understood(command, workplace, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "train_and_evaluate", lambda config, workdir: None)
    try:
        status = train_command(command[2:])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 0
    assert "usage" in capsys.readouterr().out or "--help" not in command


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in TRAIN if "--help" not in c], ids=" ".join)
def test_the_train_commands_run(command, workplace, capsys):
    arguments = command[2:]
    preset, flags = ([arguments[0]], arguments[1:]) if arguments[:1] == ["cifar10"] else ([], arguments)
    if preset:
        # Random images under the name of CIFAR-10: the same way in, for 64 of them.
        records = [(encode(noise(32, 32, 3, seed=i)), i % 10) for i in range(64)]
        image = tfds.features.Image(shape=(32, 32, 3))
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
        write_tfds(Path("DIR"), {"train": records, "test": records[:16]}, features=features, called="cifar10")
        flags = ["--batch-size", "32", "--eval-batch-size", "16", *flags]
    assert train_command([*preset, *SHORT, *flags]) == 0
    assert "deploy" in capsys.readouterr().out


FUSE = [c for c in commands() if c[:2] == ["python", "fuse.py"]]


@pytest.mark.parametrize("command", FUSE, ids=" ".join)
def test_the_fuse_commands_are_understood(command, tmp_path, monkeypatch):
    fused = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuse_module, "fuse_run", lambda run, **options: fused.append(run))
    assert fuse_command(command[2:]) == 0
    assert fused == [Path("RUN_DIR")]


@pytest.mark.long
@pytest.mark.parametrize("command", FUSE, ids=" ".join)
def test_the_fuse_commands_run(command, workplace, capsys):
    run = workplace / "RUN_DIR"
    if not run.exists():
        assert train_command([*SHORT, "--workdir", str(run)]) == 0
    assert fuse_command(command[2:]) == 0
    assert "predictions changed" in capsys.readouterr().out


def test_the_prediction_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4)
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    for name in ("RUN_DIR", "IMAGE_OR_DIRECTORY"):
        Path(name).mkdir()
    preprocess = Preprocess(8, 3, (0.5,) * 3, (0.2,) * 3, None, tuple("0123456789"))
    save_deploy(Path("RUN_DIR") / "deploy.safetensors", "repvgg_a0", model, variables, preprocess)
    (Path("IMAGE_OR_DIRECTORY") / "digit.png").write_bytes(encode(noise(8, 8, 1)))
    for command in [c for c in commands() if c[:2] == ["python", "-m"]]:
        assert command[2] == "repvgg_jax.predict"
        assert predict_command(command[3:]) == 0
        assert "digit.png" in capsys.readouterr().out


def test_the_install_commands_name_what_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        if command[0] != "pip":
            continue
        for argument in command[2:]:
            if argument.endswith(".txt"):
                assert (ROOT / argument).is_file()
            if argument.startswith(".["):
                assert argument[2:-1] in extras


def test_ci_calls_the_test_command_of_the_readme_literally():
    (test_command,) = [block.strip() for block in blocks("bash") if "pytest" in block]
    assert f"\n{test_command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_table_of_variants_is_true(name):
    total = summarize(create_model(name), (224, 224, 3)).total
    row = (
        f"| `{name}` | {total.training_parameters:,} | {total.deploy_parameters:,} | "
        f"{total.training_multiply_adds / 1e9:.2f} | {total.deploy_multiply_adds / 1e9:.2f} |"
    )
    assert row in README


def test_every_link_into_the_repository_leads_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 4
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target
