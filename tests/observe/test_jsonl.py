# SPDX-License-Identifier: Apache-2.0
"""Lines are whole, whatever happens to the disk, and a damaged one costs no other."""

import json
import resource

import pytest

from vit_jax.observe.jsonl import LineWriter, drop_metrics_after, read_metrics, read_records
from vit_jax.observe.writer import MetricWriter
from vit_jax.utils.layout import METRICS


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
    assert "can't be written to (No space left on device): continues, and tries again" in said[0]
    assert "can be written again" in said[1]


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


STEPS = [2, 4, 6, 8]


def damage_second_line(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], change(lines[1]), *lines[2:]]))


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / METRICS
    path.write_text("".join(f'{{"step": {step}, "train/loss": 1.5}}\n' for step in STEPS))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda line: bytes([line[0] ^ 1]) + line[1:],
        lambda line: line.replace(b"loss", b"lo\xf3s"),
        lambda line: b"\0" * 4096 + line[9:],
        lambda line: line.replace(b"1.5", b"1.5\0"),
        lambda line: line[:9] + b"\r\n" + line[9:],
        lambda line: line[:9] + b"\n" + line[9:],
        lambda line: b"[1]\n",
        lambda line: b"null\n",
        lambda line: b'{"step": true, "train/loss": 1}\n',
        lambda line: b'{"stex": 4, "train/loss": 1}\n',
        lambda line: b'{"step": 4, "train/loss": [1]}\n',
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b'{"step": ' + b"9" * 10_000 + b"}\n",
        lambda line: b'{"step": ' + b"9" * 400 + b"}\n",
        lambda line: b'{"step": 4, "train/loss": -' + b"9" * 400 + b"}\n",
    ],
    ids=lambda change: None,
)
def test_a_damaged_line_is_named_and_costs_no_other(change, metrics, said):
    damage_second_line(metrics, change)
    assert [r["step"] for r in read_metrics(metrics.parent)] == [2, 6, 8]
    read_metrics(metrics.parent)
    (line,) = said  # once, although it is read twice
    assert line.startswith(f"{metrics}: ")
    assert "2 is damaged, and skipped" in line or "2, 3) are damaged, and skipped" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"\xef\xbb\xbf" + line,
        lambda line: b"\0" * 4096 + line,
        lambda line: line.replace(b"\n", b"\r\n"),
        lambda line: b"\n" + line,
        lambda line: b"\r\n" + line + b"\n",
    ],
    ids=["byte order mark", "zeros", "CRLF", "empty line", "empty lines"],
)
def test_what_an_editor_or_a_crash_adds_costs_no_line(change, metrics, said):
    damage_second_line(metrics, change)
    assert [r["step"] for r in read_metrics(metrics.parent)] == STEPS
    assert said == []


def test_a_run_that_resumes_keeps_the_lines_around_a_damaged_one(metrics, said):
    damage_second_line(metrics, lambda line: line[:-5] + b"\n")
    before = metrics.read_bytes().splitlines(keepends=True)
    with MetricWriter(metrics.parent, step=6, active=True) as writer:
        assert metrics.read_bytes() == b"".join(before[:3])
        writer.write(8, {"train/loss": 0.5})
    assert [r["step"] for r in read_metrics(metrics.parent)] == [2, 6, 8]
    assert "line 2 is damaged" in said[0]


def test_a_damaged_line_next_to_the_checkpoint_stays(metrics):
    damage_second_line(metrics, lambda line: b"{\n")
    drop_metrics_after(metrics.parent, 2)
    assert metrics.read_bytes().splitlines() == [b'{"step": 2, "train/loss": 1.5}', b"{"]


def test_metrics_that_can_not_be_shortened_do_not_end_a_run(metrics, monkeypatch, said):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    content = metrics.read_bytes()
    monkeypatch.setattr("os.ftruncate", refuse)
    with MetricWriter(metrics.parent, step=4, active=True):
        pass
    assert metrics.read_bytes() == content
    assert said == [
        f"{metrics} can't be shortened to step 4 (Permission denied): records of later steps are "
        "kept"
    ]


def test_metrics_behind_a_link_are_written_where_they_are(metrics):
    place = metrics.rename(metrics.with_name("elsewhere"))
    metrics.symlink_to(place)
    with MetricWriter(metrics.parent, step=6, active=True) as writer:
        writer.write(7, {"train/loss": 0.5})
    assert metrics.is_symlink()
    assert [record["step"] for record in read(place)] == [2, 4, 6, 7]


def test_a_whole_line_without_its_newline_stays(metrics):
    metrics.write_bytes(metrics.read_bytes().rstrip())
    LineWriter(metrics).write({"step": 10})
    assert [r["step"] for r in read_metrics(metrics.parent)] == [*STEPS, 10]


def test_what_is_no_file_of_lines_counts_as_empty_and_is_said(tmp_path, said):
    (tmp_path / METRICS).mkdir()
    assert read_metrics(tmp_path) == []
    assert said == [f"{tmp_path / METRICS} can't be read (Is a directory): it counts as empty"]
    assert read_metrics(tmp_path / "none") == []
    assert read_records(tmp_path / METRICS / "below") == []
    assert len(said) == 1
