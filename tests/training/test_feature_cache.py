# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen image tower are computed once, and training reads them."""

import collections
import json

import jax
import numpy as np
import pytest

from tests.images import encode
from tests.pairs import IMAGE, pairs_config
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import train_batches
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

FROZEN = {"name": "sgd", "lr": 0.1, "schedule": "constant", "freeze": ("img/.*",)}


def make_config(data_dir, folder, **changes):
    """Of 200 pairs and, unless `folder` is None, a cache in that folder."""
    objective = {"name": "contrastive", "feature_cache": None if folder is None else str(folder)}
    objective |= changes.pop("objective", {})
    options = {"data__split": "train[:200]", "optimizer": FROZEN, "evals": {}, "total_steps": 14}
    return pairs_config(data_dir, objective=objective, **(options | changes))


def make(data_dir, folder, **changes):
    devices = jax.devices()[:1]
    return Experiment.from_config(make_config(data_dir, folder, **changes), devices=devices)


@pytest.fixture(scope="module")
def params(captions_dir):
    return make(captions_dir, None).init_state().params


def test_losses_are_those_of_the_run_without_a_cache(captions_dir, tmp_path, params, said):
    found = {}
    for folder in (None, tmp_path):
        experiment = make(captions_dir, folder)
        if folder is not None:
            experiment.feature_cache.fill(params)
            assert any(line.startswith(f"wrote {experiment.feature_cache.path}") for line in said)
        state, losses = experiment.init_state(), []
        batches = experiment.train_batches(0)
        for _ in range(14):  # More than one epoch.
            state, metrics = experiment.train_step(state, next(batches))
            losses.append(float(metrics["loss"]))
        found[folder] = losses
    np.testing.assert_allclose(found[tmp_path], found[None], rtol=1e-5)
    assert len(set(found[None])) == 14


def test_features_are_those_of_each_record_in_order(captions_dir, tmp_path, params, said):
    experiment = make(captions_dir, tmp_path)
    experiment.feature_cache.fill(params)
    found = experiment.feature_cache.spec.read_features()
    source, decode = experiment.train_data.open(), experiment.train_data.ops()[0]
    images = np.stack([decode(source[i])["image"] for i in (0, 17, 199)])
    predict = jax.jit(experiment.objective.predict)
    want = predict(params, {"image": images})["zimg"]
    assert found.shape == (200, 16)
    np.testing.assert_allclose(found[[0, 17, 199]], want, atol=1e-6)
    batch = next(experiment.train_batches(0))
    assert batch.keys() == {"zimg", "tokens"}
    images = next(experiment.image_batches(0))
    np.testing.assert_array_equal(batch["tokens"], images["tokens"])
    want = predict(params, images)["zimg"]
    np.testing.assert_allclose(batch["zimg"], want, atol=1e-6)

    # The same features are not computed again.
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    make(captions_dir, tmp_path, optimizer=FROZEN | {"accum_steps": 4}).feature_cache.fill(params)
    assert file.stat().st_mtime_ns == before
    assert f"{file}: features of the images are read from this file" in said


def test_other_weights_data_or_preparation_have_a_file_of_their_own(captions_dir, tmp_path, params):
    changes = [
        {},
        {"data__split": "train[100:300]"},
        {"data__preprocess": "decode|resize(16)|resize(24)"},
        {"objective": {"pixel_mean": 0.4}},
        {"model__image": IMAGE | {"activation": "quick_gelu"}},
        {"precision": "bfloat16"},
    ]
    caches = [make(captions_dir, tmp_path, **change).feature_cache for change in changes]
    scaled = {**params, "img": jax.tree.map(lambda x: 2 * x, params["img"])}
    found = [*(cache.locate(params) for cache in caches), caches[0].locate(scaled)]
    assert len(set(found)) == len(found)
    # The other tower does not count, nor does the folder.
    other = {**params, "txt": jax.tree.map(lambda x: 2 * x, params["txt"])}
    assert caches[0].locate(other) == found[0]
    elsewhere = make(captions_dir, tmp_path / "elsewhere").feature_cache.locate(params)
    assert elsewhere.name == found[0].name


