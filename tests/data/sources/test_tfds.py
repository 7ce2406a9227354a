import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repvgg_jax.data import load_dataset
from repvgg_jax.data.sources.memory import InMemory
from repvgg_jax.data.sources.tfds import TfdsSplit
from tests.data.tiny_data import encode, noise, write_tfds

PICTURES = [noise(5, 4 + i, 3, seed=i) for i in range(5)]
RECORDS = [(encode(image), i) for i, image in enumerate(PICTURES)]


def load(tmp_path, **splits):
    write_tfds(tmp_path, splits)
    return load_dataset("tiny", data_dir=str(tmp_path))


def edit(directory, file, change):
    path = directory / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_records_come_back_as_they_were_written(tmp_path):
    dataset = load(tmp_path, train=RECORDS, test=RECORDS[:2])
    assert dataset.class_names == ("0", "1", "2", "3", "4")
    assert (dataset.channels, dataset.image_shape) == (3, None)
    assert (len(dataset.train), len(dataset.test)) == (5, 2)
    assert sorted(record["label"] for record in dataset.train) == [0, 1, 2, 3, 4]
    for record in dataset.train:
        assert np.array_equal(record["image"], PICTURES[record["label"]])


def test_reading_in_bulk_and_after_pickling_gives_the_same(tmp_path):
    source = load(tmp_path, train=RECORDS, test=RECORDS).train
    one_by_one = [source[i] for i in (3, 1, 4)]
    for other in (source, pickle.loads(pickle.dumps(source))):
        for a, b in zip(one_by_one, other.__getitems__([3, 1, 4]), strict=True):
            assert a["label"] == b["label"]
            assert np.array_equal(a["image"], b["image"])


def test_indices_wrap_once_and_end(tmp_path):
    source = load(tmp_path, train=RECORDS, test=RECORDS).train
    assert source[-1]["label"] == source[4]["label"]
    with pytest.raises(IndexError):
        source[5]


def test_images_of_one_small_size_stay_in_memory(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(6, 6, 1)),
        "label": tfds.features.ClassLabel(names=["no", "yes"]),
    }
    images = [noise(6, 6, 1, seed=i) for i in range(2)]
    records = [(encode(image), i) for i, image in enumerate(images)]
    write_tfds(tmp_path, {"train": records, "test": records}, features=features)
    dataset = load_dataset("tiny", data_dir=str(tmp_path))
    assert (dataset.channels, dataset.image_shape, dataset.class_names) == (1, (6, 6), ("no", "yes"))
    assert isinstance(dataset.train, InMemory)
    for record in dataset.train:
        assert np.array_equal(record["image"], images[record["label"]])


def test_grey_and_transparent_images_follow_the_declared_channels(tmp_path):
    grey, rgba = noise(4, 4, 1), noise(4, 4, 4)
    records = [(encode(grey), 0), (encode(Image.fromarray(rgba, "RGBA")), 1)]
    images = {record["label"]: record["image"] for record in load(tmp_path, train=records, test=records).train}
    assert np.array_equal(images[0], np.repeat(grey, 3, axis=-1))
    assert np.array_equal(images[1], rgba[..., :3])


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    assert len(load(tmp_path, train=RECORDS, validation=RECORDS[:3]).test) == 3


def test_validation_stands_in_for_a_test_split_without_labels(tmp_path):
    unlabelled = [(image, -1) for image, _ in RECORDS]
    dataset = load(tmp_path, train=RECORDS, validation=RECORDS[:3], test=unlabelled)
    assert len(dataset.test) == 3


@pytest.mark.parametrize("splits", [{"train": RECORDS}, {"test": RECORDS}, {"unsupervised": RECORDS}])
def test_missing_splits_are_listed(tmp_path, splits):
    with pytest.raises(ValueError, match=rf"has the splits {next(iter(splits))}; expected 'train', and"):
        load(tmp_path, **splits)


def test_an_empty_split_is_named(tmp_path):
    def empty(info):
        info["splits"][1]["shardLengths"] = ["0"]

    directory = write_tfds(tmp_path, {"train": RECORDS, "test": RECORDS})
    edit(directory, "dataset_info.json", empty)
    with pytest.raises(ValueError, match=r"tiny (train|test): the split is empty"):
        load_dataset("tiny", data_dir=str(tmp_path))


def test_a_label_out_of_range_is_located(tmp_path):
    def fewer(features):
        features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "3"

    directory = write_tfds(tmp_path, {"train": RECORDS, "test": RECORDS})
    edit(directory, "features.json", fewer)
    source = load_dataset("tiny", data_dir=str(tmp_path)).train
    with pytest.raises(ValueError, match=r"tiny train record \d: label [34] is outside \[0, 3\)"):
        list(source)


def test_a_broken_image_is_located(tmp_path):
    records = [*RECORDS[:4], (RECORDS[4][0][:40], 4)]
    source = load(tmp_path, train=records, test=RECORDS).train
    with pytest.raises(ValueError, match=r"tiny train record \d: 40 bytes: cannot be decoded"):
        list(source)
    with pytest.raises(ValueError, match=r"tiny train record \d: 40 bytes: cannot be decoded"):
        source.__getitems__(range(5))


def test_an_image_of_an_undeclared_size_is_located(tmp_path):
    def declare(features):
        features["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = ["5", "4", "3"]

    directory = write_tfds(tmp_path, {"train": RECORDS, "test": RECORDS})
    edit(directory, "features.json", declare)
    with pytest.raises(ValueError, match=r"tiny train record \d: the image is \(5, [5-8]\), but .* \(5, 4\)"):
        list(load_dataset("tiny", data_dir=str(tmp_path)).train)


def test_other_features_are_listed(tmp_path):
    features = {
        "picture": tfds.features.Image(shape=(None, None, 3)),
        "class": tfds.features.ClassLabel(num_classes=5),
    }
    write_tfds(tmp_path, {"train": RECORDS, "test": RECORDS}, features=features)
    with pytest.raises(ValueError, match=r"the features 'class' \(ClassLabel\), 'picture' \(Image\); expected"):
        load_dataset("tiny", data_dir=str(tmp_path))


def test_another_file_format_comes_with_the_command_that_converts_it(tmp_path):
    def as_tfrecord(info):
        info["fileFormat"] = "tfrecord"

    directory = write_tfds(tmp_path, {"train": RECORDS, "test": RECORDS})
    edit(directory, "dataset_info.json", as_tfrecord)
    with pytest.raises(ValueError, match=r"prepared as tfrecord; only array_record .*\n.*convert_format"):
        load_dataset("tiny", data_dir=str(tmp_path))


def test_sources_do_not_hold_on_to_the_builder(tmp_path):
    source = load(tmp_path, train=RECORDS, test=RECORDS).train
    assert isinstance(source, TfdsSplit)
    assert len(pickle.dumps(source)) < 20_000


def test_one_class_is_refused(tmp_path):
    image = encode(noise(4, 4, 3))
    write_tfds(tmp_path, {"train": [(image, 0)], "test": [(image, 0)]}, num_classes=1)
    with pytest.raises(ValueError, match="tiny has the one class 0: expected two or more"):
        load_dataset("tiny", data_dir=str(tmp_path))
