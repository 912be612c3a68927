# SPDX-License-Identifier: Apache-2.0
"""Runs as a whole: train, stop, go on, be killed, change meshes, fine-tune."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.html_pages import assert_stands_alone
from tests.observe.test_writer import events
from tests.tiny import tiny_config
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.observe import trackers
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.progress import Monitor
from vit_jax.pages import run_page
from vit_jax.training import services
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import _list_sizes, suggest_uses, train
from vit_jax.training.services import is_due
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import RUN_AGAIN
from vit_jax.utils.tree import flatten

ROOT = Path(__file__).parents[2]


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The workdir of an uninterrupted run of 8 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_config(data_dir), str(workdir), command="train")
    return workdir


def test_due_counts_steps_and_always_takes_the_last():
    assert [s for s in range(1, 8) if is_due(s, 3, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if is_due(s, 0, 7)] == [7]


def test_a_run_leaves_config_metrics_and_checkpoint(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "config.json",
        "evals",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "tensorboard",
    ]
    assert {p.name for p in (finished / "evals").iterdir()} == {
        "val_8.json",
        "val_8_confusion.csv",
    }
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"4", "8"}
    config = json.loads((finished / "config.json").read_text())
    assert config["data"]["batch_size"] == 16
    assert config["model"]["classifier"] == "token"  # a default, written down
    records = read_metrics(finished)
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 4, 6, 8]
    assert [r["step"] for r in records if "val/top1" in r] == [4, 8]
    assert {r["val/count"] for r in records if "val/count" in r} == {50}
    names = {"train/loss", "train/lr", "train/grad_norm"}
    assert all(names <= r.keys() for r in records if "train/loss" in r)
    # The first step has no speed, since most of its time is compilation.
    names = {"perf/images_per_sec", "perf/data_wait"}
    assert [r["step"] for r in records if names <= r.keys()] == [2, 4, 6, 8]
    assert [r["step"] for r in records if "perf/first_step_s" in r] == [1]
    assert list((finished / "tensorboard").glob("events*"))


def test_a_run_leaves_a_page_of_how_it_ended(finished):
    text = assert_stands_alone((finished / "report.html").read_text()).text
    assert "Step 8 of 8; ended: finished" in text
    assert "Confusion: val, step 8" in text
    assert "embedding/kernel" in text
    run = json.loads((finished / "run.json").read_text())
    assert run["command"] == "train"
    assert "config" not in run


def test_a_page_that_fails_does_not_end_a_run(data_dir, tmp_path, monkeypatch, said):
    pages = []

    def fail(workdir, **_):
        pages.append([r["step"] for r in read_metrics(workdir) if "val/top1" in r])
        raise RuntimeError("no page")

    monkeypatch.setattr(run_page, "make_report", fail)
    train(tiny_config(data_dir), str(tmp_path / "run"))
    # At each evaluation, with its results, and at the end.
    assert pages == [[4], [4, 8], [4, 8]]
    assert sum("no page" in line for line in said) == 3
    assert list_steps(tmp_path / "run") == [4, 8]


class Flaky:
    """A tracker that takes a picture and no record."""

    def __init__(self, tracking, workdir, config):
        seen.append(("start", tracking.project, config["optimizer.lr"]))

    def write(self, step, metrics):
        seen.append((step, sorted(metrics)))
        raise OSError("no connection\nat all")

    def write_images(self, step, name, picture):
        seen.append((step, name, picture.shape))


seen: list = []


def test_a_tracker_that_fails_is_dropped_and_tensorboard_gets_pictures(
    data_dir, tmp_path, monkeypatch, said
):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Flaky)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: True)
    tracking = {"trackers": "mlflow", "project": "p", "images": 4, "histograms_every": 4}
    train(tiny_config(data_dir, tracking=tracking), str(tmp_path / "run"))
    assert seen == [
        ("start", "p", 1e-2),
        (1, "train/images", (16, 16, 3)),
        (1, ["perf/first_step_s"]),
    ]
    failed = [line for line in said if line.startswith("tracker ")]
    assert failed == ["tracker mlflow failed (OSError: no connection): continues without it"]
    assert list_steps(tmp_path / "run") == [4, 8]
    found = [(v.tag, e.step, v) for e in events(tmp_path / "run") for v in e.summary.value]
    (picture,) = [v.image for tag, step, v in found if (tag, step) == ("train/images", 1)]
    assert (picture.height, picture.width) == (16, 16)  # four digits of 8x8
    steps = [(step, v.histo.num) for tag, step, v in found if tag == "params/head/kernel"]
    assert steps == [(4, 160), (8, 160)]
    assert "_hparams_/experiment" in {tag for tag, *_ in found}


def test_a_second_run_does_nothing_and_says_so(finished, data_dir, said):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != "config.json"}
    train(tiny_config(data_dir), str(finished), command="train")
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != "config.json"}
    assert before == after
    assert any("nothing to do" in line and "step 8 of 8" in line for line in said)
    assert any("val accuracy" in line and "of 50 images" in line for line in said)


def test_a_shorter_run_than_was_trained_is_one_line_and_changes_nothing(finished, data_dir, said):
    before = {path: path.read_bytes() for path in finished.glob("*.json*")}
    config = tiny_config(data_dir, total_steps=5)
    train(config, str(finished), command="train")
    assert said[-2:] == [
        "total_steps: 8 before, 5 now",
        f"nothing is trained: {finished} is at step 8, past the 5 steps of the config; expected a "
        "larger total_steps to train longer",
    ]
    assert {path: path.read_bytes() for path in finished.glob("*.json*")} == before


def test_what_a_workdir_has_lost_is_no_other_experiment(finished, data_dir, tmp_path, said):
    workdir = Path(shutil.copytree(finished, tmp_path / "w"))
    (workdir / "config.json").write_text("")
    with pytest.raises(UserError, match=r"optimizer\.sam is None there and \{'rho': 0\.1"):
        train(tiny_config(data_dir, optimizer__sam={"rho": 0.1}), workdir)
    assert any("checkpoints/8/run.json in its place" in line for line in said)
    config = json.loads((finished / "config.json").read_text())
    del config["optimizer"]["sam"], config["model"]["qk_norm"]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"qk_norm is not set there and True here"):
        train(tiny_config(data_dir, model__qk_norm=True), workdir)
    train(tiny_config(data_dir), workdir)
    assert any("started without: model.qk_norm=False, optimizer.sam=None" in line for line in said)
    (workdir / "checkpoints").rename(tmp_path / "away")
    metrics = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"step 8 was saved, and there is no checkpoint"):
        train(tiny_config(data_dir), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_a_run_that_stops_between_two_records_logs_the_same_means(data_dir, tmp_path, monkeypatch):
    options = {"log_every": 3, "total_steps": 9, "evals": {}}
    train(tiny_config(data_dir, **options), str(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(data_dir, **options), str(tmp_path / "w"))
    train(tiny_config(data_dir, **options), str(tmp_path / "w"))
    names = ("step", "train/loss", "train/top1", "train/lr", "train/grad_norm")
    logged = [
        [tuple(r[k] for k in names) for r in read_metrics(tmp_path / w) if "train/loss" in r]
        for w in ("straight", "w")
    ]
    assert logged[0] == logged[1]
    assert [record[0] for record in logged[0]] == [1, 3, 6, 9]


def stop_at(last):
    """A `Monitor.step` that is interrupted."""

    def stop(self, step, metrics, *, log):
        if step == last:
            raise KeyboardInterrupt
        original(self, step, metrics, log=log)

    original = Monitor.step
    return stop


def test_a_stopped_run_ends_as_an_uninterrupted_one(finished, data_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(data_dir), str(tmp_path / "w"), command="train")
    train(tiny_config(data_dir), str(tmp_path / "w"), command="train")
    assert_same(load_params(tmp_path / "w")[0], load_params(finished)[0])
    records = read_metrics(tmp_path / "w")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 4, 6, 8]


KILLED = {"total_steps": 40, "checkpoint__every": 5, "evals__val__every": 10, "ema_decay": 0.9}
CONFIG_FILE = f"""
from tests.tiny import tiny_config
def get_config(data_dir):
    return tiny_config(data_dir, **{KILLED})
