# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.optim.base_optimizers import adamw, lamb, sgd
from vit_jax.optim.norms import clip_by_global_norm
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.schedules import ScheduleOptions, make_schedule
from vit_jax.utils.durations import Clock
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


def test_a_rate_by_the_root_of_time_halves_its_square_after_its_timescale():
    rate = make_schedule(lr=1.0, total_steps=99, schedule="rsqrt", warmup_steps=4, timescale=10)
    got = [float(rate(step)) for step in (0, 2, 4, 14, 34)]
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.5**0.5, 0.5], rtol=1e-6)
    slow = make_schedule(lr=1.0, total_steps=99, schedule="rsqrt")
    assert float(slow(10_000)) == pytest.approx(0.5**0.5)


def test_cooldown_brings_any_schedule_to_its_end():
    options = {"lr": 1.0, "total_steps": 100, "cooldown_steps": 20}
    flat = make_schedule(**options, schedule="constant")
    np.testing.assert_allclose([flat(t) for t in (0, 80, 90, 95, 100)], [1, 1, 0.5, 0.25, 0])
    high = make_schedule(**options, schedule="constant", end_lr=0.2)
    np.testing.assert_allclose([high(t) for t in (80, 90, 100)], [1, 0.6, 0.2], rtol=1e-6)
    root = make_schedule(**options, schedule="rsqrt", timescale=90)
    np.testing.assert_allclose([root(t) for t in (90, 100)], [0.5**0.5 / 2, 0], atol=1e-6)


def test_warmup_can_start_above_zero():
    rate = make_schedule(lr=1.0, total_steps=9, schedule="constant", warmup_steps=4, start_lr=0.2)
    np.testing.assert_allclose([rate(t) for t in (0, 2, 4)], [0.2, 0.6, 1], rtol=1e-6)


def test_durations_of_a_schedule_have_four_units():
    clock = Clock(batch_size=10, epoch_examples=lambda: 200)
    for key, value in (("steps", 30), ("epochs", 1.5), ("examples", 300), ("percent", 15)):
        options = ScheduleOptions(schedule="constant", **{f"warmup_{key}": value})
        rate = options.make(lr=1.0, total_steps=200, clock=clock)
        assert float(rate(15)) == 0.5
    assert float(ScheduleOptions(cooldown_percent=50).make(lr=1, total_steps=8, clock=None)(8)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 3, "warmup_epochs": 1}, "warmup_steps=3 and optimizer.warmup_epochs=1"),
        ({"warmup_percent": 101}, "warmup_percent=101: expected a part of the run"),
        ({"warmup_steps": 6, "cooldown_steps": 5}, "cooldown_steps=5: .* at most total_steps=10"),
        ({"cooldown_steps": -1}, "cooldown_steps=-1: expected 0 or more"),
        ({"schedule": "constant", "end_lr": 0.1}, "end_lr=0.1: a constant schedule has none"),
        ({"schedule": "rsqrt", "end_lr": 0.1}, "end_lr=0.1: a rsqrt schedule has none"),
        ({"timescale": 5}, "timescale=5: .*schedule='rsqrt'"),
        ({"start_lr": 0.1}, "start_lr=0.1: expected a warmup"),
        ({"end_lr": -0.1}, "end_lr=-0.1: expected at least 0"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=f"optimizer.{message}"):
        ScheduleOptions(**options).make(lr=1.0, total_steps=10, clock=None)


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
    ours = make_optimizer(base=adamw(), total_steps=9, lr=0.1, weight_decay=0.2)
    theirs = optax.adamw(optax.cosine_decay_schedule(0.1, 9), weight_decay=0.2)
    np.testing.assert_allclose(updates(ours.tx), updates(theirs), rtol=1e-6)


def test_sgd_has_heavy_ball_momentum():
    ours = make_optimizer(base=sgd(), total_steps=9, lr=0.1, schedule="constant")
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


@pytest.mark.parametrize("base", [adamw, sgd])
def test_without_rules_numbers_and_state_are_those_of_the_plain_chain(base):
    options = {"weight_decay": 0.2, "grad_clip_norm": 1.0, "warmup_steps": 1}
    ours = make_optimizer(base=base(), total_steps=9, lr=0.1, **options)
    plain = optax.chain(
        clip_by_global_norm(1.0),
        base().tx,
        optax.add_decayed_weights(0.2, mask=ours.rules.decay_mask),
        optax.scale_by_learning_rate(ours.schedule),
    )
    assert_same(train(ours.tx, PARAMS), train(plain, PARAMS))


