# SPDX-License-Identifier: Apache-2.0
"""The command that says how fast the input pipeline is, and where its time goes."""

import itertools
import json

import numpy as np
import pytest

from tests.clock import Clock
from vit_jax.benchmark import input as input_benchmark
from vit_jax.benchmark.__main__ import main
from vit_jax.benchmark.input import (
    STAGES,
    Speed,
    measure_speed,
    measure_stages,
    measure_wait,
    predict_wait,
)
from vit_jax.data.ops import transforms as image_ops
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.utils.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(input_benchmark, "time", clock)
    return clock


def batches(clock, seconds, cpu_seconds=0.0):
    """Batches of 8 that take a time to make, and the processor a part of it."""
    for _ in itertools.count():
        clock.sleep(seconds)
        clock.cpu += cpu_seconds
        yield {"image": np.zeros((8, 4, 4, 3), np.uint8)}


def test_speed_is_that_of_the_batches(clock):
    speed = measure_speed(batches(clock, 0.02, 0.005), 8, seconds=0.4)
    assert speed.images_per_sec == pytest.approx(400)
    assert speed.images_per_core == pytest.approx(1600)


@pytest.mark.parametrize(("step", "wait"), [(0.01, 0.75), (0.04, 0.0), (0.1, 0.0)])
def test_the_predicted_wait_is_what_the_step_does_not_hide(step, wait):
    assert predict_wait(Speed(200.0, 200.0), 8, step) == pytest.approx(wait)


def test_the_wait_seen_is_the_share_of_the_loop(clock):
    # Nothing loads ahead here: each batch takes 30 ms, each step 10 ms.
    assert measure_wait(batches(clock, 0.03), 0.01, seconds=0.5) == pytest.approx(0.75)


def test_a_slow_operation_shows_in_its_stage(data_dir, monkeypatch):
    spec = DatasetSpec("digits", "train", "decode|resize(8)|flip_lr", 8, data_dir, "data")
    shares = measure_stages(spec, seconds=0.1)
    assert set(shares) == set(STAGES)
    assert sum(shares.values()) == pytest.approx(1)
    clock, flip = Clock(), image_ops.FlipLr.draw
    monkeypatch.setattr(input_benchmark, "time", clock)
    monkeypatch.setattr(image_ops.FlipLr, "draw", lambda *a: clock.sleep(0.02) or flip(*a))
    monkeypatch.setattr("vit_jax.data.ops.fused.extension", None)
    assert measure_stages(spec, seconds=0.3) == dict.fromkeys(STAGES, 0.0) | {"augment": 1.0}


def test_the_command_prints_and_writes_what_it_measured(data_dir, said, tmp_path):
    path = tmp_path / "new" / "input.json"
    main(
        f"input --source=digits --data_dir={data_dir} --preprocess=decode|resize(8) "
        f"--batch_size=16 --num_threads=1 --seconds=0.3 --step_ms=5 --json={path}".split()
    )
    results = json.loads(path.read_text())
    assert "digits: 1,437 images, batches of 16 at 8x8, 1 threads" in said[0]
    shown, unit = said[1].replace(",", "").split()[:2]
    assert unit == "images/s"
    assert abs(int(shown) - results["images_per_sec"]) < 0.6  # both are rounded
    assert results["images_per_sec"] > 0
    assert set(results["stages"]) == set(STAGES)
    assert "with steps of 5 ms: data-wait" in said[3]
    assert results["data_wait"].keys() == {"step_ms", "predicted", "seen"}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--seconds=0", "--seconds=0.0: expected more than 0"),
        ("--batch_size=-1", "--batch_size=-1: expected more than 0"),
        ("--preprocess=resize(8)", "expected 'decode' first"),
    ],
)
def test_bad_input_is_one_line(flag, words, data_dir):
    with pytest.raises(UserError) as error:
        main(["input", "--source=digits", f"--data_dir={data_dir}", flag])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_results_that_can_not_be_written_are_one_line(data_dir, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--json="):
        main(
            f"input --source=digits --data_dir={data_dir} --preprocess=decode --seconds=0.1 "
            f"--json={tmp_path}/file/a.json".split()
        )
