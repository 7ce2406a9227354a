import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from repvgg_jax.training.run.class_labels import class_labels
from repvgg_jax.training.run.plots import draw_confusion, draw_curves, draw_differences


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


NAMES = {
    "mathematics": ("Ba$$in", "$\\frac{1}$", "x^{", "a_b", "\\alpha", "%#&"),
    "not UTF-8": ("caf\udce9", "plain"),
    "scripts": ("猫", "日本語", "한국어", "ไทย", "👩‍🔬", "Frösche", "кот", "שלום"),
    "commands": ("a\nb", "\x1b[2J", "\u202e", ""),
    "long": ("x" * 255, "y" * 100_000),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_classes_of_any_name_are_drawn_without_a_warning(names, tmp_path):
    labels = np.arange(4 * len(names)) % len(names)
    draw_confusion(tmp_path / "c.png", labels, labels, names)
    assert is_a_picture(tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 1500


def test_a_name_that_no_font_at_hand_draws_is_shown_by_its_place(monkeypatch):
    monkeypatch.setattr("repvgg_jax.training.run.class_labels._FONTS", ("DejaVu Sans", "no such font"))
    labels, fonts = class_labels(["Katze", "猫", "кот", "Ba$$in", "a" * 40, "caf\udce9"])
    assert labels == ["Katze", "#1", "кот", "Ba$$in", "aaaaaaaaaaaaaaaa…aaaaaaa", r"caf\xe9"]
    assert fonts == ["DejaVu Sans"]


def test_thousands_of_classes_share_rows(tmp_path, monkeypatch):
    drawn = []
    imshow = Figure.subplots

    def recording(self):
        axes = imshow(self)
        show = axes.imshow
        monkeypatch.setattr(axes, "imshow", lambda shares, **rest: (drawn.append(shares), show(shares, **rest))[1])
        return axes

    monkeypatch.setattr(Figure, "subplots", recording)
    labels = np.arange(2500)
    draw_confusion(tmp_path / "c.png", labels, np.where(labels < 3, 2499, labels), [str(i) for i in labels])
    (shares,) = drawn
    assert shares.shape == (834, 834)
    assert shares[0, 833] == 1
    np.testing.assert_array_equal(np.diag(shares)[1:], 1)


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    draw_differences(path, np.zeros((5, 3)), 1.0)
    before = path.read_bytes()

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", broken)
    for draw, arguments in (
        (draw_curves, ([],)),
        (draw_confusion, (np.zeros(1, int), np.zeros(1, int), ["a"])),
        (draw_differences, (np.zeros((5, 3)), 1.0)),
    ):
        with pytest.warns(UserWarning, match=r"c.png could not be drawn: OSError: .*No space left"):
            draw(path, *arguments)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.png"]


def test_the_users_settings_of_matplotlib_do_not_reach_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["no such font"])
    draw_curves(tmp_path / "c.png", [])
    assert is_a_picture(tmp_path / "c.png")
    assert matplotlib.rcParams["text.usetex"]


def test_a_backend_that_matplotlib_does_not_know_stops_nothing(tmp_path):
    script = """
import sys, repvgg_jax.training.loop
from repvgg_jax.training.run.plots import draw_curves, draw_differences
import numpy as np
draw_curves(sys.argv[1], [])
draw_differences(sys.argv[1], np.zeros((5, 3)), 1.0)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "c.png")]
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stderr.count("c.png could not be drawn: ValueError: Key backend: 'nonsense'") == 2
