"""The arrows of the layout, and what a plain import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_jax

PACKAGE = Path(repvgg_jax.__file__).parent
# Each part, from the ground up, and the parts that it may import; leaves import leaves alone.
LEAVES = {"fields", "files", "invocation", "preprocess", "terminal", "version"}
MAY_IMPORT = {
    "fields": set(),
    "files": set(),
    "invocation": set(),
    "terminal": set(),
    "version": set(),
    "preprocess": {"fields"},
    "reparam": set(),
    "ops": set(),
    "data": {"preprocess", "terminal"},
    "transform": {"reparam", "ops"},
    "optimizers": set(),
    "models": {"reparam", "ops"},
    "quantize": {"ops", "models"},
    "interop": {"reparam", "ops", "models", "quantize"} | LEAVES,
    "predict": {"ops", "data", "models", "interop"} | LEAVES,
    "training": {"reparam", "ops", "data", "models", "quantize", "interop"} | LEAVES,
    "cli": {"reparam", "ops", "data", "models", "interop", "predict", "training"} | LEAVES,
}
# `python -m repvgg_jax.predict` is a command, like train.py.
SCRIPTS = {PACKAGE / "predict" / "__main__.py"}
HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "orbax", "matplotlib", "torch", "sklearn", "tensorboardX")
# What the extras that the package itself uses bring, and the modules that are nothing without them.
EXTRAS = ("flatbuffers", "huggingface_hub", "onnx", "onnxruntime", "qwix")
NEED_ONNX = ("onnx", "onnx_file", "onnx_int8")


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in {PACKAGE / "__init__.py", *SCRIPTS}]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            assert node.module != "repvgg_jax", f"{path.name} imports from the top, which imports it"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    for module in imports(path):
        if module.startswith("repvgg_jax."):
            target = module.split(".")[1]
            assert target == part(path) or target in MAY_IMPORT[part(path)], module
        elif part(path) in ("reparam", "ops"):
            standard = module.split(".")[0] in sys.stdlib_module_names
            assert standard or module.split(".")[0] in ("jax", "numpy"), module


def test_the_arrows_make_no_circle():
    order = list(MAY_IMPORT)
    for name, targets in MAY_IMPORT.items():
        assert all(order.index(target) < order.index(name) for target in targets), name


def test_every_module_and_folder_is_held_by_an_arrow():
    assert {part(path) for path in FILES} == set(MAY_IMPORT)
    assert {path.parent for path in FILES} == {init.parent for init in PACKAGE.rglob("__init__.py")}


def test_importing_the_package_loads_nothing_heavy():
    code = f"""
import sys, repvgg_jax
assert "jax" not in sys.modules  # until something is asked for, so that a command can set up its process first
for name in repvgg_jax.__all__:
    getattr(repvgg_jax, name)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_but_the_onnx_files_is_imported_without_any_extra():
    code = f"""
import importlib, sys
for name in {EXTRAS!r}:
    sys.modules[name] = None  # so that importing it fails, as where it is not installed
without = []
for name in {[module_name(path) for path in FILES]!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "needs the extra" in str(error) or "need the extra" in str(error), (name, error)
        without.append(name)
print(sorted(without))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(result.stdout) == [f"repvgg_jax.interop.{name}" for name in NEED_ONNX]


def test_a_command_settles_its_process_before_it_loads_jax():
    code = "import sys, repvgg_jax.cli.start, repvgg_jax.predict; print('jax' in sys.modules, 'tyro' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False False"


def test_the_public_surface_is_explicit():
    assert set(repvgg_jax.__all__) >= {
        "create_model",
        "fuse",
        "fuse_model",
        "VARIANTS",
        "branch_rule",
        "fuse_with",
        "expand",
    }
    assert set(repvgg_jax.__all__) <= set(dir(repvgg_jax))
    for name in repvgg_jax.__all__:
        assert getattr(repvgg_jax, name).__doc__
    with pytest.raises(AttributeError, match="module 'repvgg_jax' has no attribute 'absent'"):
        _ = repvgg_jax.absent
