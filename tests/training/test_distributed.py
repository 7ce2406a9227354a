"""Two real processes over jax.distributed on this machine, and what each of several reads."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import jax
import numpy as np
import pytest

from repvgg_jax.cli.train import train_command
from repvgg_jax.data import ImageDataset, train_iterator
from repvgg_jax.training import TrainConfig, distributed, loop, train_and_evaluate
from repvgg_jax.training.distributed import on_primary
from repvgg_jax.training.run import directory
from repvgg_jax.training.run.data_record import DataRecord, TrainingData
from repvgg_jax.training.run.metrics_log import read_metrics
from repvgg_jax.training.steps.mesh import create_mesh
from tests.cli.test_commands import FINISHED as TINY
from tests.training.test_killed import FLAGS, ROOT, final_state


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(flags, workdir, data_dir, cache):
    """Two processes of one run, with one device each."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "train.py", *flags.split(), "--data-dir", data_dir, "--workdir", str(workdir)]
    command += ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


@pytest.mark.long
def test_two_processes_train_save_and_report_as_one_with_eight_devices_does(tiny, finished, tmp_path):
    first, second = finish(start_two(TINY, tmp_path / "two", tiny.data.data_dir, tmp_path / "cache"))
    assert TrainConfig.load(tmp_path / "two" / "config.json") == TrainConfig.load(finished.workdir / "config.json")
    assert DataRecord.load(tmp_path / "two") == DataRecord.load(finished.workdir)
    assert "2 × cpu in 2 processes" in first
    assert "predictions changed" in first
    assert "epoch" not in second
    two = read_metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in finished.history]
    # Later epochs drift apart: another number of devices sums in another order.
    np.testing.assert_allclose(two[0]["train/loss"], finished.history[0]["train/loss"], rtol=0.01)
    (changed,) = re.findall(r"predictions changed +(\d+)", first)
    assert changed == "0"
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in finished.workdir.iterdir()}


