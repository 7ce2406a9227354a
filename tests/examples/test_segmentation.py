import jax
import numpy as np
import pytest
from PIL import Image

from examples.segmentation import CLASSES, SIZE, Settings, draw_scenes, main


def test_scenes_show_what_their_classes_say():
    images, masks = draw_scenes(jax.random.key(0), 8)
    assert images.shape == (8, SIZE, SIZE, 3)
    counts = [int((masks == number).sum()) for number in range(len(CLASSES))]
    assert counts[1] > 8 * 50
    assert counts[2] == 8 * 16**2
    # Less noise inside a class than between the classes.
    inside = np.mean([np.asarray(images[0])[np.asarray(masks[0]) == number].std(0).mean() for number in range(3)])
    assert inside < 0.35


@pytest.mark.long
def test_the_segmentation_example_trains_fuses_and_draws(tmp_path, capsys):
    assert main(Settings(steps=4, picture=str(tmp_path / "scenes.png"))) == 0
    assert "0 of 131,072 pixels changed" in capsys.readouterr().out
    with Image.open(tmp_path / "scenes.png") as picture:
        assert picture.size == (SIZE * 12, SIZE * 12)
