# SPDX-License-Identifier: Apache-2.0
"""The commands that measure checkpoints, the loop and the start of a run."""

import json
import shlex
import sys
import time

import pytest

from tests.benchmark.test_step import CONFIG
from vit_jax.benchmark import checkpoint, loop, startup
from vit_jax.benchmark.__main__ import main
from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.data.sources import blank
from vit_jax.utils.errors import UserError


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return f"--config={file}"


def test_a_checkpoint_is_timed_beside_a_file_of_its_size(config, tmp_path, said):
    out, folder = tmp_path / "out.json", tmp_path / "disk"
    folder.mkdir()
    size = ["--num_classes=3", "--image_size=8"]
    main(["checkpoint", config, *size, f"--folder={folder}", "--saves=2", f"--json={out}"])
    results = json.loads(out.read_text())
    # Parameters and step; SGD without momentum has a count.
    params = 4 * (4 * 4 * 3 * 8 + 8) + 4 * 5 * 8
    assert params < results["bytes"] < 8 * params
    assert 0 < results["blocked_s"] <= results["save_s"]
    assert results["restore_s"] > 0
    assert len(results["memory_bytes"]) == 2
    assert list(folder.iterdir()) == []
    assert any(line.startswith("restore ") for line in said)


def test_the_loop_is_compared_with_its_bare_steps(config, tmp_path, capsys):
    out = tmp_path / "out.json"
    size = ["--num_classes=3", "--image_size=8"]
    # A warm-up of more than there will be steps.
    size += ["--config.total_steps=100_000", "--config.optimizer.warmup_steps=50_000"]
    main(["loop", config, *size, "--rounds=1", "--seconds=0.05", f"--json={out}"])
    results = json.loads(out.read_text())
    for times, overhead in (
        ("looped_step_ms", "overhead"),
        ("looped_with_data_step_ms", "overhead_with_data"),
    ):
        ratio = results[times][0] / results["step_ms"][0]
        assert results[overhead] == pytest.approx(ratio - 1, rel=0.05, abs=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # the runs themselves are silent
    assert lines[-1] == f"wrote {out}"


def test_what_is_read_in_the_loop_is_told_apart(config, monkeypatch):
    config = load_config(config.removeprefix("--config="), {}).to_dict()
    config = reduce_for_planning(config, num_classes=3, image_size=8)
    read = blank._Black.read

    def read_slowly(self, row):
        time.sleep(0.05)
        return read(self, row)

    monkeypatch.setattr(blank._Black, "read", read_slowly)
    ready = loop.time_loop(config, steps=8, experiment=loop._Ready)
    assert loop.time_loop(config, steps=8) > 2 * ready


def stand_in(folder, text):
    """A Python that runs something else."""
    (folder / "program.py").write_text(f"import time\n{text}\n")
    file = folder / "python"
    # A first line with the path of the interpreter would break at a space in it.
    command = shlex.join([sys.executable, str(folder / "program.py")])
    file.write_text(f"#!/bin/sh\nexec {command}\n")
    file.chmod(0o755)
    return str(file)


def test_the_start_ends_with_the_first_step(tmp_path, monkeypatch):
    text = "time.sleep(0.2)\nprint('first step after 0.1 s', flush=True)\ntime.sleep(600)"
    monkeypatch.setattr(startup.sys, "executable", stand_in(tmp_path, text))
    start = time.perf_counter()
    assert 0.2 < startup.time_first_step("--config=x") <= time.perf_counter() - start < 600


def test_a_run_that_ends_before_its_first_step_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(startup.sys, "executable", stand_in(tmp_path, "print('no such file')"))
    with pytest.raises(UserError, match="before its first step: no such file"):
        startup.time_first_step("--config=x")


@pytest.mark.parametrize(
    ("part", "argument", "message"),
    [
        (checkpoint, "--saves=0", "--saves=0: expected at least 1"),
        (checkpoint, "--folder=/nowhere", "--folder=/nowhere: expected a folder"),
        (loop, "--seconds=0", "--seconds=0.0: expected more than 0"),
        (startup, "--rounds=0", "--rounds=0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_refused(part, argument, message, config):
    with pytest.raises(UserError, match=message):
        main([part.__name__.rpartition(".")[2], config, argument])
