import numpy as np
import pytest
from PIL import Image

from repvgg_jax.training.figures import draw_confusion, draw_curves, draw_differences


def is_a_picture(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")).std() > 3


def test_curves_are_drawn_from_one_epoch_on(tmp_path):
    line = {"epoch": 1, "train/loss": 2.0, "train/accuracy": 0.1, "test/loss": 1.9, "test/accuracy": 0.2}
    for count in (1, 5):
        path = tmp_path / f"{count}.png"
        draw_curves(path, [{**line, "epoch": epoch} for epoch in range(1, count + 1)])
        assert is_a_picture(path)
    draw_curves(path, [line])
    assert is_a_picture(path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, classes):
    labels = np.arange(4 * classes) % classes
    draw_confusion(tmp_path / "c.png", labels, (labels + (labels % 7 == 0)) % classes, [str(i) for i in range(classes)])
    assert is_a_picture(tmp_path / "c.png")


def test_differences_are_drawn_even_where_all_are_zero(tmp_path):
    for name, differences in [("some", np.random.default_rng(0).normal(0, 1e-6, (50, 10))), ("none", np.zeros((5, 3)))]:
        draw_differences(tmp_path / f"{name}.png", differences, 12.0)
        assert is_a_picture(tmp_path / f"{name}.png")