def test_images_that_cannot_be_read_are_replaced_as_without_a_cache(tmp_path, params):
    rows = []
    for i in range(40):
        path = tmp_path / f"{i:02}.png"
        path.write_bytes(b"no image" if i in (3, 30) else encode(6 * i))
        rows.append({"image": path.name, "caption": f"image {i}", "label": "a", "split": "train"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__name": f"manifest:{tmp_path / 'pairs.jsonl'}", "data__split": "train"}
    changes |= {"data__preprocess": "decode|resize(12)"}
    experiment, counts, tokens = make(None, tmp_path / "cache", **changes), [], []
    experiment.feature_cache.fill(params)
    source = experiment.train_data.open()
    unreadable = [i for i in range(40) if source.describe(i).endswith(("/03.png", "/30.png"))]
    missing = np.isnan(experiment.feature_cache.spec.read_features()).all(axis=1)
    assert np.flatnonzero(missing).tolist() == unreadable
    assert len(unreadable) == 2
    for data in (experiment.train_data, experiment.feature_cache.spec):
        corrupt = CorruptCounter()
        batches = train_batches(data, seed=0, step=0, corrupt=corrupt)
        found = [next(batches) for _ in range(3)]
        batches.close()
        tokens.append(np.stack([batch["tokens"] for batch in found]))
        assert all(np.isfinite(batch["zimg"]).all() for batch in found if "zimg" in batch)
        counts.append(corrupt.counts.corrupt)
    np.testing.assert_array_equal(*tokens)
    assert min(counts) > 0


def test_a_file_is_whole_or_absent(captions_dir, tmp_path, monkeypatch, params):
    cache = make(captions_dir, tmp_path / "cache").feature_cache

    def end_early(*_):
        yield np.zeros((16, 16), np.float32)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "_compute", end_early)
        with pytest.raises(UserError, match=r"objective.feature_cache=.* can't be written: No sp"):
            cache.fill(params)
        free = collections.namedtuple("usage", "free")(1000)
        patch.setattr("shutil.disk_usage", lambda _: free)
        with pytest.raises(UserError, match=r"200 images take 12.8 kB, and 1.0 kB are free"):
            cache.fill(params)
    assert not list((tmp_path / "cache").iterdir())
    cache.fill(params)
    cache.path.write_bytes(cache.path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"can't be read: .*; remove it, and it is made again"):
        cache.fill(params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"lr": 0.1}}, "img/.* is trained, .* expected optimizer.freeze="),
        ({"optimizer": FROZEN | {"freeze": ("img/Tr.*",)}}, "is trained"),
        ({"data__preprocess": "decode|random_shift(1)"}, "RandomShift is random"),
        ({"data__preprocess": "decode|flip_lr"}, "FlipLr is random"),
        ({"objective": {"flip": 0.5}}, r"objective.flip=0.5: .* expected 0, or no feature_cache"),
        ({"objective": {"color_jitter": (0.1, 0, 0)}}, "objective.color_jitter="),
        ({"objective": {"feature_cache": 3}}, "feature_cache=3 is an int"),
        ({"objective": {"feature_cache": ""}}, "feature_cache='': expected a folder"),
        (
            {"model__image": IMAGE | {"dropout_rate": 0.1}},
            "model.image.dropout_rate=0.1: .* expected 0",
        ),
    ],
)
def test_features_that_would_change_are_refused(changes, message, captions_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        make(captions_dir, tmp_path, **changes).check()


def test_a_file_in_place_of_the_folder_is_refused(captions_dir, tmp_path, params):
    (tmp_path / "file").write_text("")
    experiment = make(captions_dir, tmp_path / "file")
    with pytest.raises(UserError, match="can't be written: "):
        experiment.feature_cache.fill(params)


@pytest.mark.slow
def test_a_run_with_a_cache_is_evaluated_on_images_and_resumes(captions_dir, tmp_path, said):
    config = pairs_config(
        captions_dir,
        objective={"name": "contrastive", "feature_cache": str(tmp_path / "cache")},
        data__split="train[:200]",
        optimizer=FROZEN,
        total_steps=4,
        tracking={"images": 4},
    )
    first = train(config, tmp_path / "run")
    assert 0 <= first.metrics["val/top1"] <= 1
    config.total_steps = 6
    del said[:]
    assert train(config, tmp_path / "run").step == 6
    assert any("are read from this file" in line for line in said)


def test_batches_before_the_file_are_refused(captions_dir, tmp_path):
    with pytest.raises(ValueError, match="have not been computed"):
        make(captions_dir, tmp_path).train_batches(0)
