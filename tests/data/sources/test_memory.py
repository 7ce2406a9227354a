import pickle

import numpy as np
import pytest

from repvgg_jax.data.sources import memory
from repvgg_jax.data.sources.memory import InMemory, keep_if_small


class Counting:
    def __init__(self, records):
        self.records = records
        self.reads = []

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.records[index]


def test_what_is_kept_equals_its_source(numbered):
    records = numbered(7)
    kept = InMemory(records, (4, 4, 3))
    images, labels = kept.gather(np.array([6, 0, 6, 3]))
    assert labels.tolist() == [6, 0, 6, 3]
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    for image, label in zip(images, labels, strict=True):
        assert np.array_equal(image, records[label]["image"])
    assert [record["label"] for record in kept] == list(range(7))


def test_each_record_is_read_once(numbered):
    source = Counting(numbered(5))
    kept = InMemory(source, (4, 4, 3))
    for _ in range(3):
        list(kept)
        kept.gather(np.arange(5))
    assert sorted(source.reads) == list(range(5))


def test_nothing_is_read_before_it_is_asked_for(numbered):
    source = Counting(numbered(5))
    assert InMemory(source, (4, 4, 3))[2]["label"] == 2
    assert source.reads == [2]


def test_pickling_leaves_the_images_behind(numbered):
    source = Counting([])
    source.records = numbered(3)
    kept = InMemory(source, (4, 4, 3))
    list(kept)
    copy = pickle.loads(pickle.dumps(kept))
    assert not copy._known.any()
    assert np.array_equal(copy[2]["image"], kept[2]["image"])


def test_an_index_past_the_end_is_an_error(numbered):
    kept = InMemory(numbered(3), (4, 4, 3))
    assert kept[-1]["label"] == 2
    with pytest.raises(IndexError):
        kept[3]


def test_only_small_data_sets_of_one_size_are_kept(numbered, monkeypatch):
    records = numbered(10)
    monkeypatch.setattr(memory, "MEMORY_LIMIT", 10 * 4 * 4 * 3)
    assert isinstance(keep_if_small(records, (4, 4), 3), InMemory)
    assert keep_if_small(records, None, 3) is records
    monkeypatch.setattr(memory, "MEMORY_LIMIT", 10 * 4 * 4 * 3 - 1)
    assert keep_if_small(records, (4, 4), 3) is records
