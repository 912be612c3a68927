# SPDX-License-Identifier: Apache-2.0
"""Records that can't be read: replaced, counted, masked out, and too many of them."""

import itertools

import numpy as np
import pytest

from tests.images import write_folder
from vit_jax.data.corrupt import GRACE, CorruptCounter, Counts, check_counts
from vit_jax.data.mixture import Mixture
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.utils.errors import UserError

PREPROCESS = "decode|resize(8)|random_shift(1)"


@pytest.fixture
def spoiled(tmp_path):
    """40 images of greys 0 to 39; those of 3, 4 and 30 are spoiled in different ways."""
    root = write_folder(tmp_path, {"train/a": 20, "train/b": 20})
    (root / "train/a/003.png").write_bytes(b"")
    (root / "train/a/004.png").write_text("no image")
    (root / "train/b/010.png").unlink()
    spec = DatasetSpec(f"folder:{root}", "train", PREPROCESS, 8, None, "data")
    # Listed before it is gone.
    write_folder(tmp_path, {"train/b": 20}, start=20)
    spec.open()
    (root / "train/b/010.png").unlink()
    return spec


BAD = {"a/003.png", "a/004.png", "b/010.png"}


def take(spec, steps, **options):
    return list(itertools.islice(train_batches(spec, seed=0, **({"step": 0} | options)), steps))


def greys(batches):
    return np.concatenate([b["image"][:, 4, 4, 0] for b in batches]).astype(int)


def names(source):
    return [source.describe(i)[-9:] for i in range(len(source))]


def test_the_next_record_that_can_be_read_stands_in(spoiled):
    corrupt = CorruptCounter()
    values = greys(take(spoiled, 5, corrupt=corrupt))  # an epoch
    order = [20 * (n[0] == "b") + int(n[2:5]) for n in names(spoiled.open())]
    stand_ins = []
    for index, name in enumerate(names(spoiled.open())):
        if name in BAD:
            following = [(index + step) % 40 for step in range(1, 40)]
            stand_ins.append(
                order[next(i for i in following if names(spoiled.open())[i] not in BAD)]
            )
    good = [
        grey for grey, name in zip(order, names(spoiled.open()), strict=True) if name not in BAD
    ]
    assert sorted(values) == sorted(good + stand_ins)
    assert corrupt.counts.corrupt >= 3
    assert corrupt.counts.seen >= 40
    assert corrupt.counts.lost == 0


@pytest.mark.parametrize(("hosts", "threads"), [(1, 0), (2, 3), (8, 2)])
def test_stand_ins_are_the_same_on_any_hosts_and_threads(hosts, threads, spoiled):
    want = take(spoiled, 8)
    spec = DatasetSpec(**{**vars(spoiled), "num_threads": threads})
    parts = [take(spec, 8, shards=(host,), num_shards=hosts) for host in range(hosts)]
    for part, batch in zip(zip(*parts, strict=True), want, strict=True):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([p[key] for p in part]), batch[key])
    np.testing.assert_array_equal(take(spoiled, 2, step=6)[1]["image"], want[7]["image"])


def test_a_record_is_named_once_with_the_reason(spoiled, caplog):
    take(spoiled, 15)  # three epochs
    lines = [r.message for r in caplog.records if r.message.startswith("corrupt: ")]
    assert len(lines) == 3
    assert {line.split(": ")[1][-9:] for line in lines} == BAD
    assert any("0 bytes" in line for line in lines)
    assert any("FileNotFoundError" in line for line in lines)


def test_the_first_records_are_named_and_then_counted(caplog):
    corrupt = CorruptCounter()
    for number in range(1234):
        corrupt.add(f"{number}.png", ImageError("no crop"))
        corrupt.add("0.png", ImageError("no crop"))
    lines = [r.message for r in caplog.records]
    assert lines[:10] == [f"corrupt: {number}.png: no crop" for number in range(10)]
    counts = ("11", "100", "1,000")
    assert lines[10:] == [
        f"corrupt: {count} records so far; only the first 10 are named" for count in counts
    ]
    assert corrupt.counts.corrupt == 2468


def test_stand_ins_come_from_the_same_source_of_a_mixture(tmp_path):
    write_folder(tmp_path / "a", {"train/x": 3})
    write_folder(tmp_path / "b", {"train/x": 3}, start=100)
    sources = [
        DatasetSpec(f"folder:{tmp_path / name}", "train", PREPROCESS, 2, None, "data").open()
        for name in "ab"
    ]
    mixture = Mixture(sources)
    assert [mixture.successor(i) for i in range(6)] == [1, 2, 0, 4, 5, 3]
    assert mixture.describe(4) == sources[1].describe(1)


def test_evaluation_masks_out_what_can_not_be_read(spoiled):
    corrupt = CorruptCounter()
    batches = list(eval_batches(spoiled, corrupt=corrupt))
    mask = np.concatenate([b["mask"] for b in batches])
    np.testing.assert_array_equal(mask, [name not in BAD for name in names(spoiled.open())])
    assert corrupt.counts.corrupt == 3
    assert {b["image"].shape for b in batches} == {(8, 8, 8, 3)}
    assert not np.concatenate([b["image"] for b in batches])[mask == 0].any()


@pytest.mark.parametrize(
    ("counts", "limit"),
    [
        (Counts(seen=1, corrupt=GRACE), 0.001),
        (Counts(seen=20_000, corrupt=20), 0.001),
        (Counts(seen=2000, corrupt=2000), 1.0),
        (Counts(seen=2000), 0.0),
    ],
)
def test_a_few_are_let_pass(counts, limit):
    check_counts(counts, limit)


@pytest.mark.parametrize(
    ("counts", "limit"),
    [
        (Counts(seen=1, corrupt=GRACE + 1), 0.001),
        (Counts(seen=20_000, corrupt=21), 0.001),
        (Counts(seen=20_000, corrupt=1), 0.0),
    ],
)
def test_too_many_are_an_error_in_one_line(counts, limit):
    with pytest.raises(UserError) as error:
        check_counts(counts, limit)
    for word in (
        f"{counts.corrupt} records of {counts.seen:,}",
        f"data.max_corrupt={limit} allows",
        "repair or remove these files",
        "or add --config.data.max_corrupt=",
    ):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_read_blanks_stand_in_and_are_an_error_at_any_limit(tmp_path):
    root = write_folder(tmp_path, {"train/a": 4})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    spec = DatasetSpec(f"folder:{root}", "train", PREPROCESS, 4, None, "data", num_threads=0)
    corrupt = CorruptCounter()
    (batch,) = take(spec, 1, corrupt=corrupt)
    assert not batch["image"].any()
    assert corrupt.counts == Counts(seen=4, corrupt=16, lost=4)
    with pytest.raises(UserError, match="nor have those after them"):
        check_counts(corrupt.counts, 1.0)
