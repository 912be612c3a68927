# SPDX-License-Identifier: Apache-2.0
"""The command that says how fast the training step of a config is."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.clock import Clock
from vit_jax.benchmark import step as step_benchmark
from vit_jax.benchmark.__main__ import main
from vit_jax.benchmark.step import make_batch, measure_steps
from vit_jax.utils.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "total_steps": 10,
        "model": {"name": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1,
                  "num_heads": 2, "mlp_dim": 16},
        "data": {"name": "nowhere", "split": "train", "preprocess": "decode|resize(8)",
                 "batch_size": 16},
        "optimizer": {"name": "sgd", "lr": 0.1, "schedule": "constant"},
    })
"""


def fake_experiment(step):
    where = SingleDeviceSharding(jax.devices()[0])
    shapes = {"image": ((6, 4, 4, 3), np.uint8), "label": ((6,), np.int32)}
    return SimpleNamespace(
        abstract_batch={
            k: jax.ShapeDtypeStruct(*shape, sharding=where) for k, shape in shapes.items()
        },
        train_data=SimpleNamespace(info=SimpleNamespace(num_classes=3)),
        init_state=lambda: 0,
        train_step=step,
    )


def test_a_step_is_timed_without_its_compilation(monkeypatch):
    taken, clock = [], Clock()
    monkeypatch.setattr(step_benchmark, "time", clock)

    def train_step(state, batch):
        clock.sleep(0.01 if taken else 0.1)
        taken.append(state)
        return state + 1, {"loss": batch["label"].sum()}

    first, times = measure_steps(fake_experiment(train_step), repeats=3, seconds=0.05)
    assert first == pytest.approx(0.1)
    assert times == pytest.approx([0.01] * 3)
    assert taken == list(range(len(taken)))  # each from the state of the one before
    assert len(taken) > 2 + 3  # several steps are measured at a time


def test_batches_are_random_images_and_labels_of_all_classes():
    batch = make_batch(fake_experiment(None))
    assert batch["image"].shape == (6, 4, 4, 3)
    assert len(np.unique(batch["image"])) > 100
    assert set(np.unique(batch["label"])) <= {0, 1, 2}


def test_batches_have_views_and_tokens_without_labels():
    experiment = fake_experiment(None)
    where = experiment.abstract_batch.pop("label").sharding
    views = jax.ShapeDtypeStruct((6, 2, 2, 2, 3), np.uint8, sharding=where)
    tokens = jax.ShapeDtypeStruct((6, 50), np.int32, sharding=where)
    experiment.abstract_batch |= {"local": views, "tokens": tokens}
    experiment.train_data.find_tokenizer = lambda: SimpleNamespace(vocab_size=5)
    batch = make_batch(experiment)
    assert batch.keys() == {"image", "local", "tokens"}
    assert len(np.unique(batch["local"])) > 50
    assert set(np.unique(batch["tokens"])) == {0, 1, 2, 3, 4}


def test_the_command_prints_and_writes_what_it_measured(said, tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.setattr(step_benchmark, "measure_steps", lambda *a, **k: (7.0, [0.5, 0.25, 0.25]))
    monkeypatch.setattr(step_benchmark, "measure_gemm", lambda: 1e12)
    path = tmp_path / "new" / "step.json"
    main(
        [
            "step",
            f"--config={tmp_path / 'config.py'}",
            "--config.data.batch_size=32",
            "--num_classes=5",
            "--image_size=8",
            f"--json={path}",
        ]
    )
    results = json.loads(path.read_text())
    count = jax.device_count()
    assert results["devices"] == count
    assert results["images_per_sec_per_device"] == pytest.approx(32 / 0.25 / count)
    assert results["first_step_s"] == 7
    assert results["overrides"] == {"data.batch_size": 32}
    # Patches, 1 block, head: 2 operations for each parameter and token, three times with gradients.
    assert results["model_flops_per_sec_per_device"] * count > (
        3 * 2 * 4 * 32 * (4 * 64 + 2 * 128) / 0.25
    )
    text = "\n".join(said)
    assert "batches of 32" in text
    assert f"{128 / count:.1f} images/s per device; a step takes 250.0 ms (250.0 to 500.0)" in text
    assert "first step after 7.0 s" in text
    assert f"wrote {path}" in text


def test_a_config_that_is_not_read_can_not_be_overridden():
    with pytest.raises(UserError, match=r"config\.seed: input has no config to override"):
        main(["input", "--source=folder:x", "--config.seed=1"])


def test_a_measurement_takes_time(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    with pytest.raises(UserError, match="expected more than 0"):
        main(["step", f"--config={tmp_path / 'config.py'}", "--seconds=0"])
