import os
import signal
import threading

import chex
import pytest

from repvgg_jax.cli.train import train_command
from repvgg_jax.training import loop, train_and_evaluate
from repvgg_jax.training.preemption import TerminatedError, interruptions
from repvgg_jax.training.run.claim import only_run_in
from tests.cli.test_commands import TINY


@pytest.fixture
def signal_at_step(monkeypatch):
    """Makes the process send itself a signal before the n-th training step from now."""
    shard = loop.shard_batch

    def arm(number, steps):
        left = [steps]

        def shard_and_signal(batch, mesh):
            if "mask" not in batch:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), number)
            return shard(batch, mesh)

        monkeypatch.setattr(loop, "shard_batch", shard_and_signal)

    return arm


@pytest.mark.long
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_bit_identically(tiny, finished, begin, tmp_path, signal_at_step):
    signal_at_step(signal.SIGTERM, 27)
    with pytest.raises(
        TerminatedError, match=r"stopped at step 27 of 44, and saved: train with --workdir .*run and the same"
    ):
        train_and_evaluate(tiny, tmp_path / "run")
    stopped, _ = begin(tiny, tmp_path / "run")
    assert int(stopped.step) == 27
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(stopped.params, finished.state.params, rtol=1e-3)
    assert_ended_alike(train_and_evaluate(tiny, tmp_path / "run"), finished)


def assert_ended_alike(resumed, finished):
    chex.assert_trees_all_equal(resumed.state, finished.state)
    keep = [name for name in finished.history[0] if name not in ("images_per_second", "seconds")]
    assert [[line[name] for name in keep] for line in resumed.history] == [
        [line[name] for name in keep] for line in finished.history
    ]


@pytest.mark.long
def test_a_run_stopped_twice_by_ctrl_c_ends_bit_identically(tiny, finished, tmp_path, signal_at_step):
    signal_at_step(signal.SIGINT, 7)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped at step 7 of 44, and saved: train with --workdir .*run and the same"
    ):
        train_and_evaluate(tiny, tmp_path / "run")
    signal_at_step(signal.SIGINT, 20)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 27 of 44"):
        train_and_evaluate(tiny, tmp_path / "run")
    assert_ended_alike(train_and_evaluate(tiny, tmp_path / "run"), finished)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_exits_as_one_that_the_signal_ended(number, status, data_dir, tmp_path, capsys, signal_at_step):
    arguments = [*TINY.split(), "--data-dir", data_dir, "--workdir", str(tmp_path / "run")]
    signal_at_step(number, 3)
    assert train_command(arguments) == status
    assert "stopped at step 3 of 22, and saved" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


def test_the_second_ctrl_c_stops_at_once_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruptions() as interruption:
        assert not interruption
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_of_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with interruptions() as interruption:
            seen.append((bool(interruption), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_two_processes_do_not_train_in_one_directory(tiny, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with only_run_in(workdir), pytest.raises(ValueError, match=r"another process is training in .*run: wait for it"):
        train_and_evaluate(tiny, workdir)
