# SPDX-License-Identifier: Apache-2.0
"""Shards in shuffled order with records shuffled within windows, as arithmetic of position."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.data.sources.test_tar import cache, write
from vit_jax.config.schema import Data
from vit_jax.data.classes import Relabelled
from vit_jax.data.mixture import Mixture, make_schedule
from vit_jax.data.order import Mixed, Shuffled, WindowShuffled, shuffled
from vit_jax.data.pack import main as pack
from vit_jax.data.pipeline import DatasetSpec, train_batches
from vit_jax.data.sources import open_source
from vit_jax.data.sources.base import Shards
from vit_jax.data.sources.ranges import LocalRanges
from vit_jax.data.sources.tar import tar_dataset
from vit_jax.utils.errors import UserError

__all__ = ["cache"]

LENGTHS = {"000": 9, "001": 1, "002": 12, "003": 8}
TOTAL = sum(LENGTHS.values())


def make_order(lengths, *, window, seed=0, rows=None):
    bounds = np.cumsum([0, *lengths])
    return WindowShuffled(Shards(bounds, rows), window=window, seed=seed)


@pytest.mark.parametrize("window", [1, 4, 7, 30, 1000])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 3, 12], [30], [1, 1, 1], [1]])
def test_each_epoch_has_every_record_once(lengths, window):
    order, total = make_order(lengths, window=window), sum(lengths)
    epochs = [[order[epoch * total + i] for i in range(total)] for epoch in (0, 1, 2, 10**6)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total > 3 and (window > 1 or len(lengths) > 2):
        assert len(set(map(tuple, epochs))) > 1


def test_a_window_of_one_record_reads_shard_after_shard():
    order, seen = make_order([10] * 20, window=1, seed=5), set()
    for epoch in range(5):
        found = [order[epoch * 200 + i] for i in range(200)]
        shards = tuple(dict.fromkeys(record // 10 for record in found))
        assert found == [shard * 10 + i for shard in shards for i in range(10)]
        seen.add(shards)
    assert len(seen) == 5


@pytest.mark.parametrize("window", [4, 7, 64])
def test_a_record_is_within_a_window_of_its_place_in_the_sequence_of_shards(window):
    order, one = (make_order([10] * 20, window=w, seed=5) for w in (window, 1))
    for epoch in range(3):
        found, sequence = ([o[epoch * 200 + i] for i in range(200)] for o in (order, one))
        place = {record: i for i, record in enumerate(sequence)}
        distances = [abs(place[record] - i) for i, record in enumerate(found)]
        assert window / 2 <= max(distances) < window
        for start in range(0, 200, window):
            assert sorted(found[start : start + window]) == sorted(sequence[start : start + window])


def test_windows_of_an_epoch_are_shuffled_differently():
    order = make_order([400], window=20)
    within = {tuple(order[start + i] % 20 for i in range(20)) for start in range(0, 4000, 20)}
    assert len(within) > 190


def test_the_window_of_a_position_ends_with_its_epoch():
    order = make_order([6, 4], window=4)
    assert [order.window(p) for p in (0, 3, 4, 9, 10, 27)] == [
        range(0, 4), range(0, 4), range(4, 8), range(8, 10), range(10, 14), range(24, 28)
    ]  # fmt: skip


def test_shards_are_found_in_rows_of_any_order():
    rng, bounds = np.random.default_rng(0), np.cumsum([0, 5, 3, 7])
    rows = rng.permutation(15)
    order = make_order([5, 3, 7], window=1, rows=np.argsort(rows))
    shards = np.searchsorted(bounds, [rows[order[i]] for i in range(15)], side="right") - 1
    assert len(list(itertools.groupby(shards))) == 3  # Each shard is read in one go.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four shards of 30 greys, with their numbers as labels."""
    root, first = tmp_path_factory.mktemp("shards"), 0
    for name, count in LENGTHS.items():
        numbers = range(first, first + count)
        members = [p for n in numbers for p in ((f"{n:03}.cls", str(n)), (f"{n:03}.png", n))]
        write(root / f"train-{name}.tar", members)
        first += count
    return root


@pytest.fixture
def spec(folder):
    tar_dataset.cache_clear()
    return DatasetSpec(
        f"tar:{folder}", "train", "decode|resize(4)", 8, None, "data", 2, shuffle_window=10
    )


def labels(batches, count):
    found = [batch["label"] for batch in itertools.islice(batches, count)]
    return np.concatenate(found).tolist()


