"""How a benchmark begins and ends: as the commands of the package do, with one line where it cannot go on."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from repvgg_jax.cli.output import fail, run_command


def whole(text: str) -> int:
    """For argparse: a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def positive(text: str) -> float:
    """For argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number above 0")
    return value


def end_with(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark and exit.

    The status is 0; 1 where memory is short; 2 where an argument is wrong, JAX cannot start, a package is not installed
    or a file cannot be written; 130 where Ctrl-C came. All but 0 come with one line on standard error.
    """

    def guarded(_: object) -> int:
        try:
            main()
        except ModuleNotFoundError as error:
            return fail(f'{error}: pip install -e ".[bench]"', 2)
        except (ValueError, OSError, ImportError) as error:
            return fail(str(error), 2)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            return fail((str(error).strip() or type(error).__name__).splitlines()[0], 1)
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        return 0

    sys.exit(run_command(guarded))
