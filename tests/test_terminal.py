import os
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_jax
from repvgg_jax.cli.output import fail, run_command
from repvgg_jax.terminal import one_line, printable

COMMAND = f"""
import sys
sys.path.insert(0, {str(Path(repvgg_jax.__file__).parents[1])!r})
from repvgg_jax.cli.output import run_command

def work(output):
    for number in range(20_000):
        print("Frösche", number, flush=number % 2 == 0)
    print("worked", file=sys.stderr)
    if "help" in sys.argv:
        sys.exit(0)
    return 3 if "failing" in sys.argv else 0

sys.exit(run_command(work))
"""


def shell(line, **variables):
    """Run a line of shell with the command as $COMMAND; what it prints, on both streams together."""
    environment = {**os.environ, "COMMAND": COMMAND, "PYTHONUTF8": "1", **variables}
    done = subprocess.run(
        ["bash", "-c", line.replace("RUN", f"'{sys.executable}' -c \"$COMMAND\"")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Katze, 猫, кот, 👩‍🔬", "Katze, 猫, кот, 👩‍🔬"),
        ("cat\x1b[2J", r"cat\x1b[2J"),
        ("cat\n  99.00 %  dog", r"cat\n  99.00 %  dog"),
        ("cat\r\tdog\x7f\x9b", r"cat\r\tdog\x7f\x9b"),
        ("cat\u2028dog", r"cat\u2028dog"),
        ("cat\u202egnp.exe", r"cat\u202egnp.exe"),
        ("\u200fa\u200e\u061c", r"\u200fa\u200e\u061c"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped_and_all_else_is_kept(text, shown):
    assert printable(text) == shown


def test_an_error_is_one_line_and_commands_nothing(capsys):
    assert fail("the class 'cat\x1b[2J'\nerror: forged", 2) == 2
    assert capsys.readouterr().err == "error: the class 'cat\\x1b[2J' error: forged\n"
    assert one_line("a\n\nb") == "a  b"


@pytest.mark.parametrize("flag", ["", "help"])
def test_a_reader_that_goes_away_ends_nothing_and_is_no_error(flag):
    assert shell(f"RUN {flag} | head -1; echo ${{PIPESTATUS[0]}}") == "Frösche 0\n0\nworked\n"


def test_the_status_of_the_work_stands_whoever_reads():
    assert shell("RUN failing | head -1; echo ${PIPESTATUS[0]}").splitlines()[:2] == ["Frösche 0", "3"]
    assert shell("RUN failing > /dev/null; echo $?").splitlines()[0] == "3"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "2>&- >/dev/null"])
def test_streams_that_are_closed_from_the_start_are_no_error(closed):
    assert shell(f"RUN {closed}; echo $?").splitlines()[0] == "0"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@pytest.mark.parametrize(("flag", "status"), [("", 2), ("help", 2), ("failing", 3)])
def test_output_that_is_lost_on_a_full_disk_is_told_after_the_work(flag, status):
    assert shell(f"RUN {flag} > /dev/full; echo $?").splitlines() == [
        str(status),
        "worked",
        "error: standard output cannot be written: [Errno 28] No space left on device",
    ]


def test_a_character_that_the_encoding_lacks_is_escaped():
    assert shell("RUN | head -1", PYTHONIOENCODING="ascii").startswith("Fr\\xf6sche 0\n")


def test_the_streams_are_as_they_were_afterwards(capsys):
    before = sys.stdout, sys.stderr, sys.stdout.errors

    def command(output):
        print("a \ud800")
        assert output.failure is None
        return 1

    assert run_command(command) == 1
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
    assert capsys.readouterr().out == "a \\ud800\n"
