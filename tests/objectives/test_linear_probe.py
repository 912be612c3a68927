# SPDX-License-Identifier: Apache-2.0
"""A linear probe: several heads train as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.variants import make_vit
from vit_jax.objectives.linear_probe import make_linear_probe
from vit_jax.optim.base_optimizers import sgd
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.training.step import init_state, train_step
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)), jnp.uint8),
    "label": jnp.arange(6) % 3,
}


def probe(*factors, **options):
    model = make_vit(num_classes=0, **SIZES)
    return make_linear_probe(model=model, num_classes=3, lr_factors=factors, **options)


def train(objective, *, steps=3, **options):
    optimizer = make_optimizer(
        base=sgd(),
        lr=0.1,
        total_steps=10,
        freeze=objective.frozen,
        lr_multipliers=objective.lr_multipliers(),
        **options,
    )
    start = init_state(jax.random.key(0), BATCH, objective=objective, tx=optimizer.tx, ema=True)
    state = start
    step = jax.jit(
        lambda state: train_step(
            state, BATCH, objective=objective, optimizer=optimizer, ema_decay=0.5, seed=0
        )
    )
    for _ in range(steps):
        state, metrics = step(state)
    return start, state, metrics


def test_each_head_trains_as_if_it_were_alone():
    _, together, metrics = train(probe(0.1, 1.0, 10.0))
    for factor, name in ((0.1, "x0.1"), (10.0, "x10")):
        _, alone, its_metrics = train(probe(factor))
        for part in ("kernel", "bias"):
            np.testing.assert_allclose(
                together.params["probe"][name][part],
                alone.params["probe"][name][part],
                rtol=1e-5,
                atol=1e-7,
            )
        np.testing.assert_allclose(metrics[f"loss_{name}"], its_metrics["loss"], rtol=1e-5)
    assert set(metrics) == {
        *("loss", "loss_x0.1", "loss_x1", "loss_x10"),
        *("top1_x0.1", "top1_x1", "top1_x10"),
        *("lr", "grad_norm", "param_norm"),
    }


def test_only_heads_and_running_statistics_change():
    start, state, _ = train(probe(1.0, 2.0))
    before, after = flatten(start.params), flatten(state.params)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("probe/")}
    trained = {path.partition("/trace/")[2] for path in flatten(state.opt_state) if "trace" in path}
    assert trained == {
        f"probe/{head}/{part}" for head in ("x1", "x2") for part in ("kernel", "bias")
    }


def test_features_are_normalised_as_published():
    """Batch statistics in training; running ones, of momentum 0.9 and unbiased, in evaluation."""
    objective = probe(1.0)
    start, state, _ = train(objective, steps=2)
    features = np.asarray(objective.predict(start.params, BATCH)["pre_logits"], np.float64)
    mean, var = 0.0, 1.0
    for _ in range(2):
        mean = 0.9 * mean + 0.1 * features.mean(axis=0)
        var = 0.9 * var + 0.1 * features.var(axis=0, ddof=1)
    for tree in (state.params, state.ema_params):
        np.testing.assert_allclose(tree["probe"]["mean"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(tree["probe"]["var"], var, rtol=1e-4, atol=1e-6)
    head = start.params["probe"]["x1"]
    normal = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-6)
    logits = normal @ np.asarray(head["kernel"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = -log_p[np.arange(6), np.asarray(BATCH["label"])].mean()
    loss, _ = objective.loss(
        start.params, objective.augment(BATCH, jax.random.key(0)), jax.random.key(1)
    )
    assert float(loss) == pytest.approx(want, rel=1e-4)
    out = objective.predict(state.params, BATCH)["head_logits"]
    normal = (features - mean) / np.sqrt(var + 1e-6)
    head = state.params["probe"]["x1"]
    np.testing.assert_allclose(
        out[0], normal @ np.asarray(head["kernel"]) + head["bias"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("factors", [(), (1.0, 1.0), (0.0, 1.0), (-1.0,)])
def test_factors_are_different_and_positive(factors):
    with pytest.raises(UserError, match=r"objective\.lr_factors="):
        probe(*factors)


def test_several_labels_and_shares_above_one_are_refused():
    with pytest.raises(UserError, match="one label an example"):
        probe(1.0, multi_label=True)
    with pytest.raises(UserError, match=r"objective\.flip=1\.5"):
        probe(1.0, flip=1.5)
