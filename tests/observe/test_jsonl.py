# SPDX-License-Identifier: Apache-2.0
"""Lines are whole, whatever happens to the disk."""

import json
import resource

import pytest

from vit_jax.observe.jsonl import LineWriter, read_metrics
from vit_jax.observe.writer import MetricWriter


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", ["", '{"a', "x" * 9000])
def test_a_torn_last_line_is_cut_off(torn, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    LineWriter(path).write({"a": 2})
    assert read(path) == [{"a": 1}, {"a": 2}]


def test_a_file_of_nothing_but_half_a_line_is_begun_anew(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a')
    LineWriter(path).write({"a": 2})
    assert read(path) == [{"a": 2}]


def test_a_full_disk_ends_nothing_and_loses_no_line(tmp_path, said):
    """The limit on the size of files stands for the disk."""
    path = tmp_path / "f.jsonl"
    writer = LineWriter(path)
    writer.write({"a": "x" * 50_000})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, old[1]))
    try:
        for i in (1, 2, 3):
            writer.write({"a": i})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [len(str(r["a"])) for r in read(path)] == [50_000]
    writer.write({"a": 4})
    assert [r["a"] for r in read(path)][1:] == [1, 2, 3, 4]
    assert len(said) == 2
    assert "can't be written to (No space left on device): goes on, and tries again" in said[0]
    assert "is written to again" in said[1]


def test_metrics_wait_while_nothing_can_be_written(tmp_path, monkeypatch, said):
    """Writers that raise ENOSPC stand for the disk."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with MetricWriter(tmp_path, step=0, active=True) as writer:
        writer.write(1, {"train/loss": 3.0})
        with monkeypatch.context() as patch:
            patch.setattr(LineWriter, "_flush", full)
            patch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
            writer.write(2, {"train/loss": 2.0})
            writer.write(3, {"train/loss": 1.0})
        assert len(said) == 2
        writer.write(4, {"train/loss": 0.5})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
