# SPDX-License-Identifier: Apache-2.0
"""What counts as diverged, what is left of it, and where a run goes on."""

import json

import numpy as np
import pytest

from vit_jax.observe.divergence import (
    append_rollback,
    find_divergence,
    read_rollbacks,
    skip_past,
    write_dump,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss": 1.0, "grad_norm": 2.0}, None),
        ({"loss": 9.5}, None),
        ({"loss": NAN}, "the loss of step 3 is nan"),
        ({"loss": 1.0, "param_norm": float("inf")}, "the param_norm of step 3 is inf"),
        ({"loss": 12.5}, "the loss of step 3 is 12.5, more than max_loss=10"),
    ],
)
def test_numbers_that_are_none_and_losses_too_high_diverge(metrics, reason):
    found = find_divergence(3, metrics, 10.0, [])
    assert (found and found.reason) == reason


def test_the_batch_and_what_is_known_of_it_are_left(tmp_path, said):
    found = find_divergence(3, {"loss": NAN}, None, [1.5, NAN])
    assert found is not None
    batch = {"image": np.ones((2, 4, 4, 3), np.uint8), "label": np.arange(2)}
    write_dump(tmp_path, found, batch, ["a.png", "b.png"], ["embedding", "head"])
    with np.load(tmp_path / "divergence" / "3.npz") as stored:
        np.testing.assert_array_equal(stored["image"], batch["image"])
        np.testing.assert_array_equal(stored["label"], batch["label"])
    content = json.loads((tmp_path / "divergence" / "3.json").read_text())
    assert content["records"] == ["a.png", "b.png"]
    assert content["grad_norms"] == {"embedding": "1.5", "head": "nan"}
    assert content["metrics"] == {"loss": "nan"}
    assert "the loss of step 3 is nan: its batch is in" in said[0]


def test_a_run_goes_on_past_what_it_was_rolled_back_from(tmp_path):
    assert skip_past(4, read_rollbacks(tmp_path)) == 4
    append_rollback(tmp_path, to=4, past=7, reason="x")
    append_rollback(tmp_path, to=4, past=9, reason="y")
    found = read_rollbacks(tmp_path)
    assert [skip_past(step, found) for step in (3, 4, 6, 8, 9, 12)] == [3, 9, 9, 9, 9, 12]
