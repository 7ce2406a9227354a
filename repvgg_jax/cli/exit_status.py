"""The exit statuses of the commands, and the one line that a command ends with where it fails."""

from __future__ import annotations

import enum
import signal
from collections.abc import Callable, Mapping

import jax

from repvgg_jax.cli.output import Output, fail, run_command


class ExitStatus(enum.IntEnum):
    """The exit statuses of the commands, with the same meaning for all of them."""

    DONE = 0
    # Training diverged, the two forms differ, an image could not be read, memory ran out.
    FAILED = 1
    # An argument is wrong, a file is missing or cannot be written.
    USAGE = 2
    # As the shell reports a process that the signal ended: schedulers take it for preempted and start the job again.
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


STATUSES = (
    "The exit status is 0 when all is done; 1 when training or a proof failed, an image could not be read, or memory "
    "ran out; 2 when an argument is wrong, or a file is missing or cannot be written; 130 or 143 when Ctrl-C or "
    "SIGTERM stopped the command."
)


def guard(
    command: Callable[[Output], int],
    *,
    remedy: str = "",
    failures: Mapping[type[Exception], ExitStatus] = {},  # read alone
) -> int:
    """Run a command, and turn what stopped it into one line and an exit status.

    Args:
      command: The command. It is given what becomes of its output, and returns an exit status.
      remedy: What to do about an error of the system, e.g. a file that cannot be written; or ''.
      failures: The command's own errors, with their exit statuses.

    Returns:
      The exit status.
    """

    def guarded(output: Output) -> int:
        try:
            return command(output)
        except tuple(failures) as error:
            return fail(str(error), next(failures[kind] for kind in type(error).__mro__ if kind in failures))
        except KeyboardInterrupt as error:
            return fail(str(error) or "interrupted", ExitStatus.INTERRUPTED)
        except (ValueError, OSError, ImportError) as error:
            system = isinstance(error, OSError) and error.errno is not None
            return fail(f"{error}{f'; {remedy}' if system and remedy else ''}", ExitStatus.USAGE)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            return fail(f"{said}: where memory is short, lower --batch-size and --eval-batch-size", ExitStatus.FAILED)

    return run_command(guarded)