"""


def start(tmp_path, workdir, data_dir):
    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE)
    command = [sys.executable, "-m", "vit_jax.main", f"--config={config}:{data_dir}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(data_dir, tmp_path, said):
    config, workdir = tiny_config(data_dir, **KILLED), tmp_path / "killed"
    train(config, str(tmp_path / "straight"))
    run, metrics = start(tmp_path, workdir, data_dir), workdir / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.3))
    run.send_signal(signal.SIGKILL)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == -signal.SIGKILL, output
    said.clear()
    train(config, str(workdir))
    assert "finished at step 40 of 40" in said
    assert_same(load_params(workdir)[0], load_params(tmp_path / "straight")[0])
    steps = [r["step"] for r in read_metrics(workdir) if "train/loss" in r]
    assert steps == [1, *range(2, 41, 2)]


@pytest.mark.parametrize(
    ("mesh", "devices"), [({"fsdp": 4, "tensor": 2}, 8), ({"data": 2}, 2), ({}, 1)]
)
def test_a_checkpoint_restores_on_another_mesh(mesh, devices, finished, data_dir):
    config = tiny_config(data_dir, mesh=mesh)
    experiment = Experiment.from_config(config, devices=jax.devices()[:devices])
    with CheckpointManager(finished, experiment.settings.checkpoint, {}) as checkpoints:
        state = checkpoints.restore(experiment.abstract_state)
    assert_same(state.params, load_params(finished)[0])
    assert int(state.step) == 8
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(experiment.abstract_state), strict=True
    ):
        assert leaf.sharding == wanted.sharding


def test_a_longer_run_goes_on_from_where_it_was(data_dir, tmp_path, said):
    for steps in (4, 8):
        config = tiny_config(data_dir, total_steps=steps)
        train(config, str(tmp_path / "w"), command="train")
    assert any(line.endswith("checkpoints/4") and "resuming from" in line for line in said)
    assert any(line.startswith("total_steps: 4 before, 8 now; the learning") for line in said)
    records = read_metrics(tmp_path / "w")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 4, 6, 8]


def test_newest_and_best_checkpoints_are_kept(data_dir, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.4])
    monkeypatch.setattr(services, "evaluate", lambda *_, details: {"val/top1": next(scores)})
    options = {"checkpoint__keep": 2, "checkpoint__keep_best": "val/top1", "checkpoint__every": 2}
    for steps in (6, 10):  # the second run must know of the first one's best
        config = tiny_config(data_dir, total_steps=steps, evals__val__every=2, **options)
        train(config, str(tmp_path / "w"), command="train")
    kept = {int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir()}
    assert kept == {4, 8, 10}


def test_average_is_evaluated_under_a_name_of_its_own(data_dir, tmp_path):
    train(tiny_config(data_dir, ema_decay=0.9), str(tmp_path / "w"), command="train")
    last = read_metrics(tmp_path / "w")[-1]
    assert {"val/top1", "val_ema/top1", "val_ema/loss"} <= last.keys()
    assert last["val/loss"] != last["val_ema/loss"]


def test_loss_that_is_no_number_stops_the_run(data_dir, tmp_path):
    config = tiny_config(data_dir, optimizer__lr=1e30, optimizer__warmup_steps=0)
    with pytest.raises(DivergedError, match=r"of step [12] is"):
        train(config, str(tmp_path / "w"), command="train")
    assert not list((tmp_path / "w" / "checkpoints").glob("8"))


def test_profile_is_written_where_it_says(data_dir, tmp_path, said):
    config = tiny_config(data_dir, profile={"start": 2, "steps": 2})
    train(config, str(tmp_path / "w"), command="train")
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    assert any(line.startswith(f"wrote profile {tmp_path / 'w' / 'profile'}") for line in said)
    table = said.index("slowest operations, in a step on each device:")
    assert re.match(r" *\d+\.\d% +\d+\.\d{3} ms .* x  \w+", said[table + 1])


def test_fine_tuning_takes_the_body_and_starts_a_new_head(finished, data_dir, said):
    config = tiny_config(
        data_dir, init_from=str(finished), data__preprocess="decode|resize(16)", evals={}
    )
    state = Experiment.from_config(config).init_state()
    source = load_params(finished)[0]
    assert_same(
        state.params["Transformer"]["encoderblock_0"], source["Transformer"]["encoderblock_0"]
    )
    posemb = state.params["Transformer"]["posembed_input"]["pos_embedding"]
    assert posemb.shape == (1, 65, 16)
    assert any("resized from 4x4 to 8x8" in line for line in said)
    assert int(state.step) == 0


FREEZE = ("embedding/.*", ".*/encoderblock_0/.*")


def test_frozen_parameters_stay_bit_for_bit_and_leave_nothing_in_the_checkpoint(
    data_dir, tmp_path, said, monkeypatch
):
    rules = {
        "optimizer__freeze": FREEZE,
        "optimizer__lr_multipliers": (("head/.*", 10.0),),
        "optimizer__layer_decay": 0.8,
    }
    options = {"optimizer__accum_steps": 2, "ema_decay": 0.9, "evals": {}}
    config = tiny_config(data_dir, **rules, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(config, str(tmp_path / "w"), command="train")
    train(config, str(tmp_path / "w"), command="train")
    assert any("resuming from" in line for line in said)
    experiment = Experiment.from_config(config)
    first = experiment.init_state()
    with CheckpointManager(tmp_path / "w", experiment.settings.checkpoint, {}) as checkpoints:
        last = checkpoints.restore(experiment.abstract_state)
    trained, frozen = map(flatten, experiment.optimizer.rules.split(last.params))
    assert len(frozen) == 2 + 16
    for path, leaf in frozen.items():
        for tree in (first.params, first.ema_params, last.ema_params):
            np.testing.assert_array_equal(leaf, flatten(tree)[path], err_msg=path)
    for path, leaf in trained.items():
        assert not np.array_equal(leaf, flatten(first.params)[path]), path
    stored = json.loads((tmp_path / "w/checkpoints/8/training/_METADATA").read_text())
    paths = {key.replace("'", "").strip("()").replace(", ", "/") for key in stored["tree_metadata"]}
    for moment in ("mu", "nu"):
        found = {path.partition(f"/{moment}/")[2] for path in paths if f"/{moment}/" in path}
        assert found == set(trained)
    config.optimizer.freeze = ("cls",)
    with pytest.raises(UserError, match=r"optimizer\.freeze is"):
        train(config, str(tmp_path / "w"), command="train")
    counts = [sum(x.size for x in flat.values()) for flat in (trained, frozen)]
    assert "trained: {:,} parameters, frozen: {:,}".format(*counts) in said


def test_moments_lie_where_their_parameters_lie(data_dir):
    config = tiny_config(
        data_dir,
        model__num_layers=2,
        model__mlp_dim=128,
        mesh={"fsdp": 4, "tensor": 2},
        optimizer__freeze=FREEZE,
    )
    state = Experiment.from_config(config).abstract_state
    params, opt_state = flatten(state.params), flatten(state.opt_state)
    moments = {path: x for path, x in opt_state.items() if "/mu/" in path or "/nu/" in path}
    specs = set()
    for path, moment in moments.items():
        parameter = params[path.partition("/mu/" if "/mu/" in path else "/nu/")[2]]
        assert (moment.shape, moment.sharding) == (parameter.shape, parameter.sharding), path
        specs.add(moment.sharding.spec)
    assert PartitionSpec("fsdp", "tensor") in specs or PartitionSpec("tensor", "fsdp") in specs
    assert len(moments) == 2 * (len(params) - 18)


def test_rules_that_match_nothing_are_refused_before_anything_is_written(data_dir, tmp_path):
    config = tiny_config(data_dir, optimizer__lr_multipliers=(("haed/.*", 10.0),))
    with pytest.raises(UserError, match=r"optimizer\.lr_multipliers: 'haed/\.\*' .*head/bias"):
        train(config, str(tmp_path / "w"), command="train")
    assert not (tmp_path / "w").exists()


def test_what_is_no_config_or_no_function_is_refused_before_anything_is_written(data_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"config='digits': expected a ConfigDict, as .*load_config"
    ):
        train("digits", tmp_path / "w")
    with pytest.raises(UserError, match="on_record=3: expected a function"):
        train(tiny_config(data_dir), tmp_path / "w", on_record=3)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("init_from", ["nowhere", "{root}", "{root}/README.md"])
def test_start_from_what_is_no_checkpoint_is_refused(init_from, data_dir):
    init_from = init_from.format(root=ROOT)
    experiment = Experiment.from_config(tiny_config(data_dir, init_from=init_from))
    with pytest.raises(UserError, match="init_from"):
        experiment.init_state()


def test_parameters_that_are_no_numbers_are_never_saved(data_dir, tmp_path, monkeypatch):
    def step(self, step, metrics, *, log):
        if step == 5:
            metrics = metrics | {"param_norm": np.float32("nan")}
        original(self, step, metrics, log=log)

    original = Monitor.step
    monkeypatch.setattr(Monitor, "step", step)
    config = tiny_config(data_dir, checkpoint__every=1)
    with pytest.raises(DivergedError, match="the param_norm of step 5 is nan"):
        train(config, str(tmp_path / "w"), command="train")
    assert {p.name for p in (tmp_path / "w" / "checkpoints").iterdir()} == {"3", "4"}


# tests/checkpoint/test_manager.py has it without training.
@pytest.mark.slow
def test_best_checkpoint_may_be_judged_by_another_metric_later(data_dir, tmp_path):
    options = {"checkpoint__keep": 1, "checkpoint__every": 2, "evals__val__every": 2}
    for steps, metric in ((4, "val/top1"), (6, "val/loss")):
        config = tiny_config(data_dir, total_steps=steps, checkpoint__keep_best=metric, **options)
        train(config, str(tmp_path / "w"), command="train")
    assert load_params(tmp_path / "w")[0]
    assert (tmp_path / "w" / "checkpoints" / "6").is_dir()


def test_a_checkpoint_says_what_it_came_from(finished):
    run = json.loads((finished / "checkpoints" / "8" / "run.json").read_text())
    assert run["step"] == 8
    assert run["config"]["data"]["batch_size"] == 16
    assert len(run["data"]) == 16
    assert run["devices"] == {"cpu": 8}


def test_another_seed_goes_on_where_it_is_allowed(data_dir, tmp_path, said):
    train(tiny_config(data_dir, total_steps=4), str(tmp_path / "w"), command="train")
    other = {"total_steps": 8, "seed": 1}
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here.*resume\.allow=seed"):
        train(tiny_config(data_dir, **other), str(tmp_path / "w"), command="train")
    other["resume"] = {"allow": "seed"}
    train(tiny_config(data_dir, **other), str(tmp_path / "w"), command="train")
    assert "seed: 0 before, 1 now" in said


def test_a_start_that_hangs_where_its_files_are_opened_ends_to_be_run_again(
    data_dir, tmp_path, monkeypatch, capsys
):
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    def open_files(config):
        assert ended.wait(60)
        raise UserError("the file system answers again")

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda **_: None)
    config = tiny_config(data_dir, watchdog__compile=0.1)
    with pytest.raises(UserError, match="answers again"):
        train(config, tmp_path / "run", make_experiment=open_files)
    assert RUN_AGAIN in codes
    assert "hangs: 0 s in the phase 'compile', more than watchdog.compile=0.1" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("classifies", "keeps_average", "expected"),
    [
        (True, False, {"to predict": "python3 -m vit_jax.predict --workdir=runs/a IMAGES"}),
        (
            False,
            False,
            {
                "features": "python3 -m vit_jax.predict --workdir=runs/a --embed "
                "--output=features.npz IMAGES",
                "to fine-tune": "--config.init_from=runs/a in a run on data with classes",
            },
        ),
        (
            False,
            True,
            {
                "features": "python3 -m vit_jax.predict --workdir=runs/a --params=ema --embed "
                "--output=features.npz IMAGES",
                "to fine-tune": "--config.init_from=runs/a:ema_params in a run on data "
                "with classes",
            },
        ),
    ],
)
def test_the_end_names_what_a_model_is_good_for(classifies, keeps_average, expected):
    objective = types.SimpleNamespace(
        classifies=classifies, keeps_average=keeps_average, needs_label_maps=False
    )
    experiment: Any = types.SimpleNamespace(objective=objective, config={"model": {"name": "vit"}})
    assert suggest_uses(experiment, Path("runs/a"), "python3 -m vit_jax.main --x") == expected


@pytest.mark.parametrize("option", ["masks", "depth"])
def test_the_end_names_the_command_that_writes_pixels(option):
    objective = types.SimpleNamespace(classifies=False, needs_label_maps=True)
    info = types.SimpleNamespace(pixel_depth=option == "depth")
    experiment: Any = types.SimpleNamespace(
        objective=objective,
        config={"model": {"name": "vit"}},
        train_data=types.SimpleNamespace(info=info),
    )
    assert suggest_uses(experiment, Path("runs/a"), None) == {
        "to predict": f"python -m vit_jax.predict --workdir=runs/a --{option}={option} IMAGES"
    }


def test_a_model_is_described_with_all_sizes_of_its_patches():
    model = types.SimpleNamespace(num_layers=2, patch_size=(16, 16), patch_sizes=(48, 16))
    assert _list_sizes(model) == ["layers 2", "patches of 48, 16 in turn"]


def test_the_end_names_the_modules_that_the_model_needs():
    config = {"model": {"name": "my_models:ConvNet"}, "data": {"name": "folder:photos"}}
    objective = types.SimpleNamespace(classifies=True)
    experiment: Any = types.SimpleNamespace(objective=objective, config=config)
    assert suggest_uses(experiment, Path("runs/a"), None) == {
        "to predict": "python -m vit_jax.predict --workdir=runs/a --parts=my_models IMAGES"
    }
