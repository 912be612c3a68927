# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.optim.optimizer import adamw, make_optimizer, sgd
from vit_jax.optim.schedules import make_schedule
from vit_jax.utils.errors import UserError


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
    assert sgd(momentum_dtype="bfloat16").init(params).trace["kernel"].dtype == jnp.bfloat16
    assert adamw(mu_dtype="bfloat16").init(params).mu["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"weight_decay": -0.1}, {"accum_steps": 0}, {"grad_clip_norm": 0.0}],
)
def test_values_out_of_range_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=f"optimizer.{key}="):
        make_optimizer(direction=sgd(), total_steps=9, **({"lr": 0.1} | wrong))
