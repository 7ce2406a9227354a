"""Make small mistakes in the core, one at a time, and count those that the tests notice.

`pip install -e ".[mutants]"`, then `python -m tests.mutants reparam transform ops`. There are thousands of mistakes, a
few seconds each; `--every 20` takes each twentieth. They are Cosmic Ray's (https://github.com/sixty-north/cosmic-ray):
a number one larger or smaller, + for -, < for <=, a condition turned round, a loop that is not run, a decorator left
out.
"""

from __future__ import annotations

import argparse
import difflib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# What is asked of each package: the tests that mirror it, and those that hold its gradients.
TESTS = {
    "reparam": ["tests/reparam"],
    "transform": ["tests/transform"],
    "ops": ["tests/ops", "tests/models/test_operations.py"],
}
# One replacement for each operator of Python: what notices + in place of - notices the others too. `|` stands in
# annotations alone.
OPERATORS = [
    "NumberReplacer",
    "AddNot",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceContinueWithBreak",
    "ReplaceBreakWithContinue",
    "ZeroIterationForLoop",
    "RemoveDecorator",
]
# Flags that forbid what right code does not do: without them it does the same.
CHECKS = ("strict=", "frozen=")


class Mutant(NamedTuple):
    """A file with one mistake in it."""

    path: Path
    operator: str
    occurrence: int

    def source(self) -> str:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        operator = get_operator(f"core/{self.operator}")()
        return str(mutate_code((ROOT / self.path).read_text(), operator, self.occurrence))

    def difference(self) -> str:
        before, after = (ROOT / self.path).read_text().splitlines(), self.source().splitlines()
        lines = difflib.unified_diff(before, after, str(self.path), self.operator, lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def mutants(package: str) -> Iterator[Mutant]:
    """All mistakes in a package, file by file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    for path in sorted((ROOT / "repvgg_jax" / package).rglob("*.py")):
        text = path.read_text()
        lines, nodes = text.splitlines(), list(ast_nodes(get_ast(text)))
        for name in OPERATORS:
            operator = get_operator(f"core/{name}")()
            places = (place for node in nodes for place in operator.mutation_positions(node))
            for occurrence, ((row, column), _) in enumerate(places):
                if not lines[row - 1][:column].endswith(CHECKS):
                    yield Mutant(path.relative_to(ROOT), name, occurrence)


def serve(checkout: Path, pipe: Connection) -> None:
    """Run the tests that are asked for, again and again, in one process: JAX keeps what it has compiled."""
    import pytest

    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    sys.dont_write_bytecode = True
    while True:
        tests = pipe.recv()
        for name in [name for name in sys.modules if name.split(".")[0] in ("repvgg_jax", "tests", "conftest")]:
            del sys.modules[name]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", *tests])
        pipe.send(int(status))


class Checkout:
    """A copy of the tracked files, and a process that tests it."""

    def __init__(self, root: Path):
        self.root = root
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, tracked.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.root, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def notices(self, mutant: Mutant, limit: float) -> bool:
        """Whether the tests fail, end the process, or do not end in `limit` seconds."""
        original = (self.root / mutant.path).read_text()
        (self.root / mutant.path).write_text(mutant.source())
        try:
            return self.fails(TESTS[mutant.path.parts[1]], limit)
        finally:
            (self.root / mutant.path).write_text(original)

    def fails(self, tests: list[str], limit: float) -> bool:
        self.pipe.send(tests)
        try:
            if self.pipe.poll(limit):
                return bool(self.pipe.recv())
        except EOFError:
            pass
        self.process.kill()
        self.start()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", choices=list(TESTS))
    parser.add_argument("--every", type=int, default=1, help="take each N-th mistake of a package")
    parser.add_argument("--first", type=int, default=0, help="the first that is taken, counted from 0")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which the tests count as failed")
    parser.add_argument("--workers", type=int, default=2, help="how many mistakes are tried at a time")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        # Programs that a mistake leaves as they are need not be compiled again.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
        free: SimpleQueue[Checkout] = SimpleQueue()
        for worker in range(arguments.workers):
            free.put(Checkout(Path(scratch, str(worker))))

        def attempt(mutant: Mutant) -> bool:
            checkout, start = free.get(), time.monotonic()
            try:
                noticed = checkout.notices(mutant, arguments.limit)
            finally:
                free.put(checkout)
            print(f"{time.monotonic() - start:4.0f} s, {'noticed' if noticed else 'NOT NOTICED'}: {mutant}", flush=True)
            if not noticed:
                print(mutant.difference(), flush=True)
            return noticed

        for package in arguments.packages:
            checkout = free.get()
            if checkout.fails(TESTS[package], arguments.limit):
                sys.exit(
                    f"{' '.join(TESTS[package])} fail without a mistake: expected them to pass, or a longer --limit"
                )
            free.put(checkout)
            chosen = list(mutants(package))[arguments.first :: arguments.every]
            with ThreadPoolExecutor(arguments.workers) as pool:
                noticed = sum(pool.map(attempt, chosen))
            print(
                f"{package}: {noticed} of {len(chosen)} mistakes were noticed, {noticed / len(chosen):.1%}", flush=True
            )


if __name__ == "__main__":
    main()
