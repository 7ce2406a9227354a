import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_jax.data import eval_batches, fit, train_iterator
from repvgg_jax.data.sources.memory import InMemory
from tests.data.tiny_data import noise

SIZE = {"image_size": 4, "channels": 3}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def same(batches, others):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(batches, others, strict=True)
    )


@pytest.mark.parametrize("crop", ["resize", "random_resized"])
def test_batches_have_the_promised_shapes_and_types(numbered, crop):
    records = numbered(8, height=6, width=9)
    batch = next(train_iterator(records, batch_size=3, seed=0, crop=crop, **SIZE))
    assert batch.keys() == {"image", "label", "index"}
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 4, 4, 3), np.uint8)
    for name in ("label", "index"):
        assert (batch[name].shape, batch[name].dtype) == ((3,), np.int32)


@pytest.mark.parametrize("crop", ["resize", "random_resized"])
@pytest.mark.parametrize("keep", [list, lambda records: InMemory(records, (6, 6, 3))], ids=["read", "in memory"])
def test_the_index_is_that_of_the_record_in_the_data_set(numbered, crop, keep):
    source = keep(numbered(11, height=6, width=6))
    for shard in ((0, 1), (0, 2), (1, 2)):
        for batch in take(train_iterator(source, batch_size=4, seed=0, crop=crop, shard=shard, **SIZE), 6):
            np.testing.assert_array_equal(batch["index"], batch["label"])


def test_images_stay_with_their_labels(numbered):
    records = numbered(12)
    for batch in take(train_iterator(records, batch_size=4, seed=0, **SIZE), 6):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            assert np.array_equal(image, records[label]["image"])


def test_every_epoch_visits_each_record_once(numbered):
    iterator = train_iterator(numbered(12), batch_size=4, seed=0, **SIZE)
    epochs = [labels(take(iterator, 3)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_each_epoch_leaves_out_other_records(numbered):
    iterator = train_iterator(numbered(11), batch_size=4, seed=0, **SIZE)
    epochs = [set(labels(take(iterator, 2))) for _ in range(8)]
    assert all(len(epoch) == 8 for epoch in epochs)
    assert set.union(*epochs) == set(range(11))
    assert set.intersection(*epochs) != epochs[0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40))
def test_no_epoch_repeats_a_record_on_any_shard(size, batch_size, shards, seed):
    steps = size // (batch_size * shards)
    if not steps:
        return
    records = [{"image": np.zeros((1, 1, 1), np.uint8), "label": i} for i in range(size)]
    options = {"batch_size": batch_size, "image_size": 1, "channels": 1, "seed": seed}
    streams = [train_iterator(records, shard=(i, shards), **options) for i in range(shards)]
    for _ in range(3):
        seen = [label for stream in streams for label in labels(take(stream, steps))]
        assert len(set(seen)) == len(seen) == steps * batch_size * shards


@pytest.mark.parametrize("crop", ["resize", "random_resized"])
def test_the_stream_is_determined_by_its_seed(numbered, crop):
    def stream(seed):
        records = numbered(12, height=9, width=7)
        return take(train_iterator(records, batch_size=4, seed=seed, crop=crop, **SIZE), 7)

    assert same(stream(0), stream(0))
    assert not same(stream(0), stream(1))


def test_neighbouring_seeds_share_no_epoch(numbered):
    epochs = []
    for seed in range(4):
        iterator = train_iterator(numbered(12), batch_size=12, seed=seed, **SIZE)
        epochs += [tuple(labels([batch])) for batch in take(iterator, 4)]
    assert len(set(epochs)) == 16


def test_random_crops_differ_between_epochs():
    records = [{"image": noise(20, 20, 3), "label": 0}]
    batches = take(train_iterator(records, batch_size=1, seed=0, crop="random_resized", **SIZE), 5)
    assert len({batch["image"].tobytes() for batch in batches}) == 5


@pytest.mark.parametrize("crop", ["resize", "random_resized"])
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_together_read_what_one_would(numbered, crop, shards):
    records = numbered(29, height=8, width=8)
    options = {"seed": 5, "crop": crop, **SIZE}
    whole = take(train_iterator(records, batch_size=2 * shards, **options), 9)
    parts = [take(train_iterator(records, batch_size=2, shard=(i, shards), **options), 9) for i in range(shards)]
    for step, batch in enumerate(whole):
        for shard in range(shards):
            expected = {key: value[shard::shards] for key, value in batch.items()}
            assert same([parts[shard][step]], [expected])
    assert not same(parts[0], parts[1])


@pytest.mark.parametrize("crop", ["resize", "random_resized"])
def test_a_restored_state_resumes_bit_for_bit(numbered, crop):
    records = numbered(11, height=9, width=7)

    def start():
        return train_iterator(records, batch_size=4, seed=3, crop=crop, **SIZE)

    iterator = start()
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)
    resumed = start()
    take(resumed, 1)
    resumed.set_state(state)
    assert same(take(resumed, 6), expected)
    assert not same(take(start(), 6), expected)
    iterator.set_state(state)
    assert same(take(iterator, 6), expected)


