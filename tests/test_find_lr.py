# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test."""

from pathlib import Path

import numpy as np
import pytest

from tests.html_pages import assert_stands_alone
from vit_jax.config.build import build_parts
from vit_jax.find_lr import describe, main, make_lr_page, parse_arguments
from vit_jax.observe.divergence import DivergedError
from vit_jax.training import lr_range_test
from vit_jax.training.lr_range_test import LrRangeTest, find_fastest, run_lr_range_test, smooth
from vit_jax.utils.errors import UserError

RATES = np.geomspace(1e-6, 1, 120)
# It falls around 1e-3, and rises from 1e-1 on.
LOSSES = 3 - 2 / (1 + (1e-3 / RATES) ** 2) + 1e2 * RATES**2

CONFIG = """
from tests.tiny import tiny_config
def get_config(data_dir):
    return tiny_config(data_dir, **CHANGES)
"""


def found(losses=LOSSES, *, lr=0.002, scale=1.0):
    return LrRangeTest(RATES, np.asarray(losses), "took all 120 steps", lr, scale)


def test_the_rate_at_which_the_loss_falls_fastest_is_suggested():
    assert find_fastest(RATES, LOSSES) == pytest.approx(1e-3, rel=0.15)
    result = found()
    assert 1e-3 < result.suggestion < result.lowest < 0.1
    assert (
        f"--config.optimizer.lr={result.suggestion:g} (the config has 0.002)" in describe(result)[2]
    )


def test_the_suggestion_is_in_the_unit_of_the_config():
    assert found(scale=4.0).suggestion == pytest.approx(found().fastest / 4, rel=0.05)
    assert "times 4 for this batch size" in describe(found(scale=4.0))[2]


@pytest.mark.parametrize("losses", [np.full(120, 2.0), 1 + RATES])
def test_nothing_is_suggested_where_the_loss_does_not_fall(losses):
    assert found(losses).suggestion is None
    assert "did not fall" in describe(found(losses))[1]
    make_lr_page(found(losses), title="test")


def test_the_moving_average_has_no_bias_to_zero():
    np.testing.assert_allclose(smooth([2.0, 2.0, 2.0]), 2.0)
    assert smooth([2.0, 1.0])[1] == pytest.approx((0.9 * 2 + 1) / 1.9)


def test_the_page_stands_alone():
    text = assert_stands_alone(make_lr_page(found(), title="Learning-rate range test: x.py")).text
    assert "moving average" in text
    assert "suggested: --config.optimizer.lr=" in text


def take_steps(config, workdir, *, on_record):
    """In place of training: the loss falls with the rate, and diverges at 1e-4."""
    assert Path(workdir).is_dir()
    parts = build_parts(config)
    assert (parts.evaluators, parts.settings.stop.metric) == ((), None)
    on_record({"step": 1, "perf/first_step_s": 1.0})
    for step in range(1, parts.total_steps + 1):
        rate = float(parts.optimizer.schedule(step - 1))
        if rate > 1.1e-4:
            raise DivergedError("the loss is nan", step=step)
        on_record({"step": step, "train/lr": rate, "train/loss": 2 - 1e4 * rate})
    raise AssertionError("the test goes on after its last step")


def test_the_command_takes_the_steps_of_a_run_and_keeps_nothing_of_it(
    data_dir, tmp_path, said, monkeypatch
):
    monkeypatch.setattr(lr_range_test, "train", take_steps)
    config = tmp_path / "config.py"
    changes = {"checkpoint__keep_best": "val/top1", "stop": {"metric": "val/loss", "patience": 1}}
    changes |= {"optimizer__schedules": (("head/.*", {"schedule": "constant"}),)}
    config.write_text(CONFIG.replace("CHANGES", repr(changes)))
    output = tmp_path / "lr"
    command = [f"--config={config}:{data_dir}", f"--output={output}", "--steps=12"]
    main([*command, "--max_lr=1e-3"])
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "rates.csv"]
    rows = (output / "rates.csv").read_text().splitlines()
    assert rows[0] == "lr,loss,smoothed_loss"
    rates = [float(row.split(",")[0]) for row in rows[1:]]
    np.testing.assert_allclose(rates, 1e-6 * 1000 ** (np.arange(9) / 12), rtol=1e-4)
    assert "stopped at step 9, learning rate 0.0001: the loss is nan" in said
    assert any(line.startswith("suggested: --config.optimizer.lr=") for line in said)
    assert said[-1] == f"wrote {output}/index.html, {output}/rates.csv"
    assert {path.name for path in tmp_path.iterdir()} == {"config.py", "lr"}
    with pytest.raises(UserError, match="exists"):
        main(command)
    main([*command[:1], f"--output={tmp_path / 'b'}", "--steps=12", "--max_lr=5e-5"])
    assert "took all 12 steps" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "steps=5: expected at least 10"),
        ({"min_lr": 0.0}, "min_lr=0.0 and max_lr=1.0: expected 0 < min_lr"),
        ({"min_lr": 2.0}, "expected 0 < min_lr < max_lr"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        run_lr_range_test({}, **options)
    with pytest.raises(UserError, match="--output is missing"):
        parse_arguments(["--config=x.py"])
