# SPDX-License-Identifier: Apache-2.0
"""A workdir that old code wrote is read and resumed; see `testdata/make_old_workdir.py`."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.testdata.make_old_workdir import CONFIG, FOLDER
from vit_jax import evaluate, predict, status
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.observe import console
from vit_jax.observe.jsonl import read_metrics, read_records
from vit_jax.training.run import train
from vit_jax.utils.tree import flatten


@pytest.fixture(scope="module")
def recorded():
    with np.load(FOLDER / "params.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def workdir(tmp_path):
    """A copy of the stopped run, to write to."""
    return Path(shutil.copytree(FOLDER / "workdir", tmp_path / "run"))


@pytest.fixture
def overrides(data_dir):
    return [f"--config.data.data_dir={data_dir}"]


def read_arrays(workdir, step):
    """Parameters and their average by `STEP/ITEM/PATH`."""
    arrays = {}
    for item in ("params", "ema_params"):
        params, _ = load_params(workdir / "checkpoints" / str(step), item=item)
        arrays |= {f"{step}/{item}/{k}": np.asarray(v) for k, v in flatten(params).items()}
    return arrays


def test_checkpoint_holds_the_same_bits(recorded):
    read = read_arrays(FOLDER / "workdir", 4)
    assert read.keys() == {k for k in recorded if k.startswith("4/")}
    for path, array in read.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, recorded[path], err_msg=path)


def test_run_resumes_and_ends_with_the_same_parameters(recorded, workdir, data_dir):
    config = ConfigDict(CONFIG)
    config.data.data_dir = data_dir
    train(config, str(workdir))
    assert list_steps(workdir) == [4, 8]
    # The evaluation of step 4, which SIGTERM prevented, is made up for.
    assert [r["step"] for r in read_metrics(workdir) if "val/top1" in r] == [2, 4, 6, 8]
    trained = read_arrays(workdir, 8)
    assert trained.keys() == {k for k in recorded if k.startswith("8/")}
    # Programs for another CPU, even of the same instructions, or of another version of XLA add in
    # another order, so they give other last digits whatever code they come from.
    for path, array in trained.items():
        np.testing.assert_allclose(array, recorded[path], rtol=0, atol=1e-6, err_msg=path)


def test_evaluation_gives_the_scores_of_the_next_evaluation_of_the_run(workdir, overrides):
    evaluate.main([f"--workdir={workdir}", *overrides])
    (record,) = read_records(workdir / "evals.jsonl")
    assert record["step"] == 4
    # As the old code evaluated step 4 when it resumed.
    assert (record["val/count"], record["val/top1"], record["val_ema/top5"]) == (50, 0.04, 0.46)
    assert record["val/loss"] == pytest.approx(2.3110, abs=5e-5)
    assert record["val_ema/loss"] == pytest.approx(2.3091, abs=5e-5)


def test_status_tells_why_it_ended(workdir, capsys):
    status.main([str(workdir), "--json"])
    described = json.loads(capsys.readouterr().out)
    assert (described["step"], described["total_steps"]) == (4, 8)
    assert (described["starts"], described["causes"]) == (1, ["SIGTERM"])
    assert (described["checkpoints"], described["newest_checkpoint"]) == ([4], "verified")


def test_images_are_classified(workdir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(console.console, "stderr", False)
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.full((8, 8, 3), 128, np.uint8))
    assert not predict.main([f"--workdir={workdir}", "--format=csv", "--top_k=3", str(image)])
    header, row = capfd.readouterr().out.splitlines()
    assert "probability" in header
    assert str(image) in row