def test_worker_processes_yield_the_same_stream_and_resume(numbered):
    records = numbered(12, height=9, width=7)
    options = {"batch_size": 4, "seed": 3, "crop": "random_resized", **SIZE}
    expected = take(train_iterator(records, **options), 9)
    with_workers = train_iterator(records, num_workers=2, **options)
    try:
        assert same(take(with_workers, 5), expected[:5])
        state = json.loads(json.dumps(with_workers.get_state()))
        take(with_workers, 1)
        with_workers.set_state(state)
        assert same(take(with_workers, 4), expected[5:])
    finally:
        with_workers.close()


def test_images_in_memory_give_the_same_batches(numbered):
    for size, channels in ((4, 3), (6, 3), (4, 1)):
        options = {"batch_size": 5, "image_size": size, "channels": channels}
        records, kept = numbered(12), InMemory(numbered(12), (4, 4, 3))
        plain = train_iterator(records, seed=0, **options)
        assert same(take(train_iterator(kept, seed=0, num_workers=2, **options), 5), take(plain, 5))
        assert same(list(eval_batches(kept, **options)), list(eval_batches(records, **options)))


def test_grey_images_fill_three_channels(numbered):
    batch = next(train_iterator(numbered(4, channels=1), batch_size=4, seed=0, **SIZE))
    assert batch["image"].shape == (4, 4, 4, 3)
    assert (batch["image"] == batch["image"][..., :1]).all()


def test_evaluation_reads_every_record_once_and_in_order(numbered):
    records = numbered(10)
    batches = list(eval_batches(records, batch_size=4, **SIZE))
    assert [batch["mask"].tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    assert all(batch["image"].shape == (4, 4, 4, 3) for batch in batches)
    assert all(batch.keys() == {"image", "label", "mask"} for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    assert np.array_equal(images[mask], np.stack([record["image"] for record in records]))
    assert np.array(labels(batches))[mask].tolist() == list(range(10))
    assert not images[~mask].any()
    assert not np.array(labels(batches))[~mask].any()
    assert (batches[0]["label"].dtype, batches[0]["mask"].dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize(("size", "shards"), [(10, 2), (9, 4), (1, 3), (8, 2)])
def test_evaluation_shards_keep_step_and_cover_every_record(numbered, size, shards):
    parts = [list(eval_batches(numbered(size), batch_size=2, shard=(i, shards), **SIZE)) for i in range(shards)]
    assert {len(part) for part in parts} == {-(-size // (2 * shards))}
    seen = [batch["label"][batch["mask"]] for part in parts for batch in part]
    assert sorted(np.concatenate(seen).tolist()) == list(range(size))


def test_evaluation_resizes_before_it_crops(numbered):
    records = numbered(3, height=20, width=30)
    (batch,) = eval_batches(records, batch_size=3, image_size=8, channels=3, eval_resize=12)
    assert np.array_equal(batch["image"], np.stack([fit(record["image"], 8, 12) for record in records]))
    (plain,) = eval_batches(records, batch_size=3, image_size=8, channels=3)
    assert not np.array_equal(batch["image"], plain["image"])


def test_a_batch_larger_than_the_data_is_refused(numbered):
    with pytest.raises(ValueError, match=r"batch_size \(=4\) times 3 shard\(s\) exceeds the 11 .* at most 3"):
        train_iterator(numbered(11), batch_size=4, seed=0, shard=(0, 3), **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(=0\)"),
        ({"image_size": 0}, r"image_size \(=0\)"),
        ({"channels": 2}, r"channels \(=2\)"),
        ({"shard": (2, 2)}, r"shard \(=\(2, 2\)\)"),
        ({"seed": -1}, r"seed \(=-1\)"),
        ({"crop": "centre"}, r"crop \(='centre'\) must be 'resize' or 'random_resized'"),
    ],
)
def test_arguments_out_of_range_are_named(numbered, change, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(numbered(4), **{"batch_size": 2, "seed": 0, **SIZE, **change})


def test_evaluation_refuses_what_it_cannot_do(numbered):
    with pytest.raises(ValueError, match="no records"):
        eval_batches([], batch_size=2, **SIZE)
    with pytest.raises(ValueError, match=r"eval_resize \(=2\) must be at least image_size \(=4\)"):
        eval_batches(numbered(2), batch_size=2, eval_resize=2, **SIZE)


def test_a_record_that_cannot_be_read_ends_the_stream_with_its_error():
    class Broken(list):
        def __getitem__(self, index):
            raise ValueError(f"record {index} is broken")

    iterator = train_iterator(Broken([0, 1]), batch_size=2, seed=0, **SIZE)
    with pytest.raises(ValueError, match=r"record \d is broken"):
        next(iterator)
