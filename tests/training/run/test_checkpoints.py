import shutil
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repvgg_jax.training.run.checkpoints import Checkpoints, _checksum
from repvgg_jax.training.steps.mesh import create_mesh
from repvgg_jax.training.steps.state import abstract_state, create_state
from tests.training.steps.test_steps import CONFIG

# Where a read fails, Orbax closes its event loop before TensorStore has answered the other reads: noise without harm.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class StateWithoutAverage:
    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def setting(config):
    return config.network.create_model(4), optax.sgd(0.1, momentum=0.9), config, 1, create_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def state():
    """A fresh state; no test changes it."""
    return create_state(*setting(CONFIG))


@pytest.fixture(scope="module")
def template():
    """The shapes of `state`."""
    return abstract_state(*setting(CONFIG))


def test_a_checkpoint_from_before_the_moving_average_restores(state, template, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        old = StateWithoutAverage(state.step, state.params, state.batch_stats, state.opt_state)
        checkpoints.save(old, {"next": 1})
        checkpoints.wait()
        restored, data_state, epoch_metrics, damaged = checkpoints.restore(template)
    chex.assert_trees_all_equal(restored, state)
    assert data_state == {"next": 1}
    assert epoch_metrics == damaged == []


def test_a_moving_average_is_in_the_checkpoint_and_only_where_there_is_one(state, template, tmp_path):
    averaging = CONFIG.replace(ema_decay=0.9)
    state = state.replace(ema=state.variables)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        restored, *_ = checkpoints.restore(abstract_state(*setting(averaging)))
        chex.assert_trees_all_equal(restored, state)
        with pytest.raises(ValueError, match="ema"):
            checkpoints.restore(template)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def data_files(directory):
    return [path for path in (directory / "state").rglob("d/*") if path.is_file()]


def at_step(state, step):
    return state.replace(step=jax.numpy.asarray(step, state.step.dtype))


def test_the_checksum_is_of_every_value_in_its_place_and_of_nothing_else():
    fields = {"step": np.int32(2), "params": {"kernel": np.arange(4.0), "bias": np.zeros(4)}}
    data_state, epoch_metrics = {"next": 1, "epoch": 0}, [{"loss": 0.5, "accuracy": 0.25}, {"loss": 0.5}]
    progress = {"epoch_metrics": epoch_metrics, "accuracy": 0.75}
    whole = _checksum(fields, data_state, progress)
    with jax.enable_x64(True):
        on_device = jax.tree.map(jnp.asarray, {"params": fields["params"], "step": fields["step"]})
    assert _checksum(on_device, {"epoch": 0, "next": 1}, dict(reversed(progress.items()))) == whole
    last_bit = np.array([0.0, 1.0, 2.0, np.nextafter(3.0, 4.0)])
    swapped = {"kernel": fields["params"]["bias"], "bias": fields["params"]["kernel"]}
    others = [
        ({**fields, "params": {**fields["params"], "kernel": last_bit}}, data_state, progress),
        ({**fields, "params": {**fields["params"], "kernel": np.arange(4.0)[::-1]}}, data_state, progress),
        ({**fields, "params": swapped}, data_state, progress),
        ({**fields, "step": np.int32(3)}, data_state, progress),
        (fields, {"next": 0, "epoch": 1}, progress),
        (fields, data_state, {**progress, "epoch_metrics": [{"loss": 0.5, "accuracy": 0.26}, {"loss": 0.5}]}),
        (fields, data_state, {**progress, "epoch_metrics": epoch_metrics[::-1]}),
        (fields, data_state, {**progress, "epoch_metrics": epoch_metrics[:1]}),
        (fields, data_state, {**progress, "accuracy": 0.5}),
        (fields, data_state, {**progress, "accuracy": None}),
    ]
    assert len({whole, *(_checksum(*other) for other in others)}) == 1 + len(others)


DAMAGE = {
    "truncated": lambda directory: [truncate(path) for path in data_files(directory)],
    "a bit flipped": lambda directory: [flip_a_bit(path) for path in data_files(directory)],
    "state lost": lambda directory: shutil.rmtree(directory / "state"),
    "position in the data cut off": lambda directory: truncate(directory / "data" / "metadata"),
    "position in the data changed": lambda directory: (directory / "data" / "metadata").write_text('{"next": 3}'),
    "a metric of the unfinished epoch changed": lambda directory: change(
        directory / "progress" / "metadata", "0.2", "0.3"
    ),
    "the accuracy changed": lambda directory: change(directory / "progress" / "metadata", "0.5", "0.6"),
    "the accuracy no number": lambda directory: change(directory / "progress" / "metadata", "0.5", "[]"),
    "progress lost": lambda directory: shutil.rmtree(directory / "progress"),
    "progress cut off": lambda directory: truncate(directory / "progress" / "metadata"),
    "progress of another kind": lambda directory: (directory / "progress" / "metadata").write_text("[1]"),
    "progress without a checksum": lambda directory: change(
        directory / "progress" / "metadata", '"checksum"', '"check"'
    ),
    "the checksum changed": lambda directory: change(directory / "progress" / "metadata", 'checksum":', 'checksum": 1'),
    "everything lost": lambda directory: [path.unlink() for path in directory.rglob("*") if path.is_file()],
}


# Orbax leaves a coroutine behind, and Python tells of it whenever it is collected.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(damage, state, template, tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(
                at_step(state, step), {"next": step}, epoch_metrics=[{"loss": 0.1 * step}], accuracy=0.25 * step
            )
        checkpoints.wait()
        whole = checkpoints.restore(template)
    assert (int(whole.state.step), whole.data_state, whole.damaged) == (2, {"next": 2}, [])

    damage(tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match=r"checkpoints/2 is damaged and passed over for that of step 1"):
            restored = checkpoints.restore(template)
        chex.assert_trees_all_equal(restored.state, at_step(state, 1))
        assert (restored.data_state, restored.epoch_metrics, restored.damaged) == ({"next": 1}, [{"loss": 0.1}], [2])
        checkpoints.set_aside(restored.damaged)
        assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
        checkpoints.save(at_step(state, 2), {"next": 2})
        checkpoints.wait()
        assert int(checkpoints.restore(template).state.step) == 2


