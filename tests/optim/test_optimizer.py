# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.optim.directions import adamw, sgd
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.schedules import make_schedule
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten


@pytest.mark.parametrize(
    ("shape", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_schedule_warms_up_and_decays(shape, middle, end):
    end_lr = 0.0 if shape == "constant" else 0.1
    rate = make_schedule(lr=1.0, total_steps=110, schedule=shape, warmup_steps=10, end_lr=end_lr)
    got = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(got, [0, 0.5, 1, middle, end], rtol=1e-5)


def test_schedule_without_warmup_starts_at_its_peak():
    rate = make_schedule(lr=2.0, total_steps=10, schedule="cosine", warmup_steps=0, end_lr=0.0)
    assert float(rate(0)) == 2.0


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_warmup_that_does_not_fit_is_refused(warmup):
    with pytest.raises(UserError, match=f"optimizer.warmup_steps={warmup}: .*total_steps=10"):
        make_schedule(lr=1.0, total_steps=10, schedule="cosine", warmup_steps=warmup, end_lr=0.0)


def updates(tx, steps=3):
    params = {"kernel": jnp.array([1.0, -2.0])}
    state, found = tx.init(params), []
    for step in range(steps):
        grads = {"kernel": params["kernel"] * (step + 1)}
        update, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, update)
        found.append(params["kernel"])
    return np.array(found)


def test_adamw_is_that_of_optax():
    ours = make_optimizer(direction=adamw(), total_steps=9, lr=0.1, weight_decay=0.2)
    theirs = optax.adamw(optax.cosine_decay_schedule(0.1, 9), weight_decay=0.2)
    np.testing.assert_allclose(updates(ours.tx), updates(theirs), rtol=1e-6)


def test_sgd_has_heavy_ball_momentum():
    ours = make_optimizer(direction=sgd(), total_steps=9, lr=0.1, schedule="constant")
    np.testing.assert_allclose(updates(ours.tx), updates(optax.sgd(0.1, momentum=0.9)), rtol=1e-6)


def test_momentum_can_be_kept_in_bfloat16():
    params = {"kernel": jnp.ones((2,))}
    assert sgd(momentum_dtype="bfloat16").tx.init(params).trace["kernel"].dtype == jnp.bfloat16
    assert adamw(mu_dtype="bfloat16").tx.init(params).mu["kernel"].dtype == jnp.bfloat16


PARAMS = {
    "embedding": {"kernel": jnp.array([[0.3, -0.7]]), "bias": jnp.array([0.1, 0.2])},
    "head": {"kernel": jnp.array([[1.5], [-0.9]]), "bias": jnp.array([0.4])},
}


def train(tx, params, *, steps=3):
    """Parameters and state after some updates with made-up gradients of all of `params`."""
    opt_state = tx.init(params)
    for step in range(steps):
        phase = jnp.float32(step)
        grads = jax.tree.map(lambda p, phase=phase: jnp.sin(3 * p + phase), params)
        update, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, update)
    return params, opt_state


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("direction", [adamw, sgd])
def test_without_rules_numbers_and_state_are_those_of_the_plain_chain(direction):
    options = {"weight_decay": 0.2, "grad_clip_norm": 1.0, "warmup_steps": 1}
    ours = make_optimizer(direction=direction(), total_steps=9, lr=0.1, **options)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        direction().tx,
        optax.add_decayed_weights(0.2, mask=ours.rules.decay_mask),
        optax.scale_by_learning_rate(ours.schedule),
    )
    assert_same(train(ours.tx, PARAMS), train(plain, PARAMS))


def test_frozen_parameters_have_no_optimizer_state_and_no_update():
    options = {"weight_decay": 0.2, "grad_clip_norm": 1.0, "freeze": ("embedding/.*",)}
    optimizer = make_optimizer(direction=adamw(), total_steps=9, lr=0.1, **options)
    opt_state = optimizer.tx.init(PARAMS)
    moments = [path for path in flatten(opt_state) if "/mu/" in path or "/nu/" in path]
    assert {path.split("/")[-2] for path in moments} == {"head"}
    assert len(moments) == 4
    trained, frozen = optimizer.rules.split(PARAMS)
    update, _ = optimizer.tx.update(trained, opt_state, PARAMS)
    assert update.keys() == {"head"}
    assert frozen.keys() == {"embedding"}


def test_what_is_trained_is_trained_as_if_the_frozen_were_not_there():
    options = {"total_steps": 9, "lr": 0.1, "weight_decay": 0.2, "grad_clip_norm": 0.1}
    alone = make_optimizer(direction=adamw(), **options)
    beside = make_optimizer(direction=adamw(), **options, freeze=("embedding/.*",))
    head = {"head": PARAMS["head"]}
    want = alone.tx.update(head, alone.tx.init(head), head)
    assert_same(beside.tx.update(head, beside.tx.init(PARAMS), PARAMS), want)


def test_multipliers_scale_the_update_and_its_weight_decay():
    options = {"total_steps": 9, "lr": 0.1, "weight_decay": 0.2, "schedule": "constant"}
    plain = make_optimizer(direction=sgd(momentum=0.0), **options)
    rules = {"lr_multipliers": [["head/.*", 10], ["embedding/bias", 0.5]]}
    scaled = make_optimizer(direction=sgd(momentum=0.0), **options, **rules)
    grads = jax.tree.map(jnp.cos, PARAMS)
    want, _ = plain.tx.update(grads, plain.tx.init(PARAMS), PARAMS)
    got, _ = scaled.tx.update(grads, scaled.tx.init(PARAMS), PARAMS)
    for path, factor in (("embedding/kernel", 1), ("embedding/bias", 0.5), ("head/kernel", 10)):
        np.testing.assert_allclose(flatten(got)[path], factor * flatten(want)[path], rtol=1e-6)
    decayed = -0.1 * 10 * (grads["head"]["kernel"] + 0.2 * PARAMS["head"]["kernel"])
    np.testing.assert_allclose(got["head"]["kernel"], decayed, rtol=1e-6)


def test_layer_decay_of_scanned_blocks_is_that_of_single_ones():
    options = {"total_steps": 9, "lr": 1.0, "schedule": "constant", "layer_decay": 0.5}
    optimizer = make_optimizer(direction=sgd(momentum=0.0), **options)
    block = {"LayerNorm_0": {"scale": jnp.ones((3, 2))}}
    params = {"cls": jnp.ones((1, 1, 2)), "Transformer": {"encoderblock": block}}
    update, _ = optimizer.tx.update(params, optimizer.tx.init(params), params)
    np.testing.assert_array_equal(update["cls"], jnp.full((1, 1, 2), -(0.5**4)))
    scale = update["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"]
    np.testing.assert_array_equal(scale, -np.array([[0.125] * 2, [0.25] * 2, [0.5] * 2]))


def test_rules_that_do_not_fit_the_parameters_are_refused_before_there_is_a_state():
    optimizer = make_optimizer(direction=sgd(), total_steps=9, lr=0.1, freeze=("haed/.*",))
    with pytest.raises(UserError, match=r"optimizer\.freeze: 'haed/"):
        jax.eval_shape(optimizer.tx.init, PARAMS)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"weight_decay": -0.1}, {"accum_steps": 0}, {"grad_clip_norm": 0.0}],
)
def test_values_out_of_range_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=f"optimizer.{key}="):
        make_optimizer(direction=sgd(), total_steps=9, **({"lr": 0.1} | wrong))