@pytest.mark.long
def test_a_config_that_process_0_refuses_stops_both(tiny, finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    processes = start_two(
        TINY.replace("--epochs 2", "--epochs 3"), tmp_path / "run", tiny.data.data_dir, tmp_path / "cache"
    )
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], first + second
    assert "another config (epochs was 2, is 3)" in first
    assert "process 0 cannot begin, and has said why" in second


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_both_at_the_same_step(tiny, tmp_path):
    flags = f"{TINY} --learning-rate 1e30"
    processes = start_two(flags, tmp_path / "run", tiny.data.data_dir, tmp_path / "cache")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    named = [re.findall(r"the loss is (?:nan|inf) at (epoch 1, step [1-9]); there is no", output) for output in outputs]
    assert named[0] == named[1] != []


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process one of two; what process 0 tells the other is kept in a list."""
    told = []

    def tell(value):
        if jax.process_index() == 0:
            told.append(value)
        return told[-1]

    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", tell)

    def become(index):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)

    return become, told


@pytest.mark.parametrize("failure", [ValueError("taken"), OSError("disk full")])
def test_where_process_0_cannot_begin_neither_does_the_other(failure, as_process):
    become, told = as_process
    done = []

    def fail():
        raise failure

    for index, action in ((0, fail), (1, done.append)):
        become(index)
        message = "process 0 cannot begin, and has said why" if index else str(failure)
        with pytest.raises(ValueError if index else type(failure), match=message):
            on_primary(action)
    for index in range(2):
        become(index)
        on_primary(lambda index=index: done.append(index))
    assert done == [0]
    assert [bool(failed) for failed in told] == [True, False]


def test_a_process_that_is_not_the_first_neither_tells_nor_writes_the_end_of_a_run(monkeypatch, tmp_path, capfd):
    class Alike:
        table, check = (lambda _: "the table"), (lambda _: None)

    monkeypatch.setattr(directory, "fuse_and_compare", lambda *_: (None, None, Alike()))
    arguments = (tmp_path, None, (None, None), None, None, None)
    directory.finish(*arguments, check_only=True)
    assert "the table" in capfd.readouterr().out
    monkeypatch.setattr(directory, "is_primary", lambda: False)
    assert isinstance(directory.finish(*arguments), Alike)
    assert "".join(capfd.readouterr()) == ""
    assert not list(tmp_path.iterdir())


class BegunError(Exception):
    pass


def test_a_run_of_another_config_or_of_damaged_metrics_is_refused_in_both_processes(
    tiny, as_process, tmp_path, monkeypatch
):
    become, told = as_process

    def train(*_):
        raise BegunError

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(BegunError):
        train_and_evaluate(tiny, tmp_path / "run")
    config = tiny.replace(epochs=3)
    become(0)
    with pytest.raises(ValueError, match=r"another config \(epochs was 2, is 3\)"):
        train_and_evaluate(config, tmp_path / "run")
    become(1)
    with pytest.raises(ValueError, match="process 0 cannot begin"):
        train_and_evaluate(config, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        file.write("[1]\n[2]\n")
    become(0)
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is damaged"):
        train_and_evaluate(tiny, tmp_path / "run")
    become(1)
    with pytest.raises(ValueError, match="process 0 cannot begin"):
        train_and_evaluate(tiny, tmp_path / "run")
    assert [bool(failed) for failed in told] == [True, True]


class ReadError(Exception):
    pass


def labels_read(config, dataset, monkeypatch):
    """Labels of each training step of an epoch, and of the test split, as read by this process."""

    def note(source, **arguments):
        raise ReadError(source, arguments)

    steps = len(dataset.train) // config.optimization.batch_size
    with monkeypatch.context() as patch, pytest.raises(ReadError) as noted:
        patch.setattr(loop, "train_iterator", note)
        loop.train(config, TrainingData(dataset, config.data.normalization), create_mesh(), None, None)
    source, arguments = noted.value.args
    iterator = train_iterator(source, **arguments)
    training = [next(iterator)["label"].tolist() for _ in range(steps)]
    test = [batch["label"][batch["mask"]].tolist() for batch in directory.evaluation_batches(config.data, dataset)]
    return training, test


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("random_resized_crop", [False, True])
def test_processes_share_each_batch_and_read_no_record_twice_and_leave_none_out(
    count, random_resized_crop, tiny, monkeypatch
):
    def records(number):
        return [{"image": np.zeros((8, 8, 1), np.uint8), "label": label} for label in range(number)]

    dataset = ImageDataset("numbers", records(48), records(42), tuple(map(str, range(48))), channels=1)
    config = tiny.replace(
        batch_size=16, eval_batch_size=16, mean=(0.5,), std=(0.5,), image_size=8, crop_padding=0,
        random_resized_crop=random_resized_crop,
    )  # fmt: skip
    alone_training, alone_test = labels_read(config, dataset, monkeypatch)
    assert sorted(chain(*alone_training)) == list(range(48))
    assert list(chain(*alone_test)) == list(range(42))
    monkeypatch.setattr(jax, "process_count", lambda: count)
    parts = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(labels_read(config, dataset, monkeypatch))
    for step, batch in enumerate(alone_training):
        shares = [training[step] for training, _ in parts]
        assert [len(share) for share in shares] == [16 // count] * count
        assert sorted(chain(*shares)) == sorted(batch)
    for step, batch in enumerate(alone_test):
        assert sorted(chain(*(test[step] for _, test in parts))) == batch
    assert {len(test) for _, test in parts} == {len(alone_test)}


@pytest.mark.slow
def test_two_processes_stopped_by_sigterm_resume_to_bit_identical_results(data_dir, tmp_path):
    finish(start_two(FLAGS, tmp_path / "whole", data_dir, tmp_path / "cache"))
    processes = start_two(FLAGS, tmp_path / "run", data_dir, tmp_path / "cache")
    while "run directory" not in (line := processes[0].stdout.readline()) and line:
        pass
    time.sleep(1.5)
    processes[0].send_signal(signal.SIGTERM)  # as a scheduler that takes away one machine first
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    (step,) = {int(step) for output in outputs for step in re.findall(r"stopped at step (\d+) of 880", output)}
    assert step < 880
    finish(start_two(FLAGS, tmp_path / "run", data_dir, tmp_path / "cache"))
    one, other = (final_state(tmp_path / name) for name in ("whole", "run"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_a_cluster_that_is_described_in_part_is_refused(capsys, tmp_path):
    workdir = ["--workdir", str(tmp_path / "run")]
    assert train_command([*workdir, "--distributed", "--num-processes", "2"]) == 2
    assert "coordinator is None, num_processes 2, process_id None: expected all three" in capsys.readouterr().err
    assert train_command([*workdir, "--process-id", "1"]) == 2
    assert "give --distributed too" in capsys.readouterr().err
    assert train_command(["--distributed"]) == 2
    assert "need one --workdir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
