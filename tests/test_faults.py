# SPDX-License-Identifier: Apache-2.0
"""Runs that meet a fault: steps that diverge, damaged checkpoints, a disk that is full."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.test_preemption import ENDLESS, wait_for
from tests.runtime.test_processes import start
from tests.tiny import tiny_config
from tests.training.test_run import assert_same
from vit_jax.checkpoint import manager
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import SaveError
from vit_jax.checkpoint.manifest import find_fault
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.objectives.supervised import Supervised
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import read_ledger, summarize
from vit_jax.training.run import train
from vit_jax.training.step import step_rng
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import RUN_AGAIN

SMALL = {"evals": {}, "model__num_layers": 1, "log_every": 1, "mesh": {"data": 8}}


def poison(monkeypatch, *steps):
    """Makes the images of some steps no numbers, wherever the step is taken."""

    def augment(self, batch, rng):
        batch = original(self, batch, rng)
        bad = [jax.random.split(step_rng(0, step - 1))[0] for step in steps]
        hit = sum(jnp.all(jax.random.key_data(rng) == jax.random.key_data(key)) for key in bad)
        return batch | {"image": jnp.where(hit > 0, jnp.nan, batch["image"])}

    original = Supervised.augment
    monkeypatch.setattr(Supervised, "augment", augment)


def run(data_dir, workdir, **changes):
    train(tiny_config(data_dir, **SMALL | changes), str(workdir), command="train")


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r}


def test_a_step_that_diverges_stops_the_run_and_leaves_its_batch(data_dir, tmp_path, monkeypatch):
    poison(monkeypatch, 7)
    with pytest.raises(DivergedError, match=r"the loss of step 7 is nan; .*on_divergence=skip or"):
        run(data_dir, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    content = json.loads((tmp_path / "divergence" / "7.json").read_text())
    assert len(content["records"]) == 16
    assert set(content["grad_norms"].values()) == {"nan"}
    assert "Transformer/encoderblock_0" in content["grad_norms"]
    with np.load(tmp_path / "divergence" / "7.npz") as batch:
        assert batch["image"].shape == (16, 8, 8, 3)
        assert batch["label"].shape == (16,)
    assert max(losses(tmp_path)) == 6
    found = summarize(read_ledger(tmp_path))
    assert found is not None
    assert found.causes == ("divergence",)


def test_skipped_steps_are_as_if_they_had_not_been(data_dir, tmp_path, monkeypatch, said):
    poison(monkeypatch, 7)
    run(data_dir, tmp_path, on_divergence="skip", checkpoint__every=1, checkpoint__keep=3)
    assert "  skipped         1 steps that diverged and changed nothing: 7" in said
    params = {s: load_params(tmp_path / "checkpoints" / str(s))[0] for s in (6, 7, 8)}
    assert_same(params[6], params[7])
    assert not np.array_equal(params[8]["head"]["kernel"], params[7]["head"]["kernel"])
    counts = {r["step"]: r["train/skipped"] for r in read_metrics(tmp_path) if "train/lr" in r}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 1, 8: 1}
    assert 7 not in losses(tmp_path)
    assert (tmp_path / "divergence" / "7.npz").exists()


def test_a_rollback_goes_on_from_the_checkpoint_past_the_batch(data_dir, tmp_path, monkeypatch):
    poison(monkeypatch, 6)
    options = {
        "on_divergence": "rollback",
        "total_steps": 10,
        "checkpoint__every": 4,
        "checkpoint__keep": 3,
    }
    run(data_dir, tmp_path, **options)
    (line,) = (tmp_path / "divergence" / "rollbacks.jsonl").read_text().splitlines()
    assert json.loads(line) == {"to": 4, "past": 6, "reason": "the loss of step 6 is nan"}
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 7, 8, 9, 10]
    # One that is killed before the next checkpoint goes the same way.
    end = load_params(tmp_path)[0]
    for step in (8, 10):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    run(data_dir, tmp_path, **options)
    assert_same(load_params(tmp_path)[0], end)


def test_rollbacks_that_do_not_help_are_bounded(data_dir, tmp_path, monkeypatch):
    poison(monkeypatch, 5, 6, 7, 8, 9)
    options = {"on_divergence": "rollback", "total_steps": 12, "checkpoint__every": 4}
    with pytest.raises(DivergedError, match=r"step 8 is nan; .* 3 rollbacks have not helped"):
        run(data_dir, tmp_path, **options)


def test_a_loss_that_is_too_high_diverges(data_dir, tmp_path):
    with pytest.raises(DivergedError, match=r"the loss of step 1 is 2\.\d+, more than max_loss=1"):
        run(data_dir, tmp_path, max_loss=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_divergence": "skp"}, "on_divergence='skp' is unknown; did you mean 'skip'"),
        ({"max_loss": -1.0}, "max_loss=-1.0: expected more than 0"),
        ({"watchdog": {"step": -1}}, "watchdog.step=-1: expected seconds"),
        ({"watchdog": {"steps": 1}}, "unknown config key watchdog.steps"),
    ],
)
def test_bad_settings_are_refused(changes, message, data_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        run(data_dir, tmp_path, **changes)


def test_a_flipped_bit_costs_a_checkpoint_and_changes_nothing(data_dir, tmp_path, said):
    run(data_dir, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "w")
    path = max((tmp_path / "w/checkpoints/8/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    run(data_dir, tmp_path / "w")
    assert any("checkpoints/8, which is damaged: params/" in line for line in said)
    assert any(line.endswith("resuming from " + str(tmp_path / "w/checkpoints/4")) for line in said)
    assert_same(load_params(tmp_path / "w")[0], load_params(tmp_path / "straight")[0])


def full(_):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_is_said_and_the_next_one_is_another_try(
    data_dir, tmp_path, monkeypatch, said
):
    failures = iter([True, False, False, False])
    original = manager.write_manifest
    monkeypatch.setattr(
        manager, "write_manifest", lambda f: full(f) if next(failures) else original(f)
    )
    run(data_dir, tmp_path, checkpoint__every=2)
    assert sum("step 2 can't be written (OSError: [Errno 28] No space left" in s for s in said) == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


def test_the_last_step_is_tried_after_all_before_it_have_failed(data_dir, tmp_path, monkeypatch):
    failures = iter([True, True, True, True, False])
    original = manager.write_manifest
    monkeypatch.setattr(
        manager, "write_manifest", lambda f: full(f) if next(failures) else original(f)
    )
    monkeypatch.setattr("vit_jax.training.services.time.sleep", lambda _: None)
    run(data_dir, tmp_path, checkpoint__every=2)
    assert list_steps(tmp_path) == [8]


def test_a_run_that_can_not_save_ends_with_one_line(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "write_manifest", full)
    monkeypatch.setattr("vit_jax.training.services.time.sleep", lambda _: None)
    with pytest.raises(SaveError, match=r"step 8 can't be written .*the newest is of step 0"):
        run(data_dir, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_files_of_another_kind_do_not_cost_the_last_step(data_dir, tmp_path, said):
    for name in ("evals", "tensorboard", "divergence", "profile", "broken"):
        (tmp_path / name).write_text("mine")
    for name in ("report.html", "trackers.json", "watchdog-0.txt"):
        (tmp_path / name).mkdir()
    profile = {"start": 2, "steps": 2}
    evals = {"val": {"split": "test[:50]", "preprocess": "decode", "every": 4}}
    run(data_dir, tmp_path, evals=evals, profile=profile)
    assert list_steps(tmp_path) == [4, 8]
    assert find_fault(tmp_path / "checkpoints" / "8") is None
    assert (tmp_path / "evals").read_text() == "mine"
    text = "\n".join(said)
    for name in ("evals/val_8.json", "tensorboard", "profile", "report.html"):
        assert f"{tmp_path / name} can't be written" in text, name
    with jax.profiler.trace(str(tmp_path / "later")):  # No trace is left running.
        pass


def test_a_rollback_that_can_not_be_recorded_is_one_line(data_dir, tmp_path, monkeypatch):
    poison(monkeypatch, 6)
    (tmp_path / "divergence").write_text("mine")
    with pytest.raises(UserError, match=r"loss of step 6 is nan, and divergence/rollbacks\.jsonl"):
        run(data_dir, tmp_path, on_divergence="rollback")


def test_secrets_of_the_environment_are_in_no_file_of_a_run(data_dir, tmp_path, monkeypatch, capfd):
    secret = "hunter2-3f9a"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY", "DATABASE_PASSWORD"):
        monkeypatch.setenv(name, secret)
    poison(monkeypatch, 7)
    run(data_dir, tmp_path, on_divergence="skip")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "ledger.jsonl", "run.json", "7.json"} <= {path.name for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_process_that_waits_for_a_stopped_one_asks_for_another_run(data_dir, tmp_path):
    limit = ["--config.watchdog.step=5"]
    job = {"processes": 2, "devices": 2, "text": ENDLESS, "arguments": limit}
    with start(tmp_path, data_dir, **job) as (first, second):
        wait_for(first, "step 5/")
        second.send_signal(signal.SIGSTOP)
        _, errors = first.communicate(timeout=600)
        assert first.returncode == RUN_AGAIN, errors
    for text in (errors, (tmp_path / "workdir" / "watchdog-0.txt").read_text()):
        assert "process 0 hangs" in text
        assert "phase 'step'" in text
        assert "vit_jax/training/run.py" in text
    found = summarize(read_ledger(tmp_path / "workdir"))
    assert found is not None
    assert found.causes == ("watchdog: step",)
