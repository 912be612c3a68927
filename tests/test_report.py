# SPDX-License-Identifier: Apache-2.0
"""The command that writes the page of a run, with pictures."""

import re
import shutil

import numpy as np
import pytest

from tests.html_pages import Page, assert_stands_alone
from tests.trained import write_run
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.data.pipeline import eval_batches
from vit_jax.report import Example, main, show_example
from vit_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """The workdir of a run, and its experiment."""
    folder = tmp_path_factory.mktemp("report")
    workdir, experiment, params = write_run(folder / "run", data_dir)
    return workdir, experiment, params


def test_the_worst_and_the_best_predictions_have_pictures(place, tmp_path, said):
    workdir, experiment, params = place
    output = tmp_path / "page.html"
    main([f"--workdir={workdir}", f"--output={output}", "--pictures=3"])
    assert f"wrote {output}" in said
    page = assert_stands_alone(output.read_text())
    assert page.tags.count("img") == 6
    captions = [text for text in page.texts if re.fullmatch(r"loss [\d.e-]+", text)]
    losses = [float(text.rpartition(" ")[2]) for text in captions]
    want = judge(experiment, params)
    np.testing.assert_allclose(losses[:3], np.sort(want)[::-1][:3], rtol=1e-2)
    np.testing.assert_allclose(losses[3:], np.sort(want)[:3], rtol=1e-2)
    assert "Worst predictions: val, step 8" in page.text
    assert "Calibration: val, step 8" in page.text
    assert re.search(r"digit \d taken for digit \d: \d+ of \d+", page.text)


def judge(experiment, params):
    """The loss of each image of the evaluator's split."""
    (evaluator,) = experiment.evaluators
    losses = []
    for batch in eval_batches(evaluator.data):
        logits = np.asarray(experiment.objective.predict(params, batch)["logits"], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        own = np.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        found = np.log(np.exp(logits).sum(axis=1)) - own
        losses += found[batch["mask"] > 0].tolist()
    return np.array(losses)


def test_of_a_part_of_the_split_it_is_said(place, tmp_path, said):
    workdir, *_ = place
    output = tmp_path / "page.html"
    main([f"--workdir={workdir}", f"--output={output}", "--max_images=20", "--checkpoint=best"])
    text = assert_stands_alone(output.read_text()).text
    assert "Confusion: val, step 4, first 20 images" in text


def test_weights_that_are_no_step_are_named_by_their_file(place, tmp_path, said):
    workdir, *_ = place
    weights = tmp_path / "weights.npz"
    write_npz(weights, load_pretrained(str(workdir)))
    main([f"--workdir={workdir}", f"--output={tmp_path}/page.html", f"--checkpoint={weights}"])
    text = assert_stands_alone((tmp_path / "page.html").read_text()).text
    assert "Confusion: val, weights.npz" in text


def test_without_a_checkpoint_the_page_has_no_pictures(place, tmp_path, said):
    workdir = tmp_path / "run"
    shutil.copytree(place[0], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    main([f"--workdir={workdir}"])
    assert said == [f"wrote {workdir / 'report.html'}"]
    assert "img" not in assert_stands_alone((workdir / "report.html").read_text()).tags


def test_data_that_is_not_there_is_said_and_the_rest_is_written(place, tmp_path, said):
    workdir = tmp_path / "run"
    shutil.copytree(place[0], workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"digits"', '"folder:/nowhere"'))
    main([f"--workdir={workdir}"])
    assert said[0].startswith("without pictures: ")
    assert said[-1] == f"wrote {workdir / 'report.html'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={tmp}"], "expected the workdir of a run"),
        (["--workdir={run}", "--eval=vall"], "--eval=vall: expected an evaluator"),
        (["--workdir={run}", "--checkpoint=5"], "--checkpoint=5: "),
        (["--workdir={run}", "--pictures=0"], "--pictures=0: expected at least 1"),
        (["--workdir={run}", "--no_predict", "--output=/dev/null/x"], "can't be written"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        main([argument.format(tmp=tmp_path, run=place[0]) for argument in arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "kind"), [(160, "jpeg"), (16, "png")])
def test_a_picture_has_its_classes_below_it_and_a_photograph_is_small(size, kind):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    example = Example(image, label=1, predicted=0, confidence=0.755, loss=2.5)
    text = show_example(example, ["great white shark", "<dog>"])
    page = Page(text)
    assert page.texts == ["<dog>, taken for great white shark", "75.5 % sure", "loss 2.5"]
    assert page.sources[0].startswith(f"data:image/{kind};base64,")
    # Enlarged pixels stay squares.
    assert ("class=sharp" in text) == (kind == "png")
    assert len(text) < 40_000