def test_batches_are_the_same_for_any_start_and_any_hosts(spec):
    whole = labels(train_batches(spec, seed=1, step=0), 12)
    for epoch in range(3):
        assert sorted(whole[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))
    assert labels(train_batches(spec, seed=1, step=5), 7) == whole[5 * 8 :]
    assert whole != labels(train_batches(spec, seed=2, step=0), 12)
    everything = dataclasses.replace(spec, shuffle_window=0)
    assert whole != labels(train_batches(everything, seed=1, step=0), 12)
    for hosts in (2, 4):
        parts = [
            np.reshape(
                labels(train_batches(spec, seed=1, step=3, shards=(k,), num_shards=hosts), 9),
                (9, -1),
            )
            for k in range(hosts)
        ]
        assert np.concatenate(parts, axis=1).ravel().tolist() == whole[3 * 8 :]


def test_images_and_labels_stay_together(spec):
    for batch in itertools.islice(train_batches(spec, seed=0, step=0), 4):
        assert batch["image"][:, 0, 0, 0].tolist() == batch["label"].tolist()


@pytest.mark.parametrize("hosts", [1, 2])
def test_each_window_is_read_from_start_to_end(hosts, spec, monkeypatch):
    reads, threads = [], []
    monkeypatch.setattr(LocalRanges, "read_through", lambda self, *part: reads.append(part))

    def run(*, target, **_):
        threads.append(len(reads))
        target()
        return type("Thread", (), {"start": lambda self: None})()

    batches = train_batches(spec, seed=1, step=0, shards=(0,), num_shards=hosts)
    monkeypatch.setattr("vit_jax.data.pipeline.threading.Thread", run)
    for step in range(5):  # 40 positions, in windows of 10
        batches._announce(step)
    windows = [reads[a:b] for a, b in itertools.pairwise([*threads, len(reads)])]
    assert len(windows) == 5
    for parts in windows:
        assert parts == sorted(parts)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(parts))
        # Neighbours are one read: with one host, a window has one run of bytes in each shard.
        assert hosts == 2 or len(parts) == len({shard for shard, *_ in parts})
    batches.close()


def test_reading_a_window_reads_the_bytes_of_its_images(spec, folder):
    source = spec.open()
    seen = []

    class Watched(LocalRanges):
        def read(self, number, start, stop):
            seen.append((number, start, stop))
            return super().read(number, start, stop)

    records = source._dataset.records
    records._ranges = Watched(records._ranges.paths)
    source.read_through([3, 2, 1, 20])
    (shard, start, stop), (other, *_) = seen
    assert (shard, other) == (0, 2)
    content = (folder / "train-000.tar").read_bytes()
    for row in (1, 2, 3):
        assert records.read(row) in content[start:stop]


def test_a_mixture_has_windows_of_each_source(spec):
    source, window = spec.open(), 5
    mixture = Mixture([source, Relabelled(source, np.arange(TOTAL), num_classes=TOTAL)])
    order = Mixed(mixture, make_schedule((1.0, 1.0), key="k"), seed=3, window=window)
    found = [order[i] for i in range(4 * TOTAL)]
    for k in range(2):
        own = [index - k * TOTAL for index in found if index // TOTAL == k]
        for epoch in range(2):
            assert sorted(own[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))


@pytest.mark.parametrize("split", ["train[3:25]", "train[10:]+train[:5]", "train[15:]+train"])
def test_slices_keep_to_their_records(spec, split):
    source = dataclasses.replace(spec, split=split).open()
    order = shuffled(source, seed=0, window=4)
    expected = open_source(spec.name, split, data_dir=None, key="k")
    count = len(expected)
    found = sorted(expected.label(order[i]) for i in range(count))
    assert found == sorted(expected.label(i) for i in range(count))


def test_data_without_shards_has_no_windows(data_dir):
    spec = DatasetSpec("digits", "test", "decode", 8, data_dir, "data", shuffle_window=9)
    blank = dataclasses.replace(spec, name="blank:8")
    for one, name in ((spec, "digits"), (blank, "blank:8")):
        with pytest.raises(UserError, match=f"data.shuffle_window=9: {name} is not stored in sha"):
            one.check_window()
    assert isinstance(shuffled(spec.open(), seed=0), Shuffled)
    with pytest.raises(UserError, match=r"data.shuffle_window=-1: expected a number of records"):
        Data(batch_size=1, preprocess="decode", name="digits", split="train", shuffle_window=-1)


@pytest.mark.parametrize(("kind", "flag"), [("packed", "--short_side=8"), ("raw", "--raw=4")])
def test_packs_have_windows_too(kind, flag, spec, tmp_path, said):
    pack([spec.name, str(tmp_path / "dst"), "--shard_size=7", flag])
    packed = dataclasses.replace(spec, name=f"{kind}:{tmp_path / 'dst'}")
    source = packed.open()
    assert source.shards().bounds.tolist() == [0, 7, 14, 21, 28, 30]
    assert sorted(labels(train_batches(packed, seed=1, step=0), 8)[:TOTAL]) == list(range(TOTAL))
