"""The arrows of the layout, and what a plain import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_jax

PACKAGE = Path(repvgg_jax.__file__).parent
LEAVES = {"preprocess", "compilation_cache", "devices", "fields", "files", "terminal", "version"}
MAY_IMPORT = {
    "reparam": set(),
    "ops": set(),
    "transform": {"reparam", "ops"},
    "models": {"reparam", "ops"},
    "data": {"terminal"},
    "interop": {"preprocess", "reparam", "ops", "models", "fields", "files", "terminal", "version"},
    "training": {"reparam", "ops", "models", "data", "interop"} | LEAVES,
}
HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "orbax", "matplotlib", "torch", "sklearn", "tensorboardX")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            assert node.module != "repvgg_jax", f"{path.name} imports from the top, which imports it"
            yield node.module


@pytest.mark.parametrize("part", list(MAY_IMPORT))
def test_arrows_point_one_way(part):
    files = list((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            if module.startswith("repvgg_jax."):
                target = module.split(".")[1]
                assert target == part or target in MAY_IMPORT[part], f"{path.name} imports {module}"
            elif part in ("reparam", "ops"):
                standard = module.split(".")[0] in sys.stdlib_module_names
                assert standard or module.split(".")[0] in ("jax", "numpy"), f"{path.name} imports {module}"


def test_every_part_is_held_by_an_arrow():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, repvgg_jax; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_surface_is_explicit():
    assert set(repvgg_jax.__all__) >= {"create_model", "fuse", "fuse_model", "VARIANTS", "branch_rule", "fuse_with"}
    for name in repvgg_jax.__all__:
        assert getattr(repvgg_jax, name).__doc__
