import os
import tempfile
from pathlib import Path

import chex
import jax
import pytest

from repvgg_jax.training.run.checkpoints import Checkpoints
from repvgg_jax.training.run.paths import plain_path, run_directory
from repvgg_jax.training.steps.state import create_state
from tests.training.run.test_checkpoints import CONFIG, setting

ODD = ("lr=0.1,widths=[1,2]", "a?b*", "[!a]", "back\\slash", "gs:", "new\nline")


@pytest.fixture(scope="module")
def state():
    """A fresh state; no test changes it."""
    return create_state(*setting(CONFIG))


def shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@pytest.mark.parametrize("name", [*ODD, os.fsdecode(b"caf\xe9"), "Frösche 猫", "x" * 250], ids=ascii)
def test_a_run_of_any_name_is_saved_pruned_set_aside_and_restored(name, state, tmp_path):
    run = tmp_path / name
    with Checkpoints(run, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state.replace(step=jax.numpy.int32(step)), {"next": step})
        checkpoints.wait()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    # Another process finds them, by a link of its own.
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.latest_step == 3
        checkpoints.set_aside([3])
        restored = checkpoints.restore(jax.tree.map(shape, state))
    chex.assert_trees_all_equal(restored.state, state.replace(step=jax.numpy.int32(2)))
    assert restored.data_state == {"next": 2}
    assert (run / "damaged_checkpoints" / "3").is_dir()
    assert not [path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("repvgg_jax-run-")]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_directory_is_shown_by_a_link_that_goes_away(name, tmp_path):
    with plain_path(tmp_path / name) as shown:
        assert shown != tmp_path / name
        assert not set("[]?*\\\n") & set(str(shown))
        (shown / "file").write_text("here")
    assert (tmp_path / name / "file").read_text() == "here"
    assert not os.path.lexists(shown)


def test_a_plain_directory_is_shown_as_it_is(tmp_path):
    with plain_path(tmp_path / "lr=0.1, größe 3/@a+b~%") as shown:
        assert shown == tmp_path / "lr=0.1, größe 3/@a+b~%"


def test_where_no_link_can_be_made_the_directory_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with (
        pytest.raises(ValueError, match=r"a\[1\] is a path that Orbax would misread.*privilege"),
        plain_path(tmp_path / "a[1]"),
    ):
        pass


def test_a_temporary_directory_that_is_odd_too_is_named(tmp_path, monkeypatch):
    (tmp_path / "t[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t[1]"))
    with pytest.raises(ValueError, match="set TMPDIR"), plain_path(tmp_path / "a[1]"):
        pass


def test_a_run_directory_is_absolute_and_home_is_meant_by_the_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_directory("runs/a/") == tmp_path / "runs" / "a"
    assert run_directory("~/a") == tmp_path / "home" / "a"
    assert run_directory("runs/~") == tmp_path / "runs" / "~"
    relative = run_directory("b")
    monkeypatch.chdir("/")
    assert relative == tmp_path / "b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/run", "is a URL: expected a directory of this machine; mount the bucket"),
        ("s3://bucket/run", "is a URL"),
        ("~nobody-by-this-name/run", "has no such home directory"),
        ("a\0b", "holds a NUL"),
    ],
)
def test_what_is_no_directory_of_this_machine_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        run_directory(path)