def test_frozen_parameters_have_no_optimizer_state_and_no_update():
    options = {"weight_decay": 0.2, "grad_clip_norm": 1.0, "freeze": ("embedding/.*",)}
    optimizer = make_optimizer(base=adamw(), total_steps=9, lr=0.1, **options)
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
    alone = make_optimizer(base=adamw(), **options)
    beside = make_optimizer(base=adamw(), **options, freeze=("embedding/.*",))
    head = {"head": PARAMS["head"]}
    want = alone.tx.update(head, alone.tx.init(head), head)
    assert_same(beside.tx.update(head, beside.tx.init(PARAMS), PARAMS), want)


def test_multipliers_scale_the_update_and_its_weight_decay():
    options = {"total_steps": 9, "lr": 0.1, "weight_decay": 0.2, "schedule": "constant"}
    plain = make_optimizer(base=sgd(momentum=0.0), **options)
    rules = {"lr_multipliers": [["head/.*", 10], ["embedding/bias", 0.5]]}
    scaled = make_optimizer(base=sgd(momentum=0.0), **options, **rules)
    grads = jax.tree.map(jnp.cos, PARAMS)
    want, _ = plain.tx.update(grads, plain.tx.init(PARAMS), PARAMS)
    got, _ = scaled.tx.update(grads, scaled.tx.init(PARAMS), PARAMS)
    for path, factor in (("embedding/kernel", 1), ("embedding/bias", 0.5), ("head/kernel", 10)):
        np.testing.assert_allclose(flatten(got)[path], factor * flatten(want)[path], rtol=1e-6)
    decayed = -0.1 * 10 * (grads["head"]["kernel"] + 0.2 * PARAMS["head"]["kernel"])
    np.testing.assert_allclose(got["head"]["kernel"], decayed, rtol=1e-6)


def test_layer_decay_of_scanned_blocks_is_that_of_single_ones():
    options = {"total_steps": 9, "lr": 1.0, "schedule": "constant", "layer_decay": 0.5}
    optimizer = make_optimizer(base=sgd(momentum=0.0), **options)
    block = {"LayerNorm_0": {"scale": jnp.ones((3, 2))}}
    params = {"cls": jnp.ones((1, 1, 2)), "Transformer": {"encoderblock": block}}
    update, _ = optimizer.tx.update(params, optimizer.tx.init(params), params)
    np.testing.assert_array_equal(update["cls"], jnp.full((1, 1, 2), -(0.5**4)))
    scale = update["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"]
    np.testing.assert_array_equal(scale, -np.array([[0.125] * 2, [0.25] * 2, [0.5] * 2]))


ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def shrink(**options):
    """What each parameter loses in update 1 of 4 without a gradient, relative to its size."""
    options = {"lr": 0.1, "total_steps": 4, "weight_decay": 0.02, "schedule": "linear"} | options
    optimizer = make_optimizer(base=sgd(momentum=0.0), **options)
    state = optimizer.tx.init(PARAMS)
    for _ in range(2):
        update, state = optimizer.tx.update(ZEROS, state, PARAMS)
    loss = jax.tree.map(lambda u, p: float((-u / p).ravel()[0]), update, PARAMS)
    return {path: pytest.approx(value, rel=1e-5) for path, value in flatten(loss).items()}


def test_weight_decay_times_the_learning_rate_or_the_schedule_alone():
    assert shrink()["head/kernel"] == 0.02 * 0.1 * 0.75
    by_schedule = shrink(weight_decay_times="schedule")
    assert by_schedule["head/kernel"] == 0.02 * 0.75
    # Of a decay of 1e-4 in one convention and 0.1 in the other, at a learning rate of 1e-3.
    same = shrink(lr=1e-3, weight_decay=0.1)["head/kernel"]
    assert (
        same
        == shrink(lr=1e-3, weight_decay=1e-4, weight_decay_times="schedule")["head/kernel"].expected
    )


def test_multipliers_do_not_change_decay_that_goes_by_the_schedule():
    options = {"lr_multipliers": (("head/.*", 10.0),)}
    assert shrink(**options)["head/kernel"] == 10 * 0.02 * 0.1 * 0.75
    by_schedule = shrink(**options, weight_decay_times="schedule")
    assert by_schedule["head/kernel"] == 0.02 * 0.75