def test_where_no_checkpoint_is_whole_the_newest_is_named(state, template, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at_step(state, step), {})
        checkpoints.wait()
    for step in "12":
        shutil.rmtree(tmp_path / "checkpoints" / step / "state")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            ValueError, match=r"none of the checkpoints in .* can be read \(step 2: .*restore them from a copy"
        ),
    ):
        checkpoints.restore(template)


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        (
            dict(width_multiplier=(0.25, 0.25, 0.0625, 0.0625)),
            r"stage2_block1/branch_1x1/bn/mean is \(16,\), expected \(32,\)",
        ),
        (dict(depths=(1, 1, 1, 1)), r"stage2_block2/.* expected nothing"),
        (dict(ema_decay=0.9), r"ema/batch_stats/.* is missing, expected"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_told_in_a_line(fields, difference, state, tmp_path, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        with pytest.raises(
            ValueError, match=rf"config.json and checkpoint 0 beside it do not belong together \(.*{difference}"
        ) as caught:
            checkpoints.restore(abstract_state(*setting(CONFIG.replace(**fields))))
    assert len(str(caught.value)) < 600
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_without_a_checkpoint_says_so(template, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(FileNotFoundError, match="holds no checkpoint: train first"):
            checkpoints.restore(template)


def test_damaged_checkpoints_of_one_step_are_all_put_aside(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.set_aside([])
        assert not (tmp_path / "damaged_checkpoints").exists()
        for number in range(3):
            (checkpoints.directory / "2").mkdir()
            (checkpoints.directory / "2" / f"{number}").touch()
            checkpoints.set_aside([2])
            assert not (checkpoints.directory / "2").exists()
    found = {path.parent.name: path.name for path in (tmp_path / "damaged_checkpoints").rglob("?") if path.is_file()}
    assert found == {"2": "0", "2_": "1", "2__": "2"}


def test_the_newest_and_the_best_are_kept(state, template, tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.5, None, 0.6, 0.7]):
            checkpoints.save(at_step(state, step), {}, accuracy=accuracy)
            checkpoints.wait()
        assert checkpoints.restore(template).state.step == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4", "5"]


def test_the_best_is_kept_by_the_processes_that_resume_the_run(tmp_path):
    state = create_state(*setting(CONFIG))
    for step, accuracy in enumerate([0.1, 0.9, 0.5, 0.6, 0.9, 0.7, 0.8], start=1):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(at_step(state, step), {}, accuracy=accuracy)
        best = 1 if step < 2 else 2 if step < 5 else 5
        kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert kept == {str(each) for each in {best, max(step - 1, 1), step}}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_where_the_best_is_damaged_the_run_goes_on(damage, state, template, tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, accuracy in ((1, 0.5), (2, 0.4), (3, 0.3)):
            checkpoints.save(at_step(state, step), {}, epoch_metrics=[{"loss": 0.2}], accuracy=accuracy)
    damage(tmp_path / "checkpoints" / "1")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 4), {}, accuracy=0.35)
        checkpoints.wait()
        restored = checkpoints.restore(template)
    assert (int(restored.state.step), restored.damaged) == (4, [])


def test_a_checkpoint_in_place_of_one_set_aside_does_not_count_by_its_accuracy(state, tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at_step(state, 2), {}, accuracy=0.9)
        checkpoints.wait()
        checkpoints.set_aside([2])
        checkpoints.save(at_step(state, 2), {})
        checkpoints.save(at_step(state, 3), {}, accuracy=0.3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_says_what_to_do(state, template, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']\nand a long story")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(OSError, match=r"could not be written in .*No space left .*28'\]. .* whole: make room"):
            checkpoints.save(at_step(state, 1), {})
        assert int(checkpoints.restore(template).state.step) == 0
