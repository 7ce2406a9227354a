import pytest

from repvgg_jax.training import TrainConfig, train_and_evaluate

STRONG = dict(trivial_augment=True, color_jitter=0.1, cutout=2, mixup=0.2, cutmix=1.0)


def differing(one, other):
    return {name for name, value in one.settings.items() if value != other.settings[name]}


def test_the_last_epochs_leave_out_what_distorts_or_mixes_and_nothing_else():
    config = TrainConfig().replace(epochs=5, refine_epochs=2, **STRONG)
    assert [differing(config, config.at_epoch(epoch)) for epoch in range(1, 6)] == [set()] * 3 + [set(STRONG)] * 2
    plain = TrainConfig().replace(epochs=5, **STRONG)
    assert all(plain.at_epoch(epoch) == plain for epoch in range(1, 6))
    cut_short = config.replace(epochs=3)
    assert [differing(cut_short, cut_short.at_epoch(epoch)) for epoch in (2, 3)] == [set(), set(STRONG)]


@pytest.mark.long
def test_a_refined_run_trains_on_plain_images_in_its_last_epoch_alone(tiny, tmp_path):
    config = tiny.replace(**STRONG)
    strong = train_and_evaluate(config, tmp_path / "strong")
    refined = train_and_evaluate(config.replace(refine_epochs=1), tmp_path / "refined")
    assert refined.history[0]["train/loss"] == strong.history[0]["train/loss"]
    assert refined.history[1]["train/loss"] < strong.history[1]["train/loss"]
    assert refined.comparison.agreement.predictions_changed == 0