def test_expressions_choose_what_decays():
    assert {p for p, x in shrink().items() if x != 0.0} == {"head/kernel", "embedding/kernel"}
    chosen = shrink(weight_decay_params=("head/.*",))
    assert {p for p, x in chosen.items() if x != 0.0} == {"head/kernel", "head/bias"}


def test_single_parameters_can_have_a_schedule_of_their_own():
    own = {"schedule": "constant", "warmup_percent": 50}
    options = {"total_steps": 4, "lr": 0.1, "schedule": "linear", "warmup_steps": 0}
    optimizer = make_optimizer(
        base=sgd(momentum=0.0), **options, schedules=(("head/.*", own), (".*bias", {}))
    )
    ones, state, found = jax.tree.map(jnp.ones_like, PARAMS), optimizer.tx.init(PARAMS), []
    for _ in range(4):
        update, state = optimizer.tx.update(ones, state, PARAMS)
        found.append({path: -float(x.ravel()[0]) for path, x in flatten(update).items()})
    np.testing.assert_allclose([u["head/kernel"] for u in found], [0, 0.05, 0.1, 0.1])
    for path in ("embedding/kernel", "embedding/bias"):
        np.testing.assert_allclose([u[path] for u in found], [0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(("scaling", "want"), [("linear", 0.4), ("sqrt", 0.2), ("none", 0.1)])
def test_learning_rates_are_scaled_to_the_batch(scaling, want):
    options = {} if scaling == "none" else {"base_batch_size": 512}
    optimizer = make_optimizer(
        base=sgd(),
        total_steps=9,
        clock=Clock(2048, lambda: 0),
        lr=0.1,
        lr_scaling=scaling,
        **options,
    )
    assert optimizer.peak_lr == pytest.approx(want)
    assert float(optimizer.schedule(0)) == pytest.approx(want)


def test_rules_that_do_not_fit_the_parameters_are_refused_before_there_is_a_state():
    optimizer = make_optimizer(base=sgd(), total_steps=9, lr=0.1, freeze=("haed/.*",))
    with pytest.raises(UserError, match=r"optimizer\.freeze: 'haed/"):
        jax.eval_shape(optimizer.tx.init, PARAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay_params": ("hed/.*",)}, r"weight_decay_params: 'hed/.*head/bias"),
        ({"weight_decay_params": ("(",)}, r"weight_decay_params: '\(' is not a regular expression"),
        ({"schedules": (("hed/.*", {}),)}, r"schedules: 'hed/.*' matches no parameter"),
        ({"schedules": ((".*", {"warmup": 3}),)}, r"schedules\.warmup; did you mean"),
        ({"schedules": ((".*", {"end_lr": "x"}),)}, r"schedules\.end_lr='x' is a str"),
        ({"lr_scaling": "linear"}, r"lr_scaling='linear' with optimizer\.base_batch_size=None"),
        ({"base_batch_size": 8}, r"base_batch_size=8: expected optimizer\.lr_scaling"),
        (
            {"weight_decay_times": "schedule", "weight_decay": 0.1, "lr": 0.0},
            r"weight_decay_times='schedule': expected optimizer\.lr above 0",
        ),
        (
            {"weight_decay_times": "schedule", "weight_decay": 0.1, "base": lamb()},
            r"weight_decay_times='schedule': this optimizer scales the decay",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=rf"optimizer\.{message}"):
        make_optimizer(**({"base": sgd(), "total_steps": 9, "lr": 0.1} | options)).tx.init(PARAMS)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"weight_decay": -0.1}, {"accum_steps": 0}, {"grad_clip_norm": 0.0}],
)
def test_values_out_of_range_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=f"optimizer.{key}="):
        make_optimizer(base=sgd(), total_steps=9, **({"lr": 0.1} | wrong))


def test_an_exponential_schedule_changes_by_the_same_factor_up_or_down():
    up = make_schedule(lr=1e-6, total_steps=60, schedule="exponential", end_lr=1.0)
    down = make_schedule(
        lr=1.0, total_steps=70, schedule="exponential", end_lr=1e-6, warmup_steps=10
    )
    assert [float(up(t)) for t in (0, 10, 60)] == pytest.approx([1e-6, 1e-5, 1.0], rel=1e-4)
    assert [float(down(t)) for t in (5, 10, 20, 70)] == pytest.approx([0.5, 1, 0.1, 1e-6], rel=1e-4)
    with pytest.raises(UserError, match=r"end_lr=0.0: expected both above 0"):
        make_schedule(lr=1.0, total_steps=10, schedule="exponential")


