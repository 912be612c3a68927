# SPDX-License-Identifier: Apache-2.0
"""Trackers: what they get, what becomes of one that fails, and the real ones on local backends."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from vit_jax.observe import trackers as lib
from vit_jax.observe.trackers import (
    Background,
    Trackers,
    Tracking,
    check_trackers,
    make_hyperparameters,
    tile,
)
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PICTURE = np.zeros((4, 4, 3), np.uint8)
HISTOGRAMS = {"params/w": (np.array([1, 2]), np.array([0.0, 1.0, 2.0]))}


class Recorder:
    """Keeps what it gets."""

    def __init__(self):
        self.calls, self.gate, self.thread = [], threading.Event(), None

    def write(self, step, metrics):
        self.thread = threading.current_thread()
        self.calls.append((step, dict(metrics)))

    def close(self, status):
        self.calls.append(status)


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_tracker_gets_all_records_in_its_own_thread_and_how_it_ended(
    error, status, tmp_path, monkeypatch
):
    recorder, given = Recorder(), []

    def make(tracking, workdir, config):
        given.append((tracking, workdir, config))
        return recorder

    monkeypatch.setitem(lib.TRACKERS, "wandb", make)
    tracking = Tracking(trackers=("wandb",))
    ending = pytest.raises(error) if error else contextlib.nullcontext()
    with ending, Trackers(tracking, tmp_path, {"data": {"name": "x"}}, active=True) as trackers:
        trackers.write(1, {"a": 0.5})
        trackers.write(2, {"a": 0.25})
        if error:
            raise error
    assert given == [(tracking, tmp_path, {"data.name": "x"})]
    assert recorder.calls == [(1, {"a": 0.5}), (2, {"a": 0.25}), status]
    assert recorder.thread not in (None, threading.main_thread())


def test_another_process_than_the_first_has_none(tmp_path, monkeypatch):
    monkeypatch.setitem(lib.TRACKERS, "wandb", lambda *_: pytest.fail("made"))
    with Trackers(Tracking(trackers="wandb"), tmp_path, {}, active=False) as trackers:
        trackers.write(1, {"a": 0.5})


def test_one_that_can_not_begin_is_said_once(said):
    def make():
        raise SystemExit("no\nserver")

    tracker = Background("far", make)
    tracker._thread.join(600)
    for step in range(3):
        tracker.call(lambda t, step=step: t.write(step, {}))
    tracker.close("FINISHED")
    assert said == ["tracker far failed (SystemExit: no): continues without it"]


def test_one_that_hangs_holds_nothing_up(said, monkeypatch):
    monkeypatch.setattr(lib, "_END_S", 0.1)
    monkeypatch.setattr(lib, "_MAX_WAITING", 5)
    recorder = Recorder()
    tracker = Background("slow", lambda: recorder)
    for _ in range(20):
        tracker.call(lambda t: t.gate.wait(60))
    tracker.close("FINISHED")
    assert said == ["tracker slow falls behind: 5 records wait: continues without it"]
    recorder.gate.set()


def test_the_end_waits_for_a_slow_one_only_so_long(said, monkeypatch):
    monkeypatch.setattr(lib, "_END_S", 0.1)
    recorder = Recorder()
    tracker = Background("slow", lambda: recorder)
    tracker.call(lambda t: t.gate.wait(60))
    tracker.close("FINISHED")
    assert said == ["tracker slow did not finish within 0 s: continues without it"]
    recorder.gate.set()


def test_a_config_is_flat_and_has_no_empty_keys():
    config = {"a": {"b": 1, "c": None, "d": {"e": ("x", 2)}}, "f": True}
    assert make_hyperparameters(config) == {"a.b": 1, "a.d.e": "('x', 2)", "f": True}


@pytest.mark.parametrize(("count", "size"), [(1, (2, 3)), (4, (4, 6)), (5, (4, 9))])
def test_images_are_laid_side_by_side(count, size):
    images = np.arange(count * 18, dtype=np.uint8).reshape(count, 2, 3, 3)
    picture = tile(images)
    assert picture.shape == (*size, 3)
    np.testing.assert_array_equal(picture[:2, :3], images[0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"trackers": "wandbb"}, "tracking.trackers='wandbb' is unknown; did you mean 'wandb'?"),
        ({"images": -1}, "tracking.images=-1: expected at least 0"),
        ({"histograms_every": -1}, "tracking.histograms_every=-1: expected at least 0"),
    ],
)
def test_wrong_values_are_refused(args, message):
    with pytest.raises(UserError) as error:
        Tracking(**args)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr(lib.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        check_trackers(Tracking(trackers=(name,)))
    assert f"{name!r} is not installed: pip install 'vit_jax[{name}]'" in str(error.value)
    check_trackers(Tracking())


def test_a_key_that_would_be_asked_for_is_missed_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(lib.importlib.util, "find_spec", lambda _: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracking = Tracking(trackers="wandb")
    with pytest.raises(UserError, match="'wandb' has no key"):
        check_trackers(tracking)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    check_trackers(tracking)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    with pytest.raises(UserError, match="'wandb' has no key"):
        check_trackers(tracking)
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    check_trackers(tracking)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(tracking)


def track(name, workdir, *, step=0):
    """A short run of a real tracker."""
    config = {"optimizer": {"lr": 0.5}, "note": "x" * 600}
    with Trackers(Tracking(trackers=name), workdir, config, active=True) as trackers:
        trackers.write(step + 1, {"train/loss": 2.0, "train/lr": 0.5})
        trackers.write(step + 2, {"val/top1": 0.75})
        trackers.write_images(step + 1, "train/images", PICTURE)
        trackers.write_histograms(step + 2, HISTOGRAMS)


def require(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make test-all installs it")


@pytest.mark.slow
def test_mlflow_has_the_run_and_goes_on_in_it(tmp_path, monkeypatch, said):
    require("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(lib, "_END_S", 300)  # it makes a database first
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    workdir = tmp_path / "digits"
    workdir.mkdir()
    track("mlflow", workdir)
    track("mlflow", workdir, step=2)
    assert said == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("vit_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params == {"optimizer.lr": "0.5", "note": "x" * 500}
    history = client.get_metric_history(run.info.run_id, "val/top1")
    assert [(m.step, m.value) for m in history] == [(2, 0.75), (4, 0.75)]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "train")} == {
        "train/images_1.png",
        "train/images_3.png",
    }


@pytest.mark.slow
def test_wandb_writes_its_files_offline_and_keeps_keys_out(tmp_path):
    require("wandb")
    key = "k" * 40
    script = f"""
from pathlib import Path
from tests.observe.test_trackers import track
track("wandb", Path({str(tmp_path)!r}))
"""
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_API_KEY": key, "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "continues without it" not in done.stdout
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"val/top1", b"params/w", b"optimizer", b"vit_jax"):
        assert word in content
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/train/images_*.png"))
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] in file.name
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes()
