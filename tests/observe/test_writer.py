# SPDX-License-Identifier: Apache-2.0
"""Metric files: what is written is there at once, once, and survives a killed run."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.writer import MetricWriter
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import METRICS, TENSORBOARD


def events(workdir):
    """All TensorBoard events of a workdir: length, checksum, message, checksum, and again."""
    found = []
    for path in sorted((workdir / TENSORBOARD).iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(workdir):
    """(tag, step, value) of each scalar."""
    return [(v.tag, e.step, v.simple_value) for e in events(workdir) for v in e.summary.value]


def write(workdir, records, *, step=0):
    with MetricWriter(workdir, step=step, active=True) as writer:
        for record in records:
            writer.write(record["step"], {k: v for k, v in record.items() if k != "step"})


def test_records_are_read_as_they_were_written(tmp_path):
    records = [
        {"step": 2, "train/loss": 1.5, "train/lr": 1e-30},
        {"step": 2, "val/top1": 1 / 3, "val/count": 50},
    ]
    write(tmp_path, records)
    assert read_metrics(tmp_path) == records
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_a_record_is_in_the_file_at_once(tmp_path):
    with MetricWriter(tmp_path, step=0, active=True) as writer:
        writer.write(1, {"train/loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_tensorboard_gets_the_same_values_by_tag_and_step(tmp_path):
    write(
        tmp_path,
        [{"step": 2, "train/loss": 1.5, "perf/step_ms": 8.0}, {"step": 4, "train/loss": 0.5}],
    )
    assert scalars(tmp_path) == [
        ("train/loss", 2, 1.5),
        ("perf/step_ms", 2, 8.0),
        ("train/loss", 4, 0.5),
    ]
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_a_resumed_run_drops_what_came_after_its_start(tmp_path):
    write(tmp_path, [{"step": s, "train/loss": float(s)} for s in (2, 4, 6)])
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 8, "train/lo')
    write(tmp_path, [{"step": 6, "train/loss": 0.5}], step=4)
    assert read_metrics(tmp_path) == [
        {"step": 2, "train/loss": 2.0},
        {"step": 4, "train/loss": 4.0},
        {"step": 6, "train/loss": 0.5},
    ]
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).open()] == [2, 4, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS, TENSORBOARD]


@pytest.mark.parametrize("end", ['{"step": 8, "train/lo', "{", '{"step": 8}\n{"ste'])
def test_half_a_line_is_not_read(end, tmp_path):
    write(tmp_path, [{"step": 2, "train/loss": 1.0}])
    with open(tmp_path / METRICS, "a") as file:
        file.write(end)
    whole = [{"step": 8}] if "\n" in end else []
    assert read_metrics(tmp_path) == [{"step": 2, "train/loss": 1.0}, *whole]


def test_tensorboard_is_told_which_steps_come_again(tmp_path):
    write(tmp_path, [{"step": 2, "train/loss": 1.0}])
    assert not any(e.HasField("session_log") for e in events(tmp_path))
    write(tmp_path, [{"step": 6, "train/loss": 0.5}], step=4)
    restarts = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in restarts] == [(5, SessionLog.START)]


def test_runs_that_start_in_the_same_second_do_not_overwrite_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 1_700_000_000.0)
    write(tmp_path, [{"step": 2, "train/loss": 1.0}])
    write(tmp_path, [{"step": 4, "train/loss": 0.5}], step=2)
    assert sorted(scalars(tmp_path)) == [("train/loss", 2, 1.0), ("train/loss", 4, 0.5)]


def test_a_writer_that_is_not_active_leaves_no_trace(tmp_path):
    workdir = tmp_path / "none"
    with MetricWriter(workdir, step=3, active=False) as writer:
        writer.write(4, {"train/loss": 1.0})
    assert not workdir.exists()
    assert read_metrics(workdir) == []


def test_a_picture_histograms_and_hyperparameters_are_for_tensorboard(tmp_path):
    images = np.arange(3 * 2 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 3)
    with MetricWriter(tmp_path, step=0, active=True) as writer:
        writer.write_config({"optimizer": {"lr": 0.5, "name": "adamw"}}, ["val/top1"])
        writer.write_images(1, "train/images", images)
        writer.write_histograms(4, {"params/w": (np.array([1, 3]), np.array([-1.0, 0.0, 2.0]))})
    found = {value.tag: (e.step, value) for e in events(tmp_path) for value in e.summary.value}
    step, value = found["train/images"]
    assert (step, value.image.height, value.image.width) == (1, 4, 8)
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as picture:
        pixels = np.asarray(picture)
    np.testing.assert_array_equal(pixels[:2, 4:], images[1])
    np.testing.assert_array_equal(pixels[2:, :4], images[2])
    assert not pixels[2:, 4:].any()
    step, value = found["params/w"]
    assert (step, value.histo.num, list(value.histo.bucket)) == (4, 4, [1, 3])
    assert (value.histo.min, list(value.histo.bucket_limit)) == (-1, [0, 2])
    start = found["_hparams_/session_start_info"][1].metadata.plugin_data.content
    assert b"optimizer.lr" in start
    assert b"adamw" in start
    assert b"val/top1" in found["_hparams_/experiment"][1].metadata.plugin_data.content
    # They are no metrics.
    assert read_metrics(tmp_path) == []


def test_a_caller_sees_each_record_and_can_end_the_run(tmp_path):
    seen, answers = [], [None, False, "enough"]

    def answer(record):
        seen.append(record)
        return answers[len(seen) - 1]

    with MetricWriter(tmp_path, step=0, active=True, on_record=answer) as writer:
        reasons = []
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": 1.0})
            reasons.append(writer.stop_reason)
    assert seen == read_metrics(tmp_path)
    assert reasons == [None, None, "enough"]
    with MetricWriter(tmp_path, step=0, active=True, on_record=lambda r: True) as writer:
        writer.write(4, {"train/loss": 1.0})
        assert writer.stop_reason == "on_record returned True"
    with (
        MetricWriter(tmp_path, step=4, active=True, on_record=lambda r: r) as writer,
        pytest.raises(UserError, match="on_record returns dict: expected None or False"),
    ):
        writer.write(5, {"train/loss": 1.0})