def test_weight_decay_follows_a_cosine_to_its_end():
    """Without gradients parameters shrink by what decays alone, in float64."""
    optimizer = make_optimizer(
        base=sgd(momentum=0.0),
        total_steps=4,
        lr=0.5,
        schedule="constant",
        weight_decay=0.1,
        weight_decay_end=0.4,
    )
    params = {"a": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}}
    state, want = optimizer.tx.init(params), 1.0
    for step in range(4):
        updates, state = optimizer.tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        decay = 0.4 + (0.1 - 0.4) * 0.5 * (1 + np.cos(np.pi * step / 4))
        want *= 1 - 0.5 * decay
        np.testing.assert_allclose(params["a"]["kernel"], want, rtol=1e-6)
    np.testing.assert_array_equal(params["a"]["bias"], 1)


def test_parameters_that_are_trained_later_stay_until_then():
    clock = Clock(batch_size=10, epoch_examples=lambda: 20)
    optimizer = make_optimizer(
        base=adamw(),
        total_steps=4,
        clock=clock,
        lr=0.1,
        schedule="constant",
        weight_decay=0.1,
        train_after=(("head/.*", {"epochs": 1}),),
    )
    params = {name: {"kernel": jnp.ones(3)} for name in ("body", "head")}
    state, found = optimizer.tx.init(params), []
    for _ in range(4):
        updates, state = optimizer.tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        found.append({name: bool(np.any(x["kernel"])) for name, x in updates.items()})
    assert [f["body"] for f in found] == [True] * 4
    assert [f["head"] for f in found] == [False, False, True, True]


def test_groups_of_gradients_are_clipped_each_by_its_own_norm():
    optimizer = make_optimizer(
        base=sgd(momentum=0.0),
        total_steps=1,
        lr=1.0,
        schedule="constant",
        grad_clip_norm=5.0,
        grad_clip_groups=("head/.*", "probe/.*"),
    )
    grads = {
        "body": {"kernel": jnp.asarray([3.0, 4.0])},
        "embedding": {"kernel": jnp.asarray([12.0])},
        "head": {"kernel": jnp.asarray([30.0, 40.0])},
        "probe": {"kernel": jnp.asarray([0.5])},
    }
    updates, _ = optimizer.tx.update(grads, optimizer.tx.init(grads), grads)
    got = {name: -np.asarray(x["kernel"]) for name, x in updates.items()}
    np.testing.assert_allclose(got["body"], np.array([3, 4]) * 5 / 13, rtol=1e-6)
    np.testing.assert_allclose(got["embedding"], 12 * 5 / 13, rtol=1e-6)
    np.testing.assert_allclose(got["head"], [3, 4], rtol=1e-6)
    np.testing.assert_allclose(got["probe"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_groups_that_leave_no_other_gradients_are_clipped(sharded):
    optimizer = make_optimizer(
        base=sgd(momentum=0.0),
        total_steps=4,
        lr=1.0,
        schedule="constant",
        grad_clip_norm=5.0,
        grad_clip_groups=("head/.*", "body/.*"),
        sharded=sharded,
    )
    grads = {name: {"kernel": jnp.asarray([30.0, 40.0])} for name in ("body", "head")}
    updates, _ = optimizer.tx.update(grads, optimizer.tx.init(grads), grads)
    for name in grads:
        np.testing.assert_allclose(updates[name]["kernel"], [-3, -4], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay_end": -1.0}, r"optimizer\.weight_decay_end=-1\.0"),
        ({"grad_clip_groups": ("head/.*",)}, r"expected optimizer\.grad_clip_norm too"),
        ({"train_after": (("head/.*", {}),)}, r"train_after: 'head/\.\*' has \{\}; expected one"),
        ({"train_after": (("head/.*", {"weeks": 1}),)}, "expected one of steps"),
        ({"train_after": (("head/.*", {"steps": -1}),)}, "steps=-1: expected 0 or more"),
        ({"train_after": (("head/.*", {"steps": 4}),)}, "steps=4 is not shorter than the 4 steps"),
        ({"base": lamb(), "weight_decay_end": 0.1}, "scales the decay with its update"),
    ],
)
def test_parts_of_self_supervised_recipes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(**({"base": adamw(), "total_steps": 4, "lr": 0.1} | options))
