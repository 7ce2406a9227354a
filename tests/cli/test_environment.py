import os
import subprocess
import sys

import pytest

from repvgg_jax.cli.huge_pages import HUGE_PAGES, restart_with_huge_pages

COMPILE = """
import jax
from repvgg_jax.cli.compilation_cache import keep_compiled_programs
kept = keep_compiled_programs()
print(kept.directory, ascii(kept.reason), sep="|")
jax.jit(lambda x: x + 1)(0).block_until_ready()
print("computed")
"""
RESTART = """
import os
from repvgg_jax.cli.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.getpid(), os.environ["GLIBC_TUNABLES"])
"""

LINUX = pytest.mark.skipif(
    sys.platform != "linux",
    reason="glibc reads the setting, and only Linux has it; elsewhere nothing happens, which another test holds",
)


def run(code, **variables):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "GLIBC_", "XLA_"))}
    environment = {**inherited, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, errors="surrogateescape", env=environment
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, output.splitlines()


def test_compiled_programs_are_kept_in_the_users_cache_directory(tmp_path):
    _, output = run(COMPILE, XDG_CACHE_HOME=str(tmp_path))
    assert output == [f"{tmp_path / 'repvgg_jax' / 'xla'}|None", "computed"]
    assert list((tmp_path / "repvgg_jax" / "xla").iterdir())


def test_another_place_is_respected_and_so_is_none(tmp_path):
    chosen = tmp_path / "chosen"
    _, output = run(COMPILE, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(chosen))
    assert output == [f"{chosen}|None", "computed"]
    _, output = run(COMPILE, XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false")
    assert output == ["None|None", "computed"]
    assert not (tmp_path / "repvgg_jax").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"XDG_CACHE_HOME": "/proc/none"},
        pytest.param({"XDG_CACHE_HOME": "FILE"}, marks=pytest.mark.long),
        {"XDG_CACHE_HOME": "", "HOME": "relative"},
        {"JAX_COMPILATION_CACHE_DIR": "FILE"},
        {"XDG_CACHE_HOME": "FILE-caf\udce9"},
        pytest.param({"JAX_COMPILATION_CACHE_DIR": "FILE-caf\udce9"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_written_stops_nothing_and_is_not_promised(variables, tmp_path):
    (tmp_path / "file").write_text("")
    _, (kept, computed) = run(COMPILE, **{k: v.replace("FILE", str(tmp_path / "file")) for k, v in variables.items()})
    directory, reason = kept.split("|")
    assert (directory, computed) == ("None", "computed")
    assert "JAX_COMPILATION_CACHE_DIR names another place" in reason


def test_a_relative_cache_directory_counts_for_nothing(tmp_path):
    _, output = run(COMPILE, XDG_CACHE_HOME="relative", HOME=str(tmp_path))
    assert output == [f"{tmp_path / '.cache' / 'repvgg_jax' / 'xla'}|None", "computed"]


@LINUX
def test_the_process_starts_anew_with_huge_pages_once():
    pid, (line,) = run(RESTART)
    assert line == f"{pid} {HUGE_PAGES}"


@LINUX
@pytest.mark.parametrize("chosen", ["", "glibc.malloc.check=0"])
def test_a_setting_of_the_users_own_is_left_alone(chosen):
    pid, (line,) = run(RESTART, GLIBC_TUNABLES=chosen)
    assert line == f"{pid} {chosen}"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_where_there_is_no_glibc_the_process_goes_on_as_it_is(platform, monkeypatch):
    def restart(*_):
        raise AssertionError("restarted")

    monkeypatch.setattr(os, "execve", restart)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    restart_with_huge_pages()
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(AssertionError, match="restarted"):
        restart_with_huge_pages()
