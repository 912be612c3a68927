# SPDX-License-Identifier: Apache-2.0
"""Mixtures: exact proportions, each source in epochs of its own."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest

from tests.images import write_folder
from vit_jax.data.mixture import make_schedule
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.utils.errors import UserError


def random_weights():
    rng = np.random.default_rng(0)
    for _ in range(30):
        yield tuple(int(w) for w in rng.integers(1, 60, rng.integers(2, 9)))
    # Nearly equal ones, and one beside many small ones, are the hard cases.
    yield (10, 9, 9, 9, 9, 9, 1)
    yield (100, *[1] * 20)


WEIGHTS = [(1,), (1, 1), (0.7, 0.3), (0.1, 0.2, 0.7), (3, 2.5, 0.25), *random_weights()]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_of_any_first_positions_are_within_one(weights):
    exact = [Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    schedule = make_schedule(weights, key="data.mixture")
    counts = [0] * len(weights)
    for n in range(1500):
        k, turn = schedule[n]
        assert turn == counts[k]  # every turn of a source once, in order
        counts[k] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - (n + 1) * share) < 1


def test_far_positions_are_exact_and_need_no_table():
    schedule = make_schedule((0.7, 0.3), key="data.mixture")
    k, turn = schedule[10**15]
    assert (k, turn) == (schedule[0][0], 7 * 10**14 if k == 0 else 3 * 10**14)


def folders(tmp_path):
    """20 images of greys 0 to 19, and 30 of 100 to 129."""
    write_folder(tmp_path / "a", {"train/x": 12, "train/y": 8})
    write_folder(tmp_path / "b", {"train/x": 14, "train/y": 16}, start=100)
    return f"folder:{tmp_path / 'a'}", f"folder:{tmp_path / 'b'}"


@pytest.fixture
def mixed(tmp_path):
    a, b = folders(tmp_path)
    return DatasetSpec(
        name="",
        split="",
        preprocess="decode|resize(8)|random_shift(1)",
        batch_size=16,
        data_dir=None,
        key="data",
        mixture=((a, "train", 0.7), (b, "train[:90%]", 0.3)),
    )


def take(spec, steps, *, seed=0, step=0, **hosts):
    return list(itertools.islice(train_batches(spec, seed=seed, step=step, **hosts), steps))


def greys(batches):
    return np.concatenate([b["image"][:, 4, 4, 0] for b in batches]).astype(int)


def test_the_stream_has_the_shares_and_each_source_its_epochs(mixed):
    stream = greys(take(mixed, 25))  # 400 positions
    first, second = stream[stream < 100], stream[stream >= 100]
    assert (len(first), len(second)) == (280, 120)
    for values, length in ((first, 20), (second, 27)):
        epochs = [tuple(values[i : i + length]) for i in range(0, len(values) - length, length)]
        assert {len(set(epoch)) for epoch in epochs} == {length}
        assert len(set(epochs)) == len(epochs)


def test_other_seeds_give_another_order_in_the_same_shares(mixed):
    zero, one = (greys(take(mixed, 10, seed=seed)) for seed in (0, 1))
    assert zero.tolist() != one.tolist()
    np.testing.assert_array_equal(zero < 100, one < 100)


@pytest.mark.parametrize(
    ("hosts", "threads", "step"),
    [
        *((1, 0, 4), (1, 3, 4), (2, 2, 0), (4, 0, 4), (8, 3, 0), (8, 3, 4)),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in ((1, 0, 0), (1, 3, 0), (2, 2, 4), (4, 0, 0))
        ),
    ],
)
def test_batches_are_the_same_on_any_hosts_threads_and_first_step(hosts, threads, step, mixed):
    want = take(mixed, 10)[step:]
    spec = dataclasses.replace(mixed, num_threads=threads)
    parts = [
        take(spec, 10 - step, step=step, shards=(host,), num_shards=hosts) for host in range(hosts)
    ]
    for part, batch in zip(zip(*parts, strict=True), want, strict=True):
        for key in batch:
            together = np.concatenate([p[key] for p in part])
            np.testing.assert_array_equal(together, batch[key], err_msg=key)


def test_a_far_step_belongs_to_its_position(mixed):
    (whole,) = take(mixed, 1, step=1_000_000)
    halves = take(dataclasses.replace(mixed, batch_size=8), 2, step=2_000_000)
    np.testing.assert_array_equal(np.concatenate([h["image"] for h in halves]), whole["image"])


def test_records_of_all_sources_are_the_examples_of_a_mixture(mixed):
    assert len(mixed.open()) == 20 + 27
    assert mixed.info.class_names == ("x", "y")
    assert str(mixed) == ", ".join(name for name, *_ in mixed.mixture)
    assert len(set(greys(eval_batches(mixed))[:47])) == 47


def test_sources_share_the_classes_of_the_one_with_the_most(mixed, tmp_path):
    write_folder(tmp_path / "c", {f"train/{name}": 1 for name in "wxyz"})
    mixture = (*mixed.mixture, (f"folder:{tmp_path / 'c'}", "train", 1.0))
    mixed = dataclasses.replace(mixed, mixture=mixture)
    assert mixed.info.class_names == ("w", "x", "y", "z")
    source = mixed.open()
    records = [(source.describe(i), int(source[i]["label"])) for i in range(len(source))]
    found = {(path.split("/")[-2], label) for path, label in records}
    assert found == {(name, label) for label, name in enumerate("wxyz")}


def test_classes_that_no_other_source_has_are_refused(mixed, tmp_path):
    write_folder(tmp_path / "c", {"train/x": 3, "train/z": 3})
    mixture = (mixed.mixture[0], (f"folder:{tmp_path / 'c'}", "train", 1.0))
    with pytest.raises(UserError) as error:
        _ = dataclasses.replace(mixed, mixture=mixture).info
    for word in ("data.mixture", "2 classes ('x', 'z')", "2 classes ('x', 'y')", "lacks 'z'"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0.7, 0), ["weight 0", "more than 0"]),
        ((0.7, -1), ["weight -1"]),
        ((1, float("nan")), ["weight nan"]),
        ((0.333333, 0.666667), ["1,000,000 parts", "such as 333, 667"]),
    ],
)
def test_weights_that_will_not_do_are_refused(weights, words):
    with pytest.raises(UserError) as error:
        make_schedule(weights, key="data.mixture")
    for word in ("data.mixture", *words):
        assert word in str(error.value)


def test_sources_with_captions_mix_with_or_without_labels(tmp_path):
    a, _ = folders(tmp_path)
    for path in (tmp_path / "a").rglob("*.png"):
        path.with_suffix(".txt").write_text("of a class")
    write_folder(tmp_path / "loose", {"train": 8}, start=200)
    for path in (tmp_path / "loose").rglob("*.png"):
        path.with_suffix(".txt").write_text("a pair")
    pairs = f"pairs:{tmp_path / 'loose'}"
    spec = DatasetSpec(
        name="",
        split="",
        preprocess="decode|resize(4)",
        batch_size=12,
        data_dir=None,
        key="data",
        mixture=((a, "train", 2), (pairs, "train", 1)),
        tokenizer="bytes(length=16)",
    )
    assert (spec.info.num_classes, spec.info.captions) == (0, True)
    batch = next(train_batches(spec, seed=0, step=0))
    assert batch.keys() == {"image", "tokens"}
    texts = [bytes(int(t) - 3 for t in row if t > 2).decode() for row in batch["tokens"]]
    greys = batch["image"][:, 0, 0, 0]
    assert [text == "a pair" for text in texts] == (greys >= 200).tolist()
    assert (greys >= 200).sum() == 4
    parts = [next(train_batches(spec, seed=0, step=0, shards=(k,), num_shards=3)) for k in range(3)]
    for key, value in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
    both = dataclasses.replace(spec, mixture=((a, "train", 2), (a, "train", 1)))
    assert next(train_batches(both, seed=0, step=0)).keys() == {"image", "label", "tokens"}
