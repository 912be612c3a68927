# SPDX-License-Identifier: Apache-2.0
"""What is said at the start of a run."""

import json

import jax
import jax.numpy as jnp
import pytest

from vit_jax.observe import console
from vit_jax.observe.summary import report_end, report_start
from vit_jax.parallel.mesh import make_mesh

BODY = {"body": {"kernel": jax.ShapeDtypeStruct((100, 30), jnp.float32)}}
HEAD = {"head": {"kernel": jax.ShapeDtypeStruct((30, 2), jnp.float32)}}


@pytest.mark.parametrize(
    ("frozen", "want"), [(BODY, ["trained: 60 parameters, frozen: 3,000"]), ({}, [])]
)
def test_frozen_parameters_are_counted_where_there_are_some(frozen, want, monkeypatch):
    said = []
    monkeypatch.setattr(console.console, "print", lambda *text, **_: said.append(str(text[0])))
    report_start(
        mesh=make_mesh(),
        hosts=("here",),
        params=BODY | HEAD,
        frozen=frozen,
        input_bytes={"train": 2_500_000},
    )
    assert [line for line in said if "frozen" in line] == want
    assert said[-1] == "memory of this host for batches: train 0.003 GB"


def test_groups_of_parameters_and_effective_rates_are_shown(capsys):
    groups = [("trained", "2", "60", "yes", "x 0.5 to 1"), ("frozen", "1", "3,000", "no", "")]
    report_start(
        mesh=make_mesh(),
        hosts=("here",),
        params=BODY | HEAD,
        frozen={},
        input_bytes={},
        groups=groups,
        rates=["learning rate: 1"],
    )
    shown = capsys.readouterr().out
    for word in ("weight decay", "x 0.5 to 1", "3,000", "learning rate: 1"):
        assert word in shown


def test_accuracies_of_splits_are_shown_and_not_that_of_training(tmp_path, said):
    records = [
        {"step": 4, "time": 1.0, "train/loss": 1.0, "train/top1": 0.5},
        {"step": 4, "time": 1.0, "val/top1": 0.75, "val/count": 8},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    report_end(
        workdir=tmp_path, step=4, total_steps=4, checkpoint=tmp_path / "checkpoints/4", longer=None
    )
    assert [line for line in said if "accuracy" in line] == [
        "  val accuracy    75.00 %  (6 of 8 images)"
    ]
