# SPDX-License-Identifier: Apache-2.0
"""What the switches for people who come from timm give is what timm gives."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.models.vit import VisionTransformer
from vit_jax.optim import base_optimizers
from vit_jax.optim.averages import ema_decay
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.rules import ParamRules
from vit_jax.optim.schedules import ScheduleOptions
from vit_jax.utils.durations import Clock
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

# From make_timm_optim_golden.py, as are the numbers below.
GOLDEN = json.loads((Path(__file__).parents[1] / "testdata" / "torch" / "optim.json").read_text())
CLOCK = Clock(batch_size=8, epoch_examples=lambda: 5 * 8 + 3)


def rates(total_steps, **options):
    own = {"warmup_steps": 10, "start_lr": 0.05, "end_lr": 0.1} | options
    schedule = ScheduleOptions(**own).make(lr=0.8, total_steps=total_steps, clock=CLOCK)
    return [float(schedule(step)) for step in range(total_steps)]


def test_a_cosine_can_count_the_warmup():
    found = rates(30, decay_from="start")
    np.testing.assert_allclose(found, GOLDEN["rates"], rtol=1e-5)
    # After the warmup, a third of the run, the rate is where the cosine is by then.
    assert found[10] == pytest.approx(0.1 + 0.7 * 0.75)
    assert rates(30)[10] == pytest.approx(0.8)


def test_a_rate_can_change_between_epochs_alone():
    found = rates(30, decay_from="start", lr_every="epoch")
    np.testing.assert_allclose(found, GOLDEN["rates by epoch"], rtol=1e-5)


def test_the_default_is_a_warmup_before_the_schedule():
    # --warmup-prefix puts the warmup on top of the epochs.
    np.testing.assert_allclose(rates(40), GOLDEN["rates after warmup"], rtol=1e-5)


def test_a_linear_decay_can_count_the_warmup_too():
    found = rates(30, schedule="linear", decay_from="start")
    assert found[10] == pytest.approx(0.8 - 0.7 / 3)
    assert found[9] == pytest.approx(0.05 + 0.75 * 0.9)


@pytest.mark.parametrize("schedule", ["rsqrt", "constant"])
def test_other_schedules_do_not_fall_from_a_start(schedule):
    with pytest.raises(UserError, match=r"^optimizer\.decay_from='start': expected .*'linear'"):
        rates(30, schedule=schedule, end_lr=0.0, decay_from="start")


def test_single_schedules_may_differ_in_it():
    own = ScheduleOptions(warmup_steps=2)
    other = own.replace({"decay_from": "start"}, key="optimizer.schedules")
    assert other.make(lr=1.0, total_steps=4, clock=None)(2) == pytest.approx(0.5)


def test_averages_warm_up_as_those_of_timm():
    found = [float(ema_decay(jnp.int32(t), 0.99, "power")) for t in range(0, 1199, 7)]
    np.testing.assert_allclose(found, GOLDEN["ema"][::7], atol=1e-6)
    assert GOLDEN["ema"][-1] == 0.99
    assert ema_decay(jnp.int32(0), 0.99, "none") == 0.99
    counted = [float(ema_decay(jnp.int32(t), 0.99, "count")) for t in (0, 90, 5000)]
    np.testing.assert_allclose(counted, [0.1, 0.91, 0.99], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "weight_decay"), [("lars", 0.3), ("lars without decay", 0.0)], ids=str
)
def test_lars_can_add_the_norms_as_timm_does(case, weight_decay):
    base = base_optimizers.lars(trust_coefficient=0.02, trust_ratio="norms")
    options = {"schedule": "constant", "lr": 0.1, "total_steps": 4}
    tx = make_optimizer(base=base, weight_decay=weight_decay, **options).tx
    params = {"kernel": np.array([[3.0, -4.0]], np.float32)}
    state = tx.init(params)
    gradients = ([[0.5, 0.1]], [[-0.2, 0.3]], [[0.0, 0.0]], [[1.0, -2.0]])
    for gradient, expected in zip(gradients, GOLDEN[case], strict=True):
        updates, state = tx.update({"kernel": np.array(gradient, np.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


NAMES = {
    "cls": "cls_token",
    "embedding/kernel": "patch_embed.proj.weight",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoderblock_0/LayerNorm_0/scale": "blocks.0.norm1.weight",
    "Transformer/encoderblock_2/MlpBlock_0/Dense_1/kernel": "blocks.2.mlp.fc2.weight",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/kernel": "head.weight",
}


def test_layer_decay_is_that_of_timm_with_a_multiplier_of_the_last_norm():
    sizes = {"hidden_size": 8, "num_layers": 3, "num_heads": 2, "mlp_dim": 16, "num_classes": 5}
    model = VisionTransformer(patch_size=(4, 4), **sizes)
    image = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)[
        "params"
    ]
    assert NAMES.keys() <= flatten(params).keys()
    multipliers = (("Transformer/encoder_norm/.*", 0.5),)
    timms = ParamRules(lr_multipliers=multipliers, layer_decay=0.5).lr_factors(params)
    beits = ParamRules(layer_decay=0.5).lr_factors(params)
    for path, name in NAMES.items():
        assert timms[path] == GOLDEN["layers"][name], path
        last_norm = path.startswith("Transformer/encoder_norm")
        assert beits[path] == (1.0 if last_norm else GOLDEN["layers"][name]), path
