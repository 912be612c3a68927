# SPDX-License-Identifier: Apache-2.0
"""How a run ends: early by its results or by the caller, and what `train` returns of it."""

import functools

import numpy as np
import pytest

from tests.tiny import tiny_config
from tests.training.test_run import assert_same, stop_at
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import is_complete_early, read_ledger, summarize
from vit_jax.observe.progress import Monitor
from vit_jax.training import services
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

EVALS = {
    "val": {"split": "test[:50]", "preprocess": "decode", "every": 2},
    "test": {"split": "test[50:80]", "preprocess": "decode"},
}
REASON = "val/loss was best at step 2, "


@pytest.fixture(scope="module")
def configure(data_dir):
    return functools.partial(tiny_config, data_dir, total_steps=20, evals=EVALS)


@pytest.fixture(scope="module", autouse=True)
def no_better():
    """No evaluation is better than the first: the loss stays."""
    with pytest.MonkeyPatch.context() as patch:
        evaluate = services.evaluate

        def evaluate_without_progress(*args, **options):
            results = evaluate(*args, **options)
            return {k: 1.0 if k.endswith("/loss") else v for k, v in results.items()}

        patch.setattr(services, "evaluate", evaluate_without_progress)
        yield


@pytest.fixture(scope="module")
def stopped(configure, tmp_path_factory):
    """The workdir and the result of a run that ended early, and the records that were seen."""
    workdir = tmp_path_factory.mktemp("ends") / "w"
    seen = []
    result = train(
        configure(stop={"metric": "val/loss", "patience": 2}), workdir, on_record=seen.append
    )
    return workdir, result, seen


def test_a_run_that_no_longer_improves_ends_as_at_its_last_step(stopped):
    workdir, result, _ = stopped
    assert (result.step, result.total_steps) == (6, 20)
    assert result.stopped.startswith(REASON)
    assert list_steps(workdir) == [4, 6]
    records = read_metrics(workdir)
    assert [r["step"] for r in records if "val/loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "test/loss" in r] == [6]
    names = {path.name for path in (workdir / "evals").iterdir()}
    assert {"val_6.json", "test_6.json"} <= names
    ledger = read_ledger(workdir)
    assert is_complete_early(ledger)
    assert summarize(ledger).causes == (f"finished early: {result.stopped}",)
    assert "ended: finished early" in (workdir / "report.html").read_text()


def test_the_result_has_metrics_history_checkpoint_and_model(stopped):
    workdir, result, seen = stopped
    assert result.checkpoint == workdir / "checkpoints" / "6"
    records = read_metrics(workdir)
    assert seen == records
    for record in records:
        row = np.flatnonzero(result.history["step"] == record["step"])
        for name, value in record.items():
            assert result.history[name][row] == value
    assert {len(column) for column in result.history.values()} == {len(result.history["step"])}
    steps, losses = result.curve("val/loss")
    assert steps.tolist() == [2, 4, 6]
    assert losses[-1] == result.metrics["val/loss"]
    assert "step" not in result.metrics
    assert result.load(checkpoint=6).source == str(result.checkpoint)


def test_a_run_that_ended_early_stays_ended_until_it_may_go_further(
    stopped, configure, tmp_path, said
):
    workdir, first, _ = stopped
    before = (workdir / "metrics.jsonl").read_bytes()
    config = configure(stop={"metric": "val/loss", "patience": 2})
    again = train(config, workdir, command="train")
    assert (again.step, again.stopped) == (6, first.stopped)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert any("nothing to do" in line and "step 6 of 20" in line for line in said)
    assert f"finished at step 6 of 20, early: {first.stopped}" in said
    assert any(line.endswith("train --config.stop.patience=4") for line in said)


def test_a_killed_run_ends_early_bit_for_bit_as_an_uninterrupted_one(
    stopped, configure, tmp_path, monkeypatch
):
    workdir, first, _ = stopped
    config = configure(stop={"metric": "val/loss", "patience": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "w")
    assert list_steps(tmp_path / "w") == [4]
    # It ends between the last save and the evaluation that is due only at the end.
    with monkeypatch.context() as patch:
        patch.setattr(services.Services, "evaluate_at_end", lambda *_: {})
        train(config, tmp_path / "w")
    assert not any("test/loss" in r for r in read_metrics(tmp_path / "w"))
    result = train(config, tmp_path / "w")
    assert (result.step, result.stopped) == (6, first.stopped)
    assert_same(load_params(tmp_path / "w")[0], load_params(workdir)[0])
    straight, killed = (
        [r for r in read_metrics(folder) if "val/loss" in r or "test/loss" in r]
        for folder in (workdir, tmp_path / "w")
    )
    assert straight == killed


def test_a_caller_ends_a_run_by_its_answer(configure, tmp_path):
    answer = lambda r: "enough" if "val/loss" in r else None  # noqa: E731
    result = train(configure(), tmp_path / "w", on_record=answer)
    assert (result.step, result.stopped) == (2, "enough")
    assert result.metrics["test/count"] == 30
    assert list_steps(tmp_path / "w") == [2]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("val/acc", "stop.metric='val/acc': expected a metric of one of the evals: test/ece"),
        ("test/loss", "evals.test.every=0 evaluates at the end only"),
    ],
)
def test_a_metric_that_can_not_end_a_run_is_refused(configure, tmp_path, metric, message):
    with pytest.raises(UserError, match=message):
        train(configure(stop={"metric": metric, "patience": 2}), tmp_path / "w")
    assert not (tmp_path / "w").exists()
