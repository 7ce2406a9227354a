import errno
import re

import jax
import pytest

from repvgg_jax.cli.exit_status import STATUSES, ExitStatus, guard


class PairError(ValueError):
    """A kind of its own among those that are bad input."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("size is 0"), 2, "size is 0"),
        (ImportError("no onnx"), 2, "no onnx"),
        (OSError(errno.ENOSPC, "No space left"), 2, "[Errno 28] No space left; make room"),
        (FileNotFoundError("there is none"), 2, "there is none"),
        (PairError("differ"), 1, "differ"),
        (MemoryError(), 1, "MemoryError: where memory is short, lower --batch-size and --eval-batch-size"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a\nb"), 1, "RESOURCE_EXHAUSTED: a: where memory is short, "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
    ],
)
def test_what_stops_a_command_is_one_line_and_a_status(error, status, line, capsys):
    def command(_):
        raise error

    assert guard(command, remedy="make room", failures={PairError: ExitStatus.FAILED}) == status
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"error: {line}")


def test_an_error_of_our_own_making_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guard(lambda _: 1 // 0)


def test_the_status_of_a_command_that_ends_is_its_own():
    assert guard(lambda _: ExitStatus.FAILED) == 1


def test_every_status_is_explained():
    assert {int(number) for number in re.findall(r"\b\d+\b", STATUSES)} == {int(status) for status in ExitStatus}
