# SPDX-License-Identifier: Apache-2.0
"""What is said at the start of a run."""

import io
import json

import jax
import jax.numpy as jnp
import pytest
import rich.console

from vit_jax.observe import console, summary
from vit_jax.observe.summary import report_end, report_start
from vit_jax.parallel.mesh import make_mesh

BODY = {"body": {"kernel": jax.ShapeDtypeStruct((100, 30), jnp.float32)}}
HEAD = {"head": {"kernel": jax.ShapeDtypeStruct((30, 2), jnp.float32)}}


START = {
    "mesh": make_mesh(),
    "hosts": ("here",),
    "model": "vit, layers 2, width 30",
    "params": BODY | HEAD,
    "frozen": {},
    "input_bytes": {"train": 2_500_000, "val": 1_500_000_000},
}


@pytest.mark.parametrize(
    ("frozen", "want"), [(BODY, ["trained: 60 parameters, frozen: 3,000"]), ({}, [])]
)
def test_frozen_parameters_are_counted_where_there_are_some(frozen, want, said):
    report_start(**(START | {"frozen": frozen}))
    assert [line for line in said if "frozen" in line] == want
    assert said[-1] == "memory of this host for batches: train 2.4 MiB, val 1.4 GiB"


def test_a_model_is_a_line_and_its_tables_are_for_verbose(capsys, monkeypatch):
    groups = [("trained", "2", "60", "yes", "x 0.5 to 1"), ("frozen", "1", "3,000", "no", "")]
    words = ("body/kernel", "100x30", "weight decay", "x 0.5 to 1")
    shown = {}
    for verbosity in ("quiet", "normal", "verbose"):
        monkeypatch.setattr(console.settings, "verbosity", verbosity)
        report_start(**START, groups=groups, rates=["learning rate: 1"])
        shown[verbosity] = capsys.readouterr().out
    assert shown["quiet"] == ""
    devices, model, rate, _ = shown["normal"].splitlines()[1:]
    assert devices == f"devices: 8 x {jax.devices()[0].device_kind}; mesh: data=8, fsdp=1, tensor=1"
    assert model == "model: vit, layers 2, width 30, 3,060 parameters"
    assert rate == "learning rate: 1"
    assert all(word in shown["verbose"] for word in words)
    assert {*shown["normal"].splitlines()} <= {*shown["verbose"].splitlines()}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_table_is_wider_than_the_screen(width, monkeypatch):
    file = io.StringIO()
    screen = rich.console.Console(file=file, width=width)
    monkeypatch.setattr(summary, "console", screen)
    monkeypatch.setattr(summary, "log", lambda text: None)
    monkeypatch.setattr(console.settings, "verbosity", "verbose")
    long = {f"layer_{i}": {"[red]" + "x" * 90: jnp.zeros((1,))} for i in range(2)}
    hosts = ("here", "a-host-with-a-long-name.cluster.example")
    groups = [(f"schedule of {'x' * 90}", "2", "60", "yes", "x 0.5 to 1")]
    report_start(**(START | {"params": long, "hosts": hosts}), groups=groups)
    lines = file.getvalue().splitlines()
    assert lines
    assert max(map(len, lines)) <= width
    assert "[red]" in "".join(lines)  # text, and no markup


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


def test_the_end_names_the_report_and_the_command_to_predict_before_other_files(tmp_path, said):
    (tmp_path / "report.html").touch()
    (tmp_path / "evals").mkdir()
    report_end(
        workdir=tmp_path,
        step=4,
        total_steps=4,
        checkpoint=tmp_path / "checkpoints/4",
        longer="train longer",
        uses={"to predict": "predict IMAGES"},
        details="by image",
    )
    assert [line[:18].strip() for line in said[2:]] == [
        *("report", "to predict", "checkpoint", "logs", "by image", "to train longer")
    ]
    assert said[2] == f"  report          {tmp_path / 'report.html'}"
    assert said[3] == "  to predict      predict IMAGES"
    assert said[-1].startswith("  to train longer ")
