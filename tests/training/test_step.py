# SPDX-License-Identifier: Apache-2.0
"""The train step against closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoint.state import TrainState
from vit_jax.models.variants import make_vit
from vit_jax.objectives.base import Objective
from vit_jax.objectives.contrastive_losses import softmax_loss
from vit_jax.objectives.supervised import make_supervised
from vit_jax.optim.base_optimizers import schedule_free_adamw, sgd
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.sam import Sam
from vit_jax.training.step import couple_gradients, init_rng, init_state, step_rng, train_step
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Quadratic(Objective):
    """Loss |w - mean(target)|^2 / 2, whose gradient is known."""

    noise: float = 0.0

    def init(self, rng, batch):
        return {"layer": {"kernel": jnp.full((2,), 4.0), "bias": jnp.full((2,), 4.0)}}

    def augment(self, batch, rng):
        return batch

    def loss(self, params, batch, rng):
        target = batch["target"] + self.noise * jax.random.normal(rng, batch["target"].shape)
        differences = jax.tree.map(lambda w: w - target[:, None], params)
        loss = sum(jnp.square(d).sum(-1).mean() / 2 for d in jax.tree.leaves(differences))
        return loss, {"loss": loss}

    def predict(self, params, batch):
        return {}


@dataclasses.dataclass(frozen=True)
class Valley(Quadratic):
    """One parameter whose loss is steeper in its second value."""

    def init(self, rng, batch):
        return {"layer": {"kernel": jnp.full((2,), 4.0)}}

    def loss(self, params, batch, rng):
        difference = params["layer"]["kernel"] - batch["target"][:, None]
        loss = (jnp.square(difference) * jnp.array([1.0, 3.0])).sum(-1).mean() / 2
        return loss, {"loss": loss}


BATCH = {"target": jnp.arange(4.0)}


def take_step(*, objective=None, ema_decay=None, seed=0, step=0, **options):
    objective = objective or Quadratic()
    options = {"lr": 0.5, "total_steps": 10, "schedule": "constant"} | options
    optimizer = make_optimizer(base=sgd(momentum=0.0), **options)
    state = init_state(
        jax.random.key(0), BATCH, objective=objective, tx=optimizer.tx, ema=ema_decay is not None
    )
    state = state.replace(step=jnp.int32(step))
    return train_step(
        state, BATCH, objective=objective, optimizer=optimizer, ema_decay=ema_decay, seed=seed
    )


def test_plain_step_goes_down_the_gradient():
    state, metrics = take_step()
    np.testing.assert_allclose(state.params["layer"]["kernel"], 4 - 0.5 * (4 - 1.5))
    assert int(state.step) == 1
    assert float(metrics["lr"]) == 0.5
    assert float(metrics["grad_norm"]) == pytest.approx(2 * 2.5)


def test_clipping_scales_to_the_global_norm():
    state, metrics = take_step(grad_clip_norm=1.0)
    step = 4 - np.asarray(jax.tree.leaves(state.params))
    assert np.sqrt(np.square(step).sum()) == pytest.approx(0.5)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)  # as it was before clipping


def test_weight_decay_shrinks_kernels_by_lr_times_decay_and_nothing_else():
    plain, _ = take_step()
    decayed, _ = take_step(weight_decay=0.1)
    difference = jax.tree.map(lambda a, b: a - b, plain.params, decayed.params)["layer"]
    np.testing.assert_allclose(difference["kernel"], 0.5 * 0.1 * 4, rtol=1e-5)
    np.testing.assert_array_equal(difference["bias"], 0)


@pytest.mark.parametrize("accum_steps", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole(accum_steps):
    whole, metrics = take_step()
    parts, part_metrics = take_step(accum_steps=accum_steps)
    np.testing.assert_allclose(parts.params["layer"]["bias"], whole.params["layer"]["bias"])
    assert float(part_metrics["loss"]) == pytest.approx(float(metrics["loss"]))


def test_micro_batches_draw_different_random_numbers():
    # Were the noise of both halves the same, its mean over the batch would have that of one half.
    one, _ = take_step(objective=Quadratic(noise=1.0), accum_steps=4)
    two, _ = take_step(objective=Quadratic(noise=1.0), accum_steps=2)
    assert not np.allclose(one.params["layer"]["bias"], two.params["layer"]["bias"])


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_sam_follows_the_gradient_a_step_uphill(alpha, accum_steps):
    sam = {"rho": 0.5, "alpha": alpha}
    state, metrics = take_step(objective=Valley(), sam=sam, accum_steps=accum_steps)
    w = np.array([4.0, 4.0])
    curvature = np.array([1.0, 3.0])
    plain = curvature * (w - 1.5)
    perturbed = curvature * (w + 0.5 * plain / np.linalg.norm(plain) - 1.5)
    orthogonal = plain - (plain @ perturbed) / (perturbed @ perturbed) * perturbed
    gradient = perturbed - alpha * orthogonal
    np.testing.assert_allclose(state.params["layer"]["kernel"], w - 0.5 * gradient, rtol=1e-5)
    assert float(metrics["loss"]) == pytest.approx((curvature * ((w - 1.5) ** 2 + 1.25)).sum() / 2)


def test_the_radius_of_sam_follows_the_learning_rate():
    sam = Sam(rho=0.6, rho_min=0.1)
    np.testing.assert_allclose([sam.radius(x) for x in (1.0, 0.5, 0.0)], [0.6, 0.35, 0.1])
    # One step in the middle of the schedule, where the rate is half of its peak.
    options = {"schedule": "linear", "lr": 0.5, "total_steps": 2}
    half, _ = take_step(objective=Valley(), sam={"rho": 0.6, "rho_min": 0.1}, step=1, **options)
    fixed, _ = take_step(objective=Valley(), sam={"rho": 0.35}, step=1, **options)
    np.testing.assert_allclose(half.params["layer"]["kernel"], fixed.params["layer"]["kernel"])


@pytest.mark.parametrize(
    ("sam", "message"),
    [
        ({"rho": 0.0}, r"optimizer\.sam\.rho=0\.0: expected above 0"),
        ({"rho": 0.1, "rho_min": 0.2}, r"optimizer\.sam\.rho_min=0\.2: expected 0 to rho=0\.1"),
        ({"rho": 0.1, "alpha": -1.0}, r"optimizer\.sam\.alpha=-1\.0"),
        ({"rho": 0.1, "alfa": 1.0}, r"unknown config key optimizer\.sam\.alfa; did you mean"),
        ({}, r"optimizer\.sam\.rho is missing"),
    ],
)
def test_values_of_sam_out_of_range_are_refused(sam, message):
    with pytest.raises(UserError, match=message):
        take_step(sam=sam)


@pytest.mark.parametrize("base", [sgd(), schedule_free_adamw()])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_average_of_parameters_is_warmed_up_with_any_optimizer(base, decay):
    optimizer = make_optimizer(base=base, lr=0.1, total_steps=9, schedule="constant")
    state = init_state(jax.random.key(0), BATCH, objective=Quadratic(), tx=optimizer.tx, ema=True)
    average = np.full(2, 4.0)
    for step in range(3):
        options = {"objective": Quadratic(), "optimizer": optimizer, "seed": 0}
        state, _ = train_step(state, BATCH, ema_decay=decay, **options)
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * state.params["layer"]["bias"]
        np.testing.assert_allclose(state.ema_params["layer"]["bias"], average, rtol=1e-6)


def test_average_follows_quickly_at_first():
    state, _ = take_step(ema_decay=0.999)
    new = state.params["layer"]["bias"]
    np.testing.assert_allclose(state.ema_params["layer"]["bias"], 0.1 * 4 + 0.9 * new, rtol=1e-6)
    assert take_step()[0].ema_params is None


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_frozen_parameters_and_their_average_stay_and_count_in_no_gradient(accum_steps):
    options = {"freeze": ("layer/kernel",), "weight_decay": 0.1, "grad_clip_norm": 1.0}
    state, metrics = take_step(accum_steps=accum_steps, ema_decay=0.999, **options)
    np.testing.assert_array_equal(state.params["layer"]["kernel"], [4, 4])
    np.testing.assert_array_equal(state.ema_params["layer"]["kernel"], [4, 4])
    assert float(metrics["grad_norm"]) == pytest.approx(2**0.5 * 2.5)
    step = 4 - np.asarray(state.params["layer"]["bias"])
    assert np.sqrt(np.square(step).sum()) == pytest.approx(0.5)  # clipped without the kernel
    norm = np.sqrt(np.square(np.concatenate(list(state.params["layer"].values()))).sum())
    assert float(metrics["param_norm"]) == pytest.approx(norm)


def test_nothing_is_differentiated_for_the_frozen_start_of_a_model():
    model = make_vit(
        num_classes=5, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=128
    )
    objective = make_supervised(model=model, num_classes=5)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }

    def flops(*freeze: str) -> float:
        optimizer = make_optimizer(base=sgd(), total_steps=9, lr=0.1, freeze=freeze)

        def step(batch):
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
            rng = jax.random.key(0)
            return init_state(rng, zeros, objective=objective, tx=optimizer.tx, ema=False)

        def update(state: TrainState, batch):
            options = {"objective": objective, "optimizer": optimizer}
            return train_step(state, batch, **options, ema_decay=None, seed=0)

        state = jax.eval_shape(step, batch)
        return jax.jit(update).lower(state, batch).cost_analysis()["flops"]

    params = jax.eval_shape(lambda b: objective.init(jax.random.key(0), b), batch)
    rngs = jax.random.key(0)
    augmented = jax.eval_shape(objective.augment, batch, rngs)
    forward = jax.jit(objective.loss).lower(params, augmented, rngs).cost_analysis()["flops"]
    everything, block, head = (
        flops(),
        flops("(?!Transformer/encoder(block_1|_norm)|head).*"),
        flops("(?!head/).*"),
    )
    assert everything > 2.5 * forward
    assert block == pytest.approx((everything + forward) / 2, rel=0.1)
    assert head < 1.1 * forward


def test_random_numbers_depend_on_seed_and_step_only():
    keys = [step_rng(0, 0), step_rng(0, 1), step_rng(1, 0), init_rng(0)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 4
    noisy = Quadratic(noise=1.0)
    first, _ = take_step(objective=noisy)
    again, _ = take_step(objective=noisy)
    other, _ = take_step(objective=noisy, seed=1)
    np.testing.assert_array_equal(first.params["layer"]["bias"], again.params["layer"]["bias"])
    assert not np.allclose(first.params["layer"]["bias"], other.params["layer"]["bias"])


def draw_towers():
    """Parameters of two layers, and a batch of pairs for them."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(6, 4)), "b": rng.normal(size=(5, 4)), "t": np.log(8.0)}
    batch = {"x": rng.normal(size=(12, 6)), "y": rng.normal(size=(12, 5))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


def encode_pairs(params, batch, rng, *, dropout):
    rows = []
    for key, kernel, x in zip(jax.random.split(rng), "ab", "xy", strict=True):
        kept = jax.random.bernoulli(key, 1 - dropout, batch[x].shape)
        z = jnp.tanh((batch[x] * kept) @ params[kernel]) + 0.1
        rows.append(z / jnp.linalg.norm(z, axis=1, keepdims=True))
    return tuple(rows)


def combine_pairs(params, encoded):
    loss, metrics = softmax_loss(*encoded, params["t"])
    return loss, {"loss": loss, **metrics}


@pytest.mark.parametrize(("steps", "dropout"), [(3, 0.0), (2, 0.5)])
def test_coupled_micro_batches_give_the_gradient_of_one_loss_of_the_batch(steps, dropout):
    params, batch = draw_towers()
    encode = functools.partial(encode_pairs, dropout=dropout)
    rng = jax.random.key(3)
    places = [np.arange(i, 12, steps) for i in range(steps)]

    def whole(params):
        """The same without a scan and without recomputation: micro-batch i has key i."""
        parts = [
            encode(params, {k: x[rows] for k, x in batch.items()}, jax.random.fold_in(rng, i))
            for i, rows in enumerate(places)
        ]
        order = np.argsort(np.concatenate(places))
        return combine_pairs(params, jax.tree.map(lambda *z: jnp.concatenate(z)[order], *parts))

    want, want_metrics = jax.jit(jax.grad(whole, has_aux=True))(params)
    shapes = []
    got, metrics = jax.jit(
        lambda params: couple_gradients(
            encode,
            combine_pairs,
            params,
            batch,
            rng,
            steps=steps,
            split=lambda x: shapes.append(x.shape) or x,
        )
    )(params)
    assert set(shapes) == {(steps, 12 // steps, 6), (steps, 12 // steps, 5)}
    assert jax.device_get(metrics) == pytest.approx(jax.tree.map(float, want_metrics), rel=1e-6)
    for name, grad in got.items():
        np.testing.assert_allclose(grad, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    if not dropout:
        large = jax.grad(lambda p: combine_pairs(p, encode(p, batch, rng))[0])
        large = jax.jit(large)(params)
        np.testing.assert_allclose(got["a"], large["a"], rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Follower(Quadratic):
    """Copies the average into `copy` after the first update."""

    objective_params = ("copy",)
    frozen = ("copy/.*",)

    def init(self, rng, batch):
        return super().init(rng, batch) | {"copy": jax.tree.map(jnp.zeros_like, PART)}

    def loss(self, params, batch, rng):
        return super().loss({"layer": params["layer"]}, batch, rng)

    def follow_average(self, params, average, before, step):
        due = (before < 1) & (step >= 1)
        copy = jax.tree.map(lambda a, x: jnp.where(due, a, x), average["layer"], params["copy"])
        return params | {"copy": copy}, average | {"copy": copy}


PART = {"kernel": jnp.full((2,), 4.0), "bias": jnp.full((2,), 4.0)}


@pytest.mark.parametrize("max_loss", [None, 0.0], ids=["good", "skipped"])
def test_a_step_that_is_skipped_copies_the_average_too(max_loss):
    objective = Follower()
    optimizer = make_optimizer(
        base=sgd(momentum=0.0), lr=0.5, total_steps=10, schedule="constant", freeze=("copy/.*",)
    )
    start = init_state(jax.random.key(0), BATCH, objective=objective, tx=optimizer.tx, ema=True)
    options = {"objective": objective, "optimizer": optimizer, "ema_decay": 0.5, "seed": 0}
    state, _ = train_step(start, BATCH, on_divergence="skip", max_loss=max_loss, **options)
    same = np.array_equal(state.params["layer"]["kernel"], start.params["layer"]["kernel"])
    assert same == (max_loss is not None)
    assert int(state.step) == 1
    assert state.ema_params is not None
    for tree in (state.params, state.ema_params):
        np.testing.assert_array_equal(tree["copy"]["kernel"], state.ema_params["layer"]["kernel"])
