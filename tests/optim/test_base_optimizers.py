# SPDX-License-Identifier: Apache-2.0
"""Every optimizer against a few steps of it in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import tiny_config
from vit_jax.optim import base_optimizers
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

STEPS, LR = 4, 0.1


def gradients(shape, scale=1.0):
    rng = np.random.default_rng(0)
    return [scale * rng.normal(size=shape).astype(np.float32) for _ in range(STEPS)]


def follow(base, params, grads, **options):
    """Parameters after each of some updates with given gradients."""
    options = {"schedule": "constant", "lr": LR, "total_steps": STEPS} | options
    tx = make_optimizer(base=base, **options).tx
    state, found = tx.init(params), []
    for grad in grads:
        update, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, update)
        found.append(params)
    return found, state


def adam(grads, b1=0.9, b2=0.999, eps=1e-8):
    m, v = 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def test_adafactor_keeps_means_over_rows_and_columns():
    grads, w = gradients((3, 4)), np.ones((3, 4), np.float32)
    options = {"min_dim_size_to_factor": 3, "b2_cap": 0.5, "momentum_dtype": "float32"}
    base = base_optimizers.adafactor(**options)
    got, _ = follow(base, {"kernel": w}, [{"kernel": g} for g in grads])
    rows, cols, m = np.zeros(3), np.zeros(4), np.zeros((3, 4))
    for t, g in enumerate(grads, 1):
        b2 = min(1 - t**-0.8, 0.5)
        rows = b2 * rows + (1 - b2) * (g**2).mean(1)
        cols = b2 * cols + (1 - b2) * (g**2).mean(0)
        m = 0.9 * m + 0.1 * g / np.sqrt(np.outer(rows, cols) / rows.mean())
        w = w - LR * m
        np.testing.assert_allclose(got[t - 1]["kernel"], w, rtol=1e-4)


def test_adafactor_without_factors_is_clipped_by_block():
    grads = gradients((4,))
    base = base_optimizers.adafactor(momentum=None, clipping_threshold=0.5)
    got, _ = follow(base, {"bias": np.zeros(4, np.float32)}, [{"bias": g} for g in grads])
    w, v = np.zeros(4), np.zeros(4)
    for t, g in enumerate(grads, 1):
        b2 = min(1 - t**-0.8, 0.999)
        v = b2 * v + (1 - b2) * g**2
        update = g / np.sqrt(v)
        w = w - LR * update / max(1, np.sqrt((update**2).mean()) / 0.5)
        np.testing.assert_allclose(got[t - 1]["bias"], w, rtol=1e-4)


def test_adafactor_has_momentum_in_bfloat16():
    state = base_optimizers.adafactor().tx.init({"kernel": jnp.ones((40, 50))})
    assert state[1].ema["kernel"].dtype == jnp.bfloat16
    assert {x.shape for x in (state[0].v_row["kernel"], state[0].v_col["kernel"])} == {(40,), (50,)}


@pytest.mark.parametrize("trust_ratio", ["all", "decayed"])
def test_lamb_makes_steps_as_long_as_the_parameter(trust_ratio):
    start = {"kernel": np.array([3.0, 4.0], np.float32), "bias": np.array([1.0], np.float32)}
    grads = [
        {"kernel": a, "bias": b} for a, b in zip(gradients((2,)), gradients((1,)), strict=True)
    ]
    got, _ = follow(base_optimizers.lamb(trust_ratio=trust_ratio), start, grads, weight_decay=0.3)
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        w = start[name].astype(np.float64)
        for t, d in enumerate(adam([g[name] for g in grads], eps=1e-6)):
            update = d + decay * w
            scaled = name == "kernel" or trust_ratio == "all"
            ratio = np.linalg.norm(w) / np.linalg.norm(update) if scaled else 1
            w = w - LR * ratio * update
            np.testing.assert_allclose(got[t][name], w, rtol=1e-4)


def test_lars_scales_gradients_by_the_parameter_before_the_momentum():
    start = {"kernel": np.array([3.0, 4.0], np.float32), "bias": np.array([1.0], np.float32)}
    grads = [
        {"kernel": a, "bias": b} for a, b in zip(gradients((2,)), gradients((1,)), strict=True)
    ]
    got, _ = follow(base_optimizers.lars(trust_coefficient=0.1), start, grads, weight_decay=0.3)
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        w, trace = start[name].astype(np.float64), 0.0
        for t, g in enumerate(grads):
            update = g[name] + decay * w
            ratio = 0.1 * np.linalg.norm(w) / np.linalg.norm(update) if name == "kernel" else 1
            trace = 0.9 * trace + ratio * update
            w = w - LR * trace
            np.testing.assert_allclose(got[t][name], w, rtol=1e-4)


@pytest.mark.parametrize("times", ["lr", "schedule"])
def test_multipliers_scale_what_lamb_has_made_as_long_as_the_parameter(times):
    params = {"kernel": np.array([3.0, 4.0], np.float32)}
    options = {"lr_multipliers": (("kernel", 0.5),), "weight_decay_times": times}
    (after, *_), _ = follow(base_optimizers.lamb(), params, [params], **options)
    assert np.linalg.norm(after["kernel"] - params["kernel"]) == pytest.approx(0.5 * LR * 5)


def test_lamb_treats_scanned_blocks_one_by_one():
    kernels = np.stack([np.ones((2, 2)), 5 * np.ones((2, 2))]).astype(np.float32)
    grads = gradients((2, 2, 2))
    path = "Transformer", "encoderblock"

    def tree(value, name):
        return {path[0]: {name: {"kernel": value}}}

    stacked, _ = follow(
        base_optimizers.lamb(), tree(kernels, path[1]), [tree(g, path[1]) for g in grads]
    )
    for i in range(2):
        name = f"{path[1]}_{i}"
        single, _ = follow(
            base_optimizers.lamb(), tree(kernels[i], name), [tree(g[i], name) for g in grads]
        )
        for a, b in zip(stacked, single, strict=True):
            want = b[path[0]][name]["kernel"]
            np.testing.assert_allclose(a[path[0]][path[1]]["kernel"][i], want, rtol=1e-5)


def test_lion_follows_the_sign_of_its_momentum():
    grads = gradients((3,))
    got, state = follow(
        base_optimizers.lion(mu_dtype="bfloat16"),
        {"kernel": np.ones(3, np.float32)},
        [{"kernel": g} for g in grads],
        weight_decay=0.3,
    )
    assert {x.dtype for p, x in flatten(state).items() if "mu/" in p} == {jnp.dtype("bfloat16")}
    w, m = np.ones(3), np.zeros(3)
    for t, g in enumerate(grads):
        w, m = w - LR * (np.sign(0.9 * m + 0.1 * g) + 0.3 * w), 0.99 * m + 0.01 * g
        np.testing.assert_allclose(got[t]["kernel"], w, rtol=1e-5)


def newton_schulz(x, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x


ATTENTION = "MultiHeadDotProductAttention_0"


# Shape of a kernel, and of the matrix that it is.
@pytest.mark.parametrize(
    ("path", "shape", "matrix"),
    [
        (("MlpBlock_0", "Dense_0", "kernel"), (4, 6), (4, 6)),
        ((ATTENTION, "query", "kernel"), (4, 2, 3), (4, 6)),
        ((ATTENTION, "out", "kernel"), (2, 3, 4), (6, 4)),
        (("embedding", "kernel"), (2, 2, 3, 4), None),
        (("head", "kernel"), (4, 5), None),
    ],
    ids=lambda x: "/".join(x) if x and isinstance(x[0], str) else "",
)
def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam(path, shape, matrix):
    def tree(x):
        inner = x
        for name in reversed(path):
            inner = {name: inner}
        # With a matrix beside it, without which Muon is refused.
        return inner | {"token_mixing": {"Dense_0": {"kernel": np.eye(2, dtype=np.float32)}}}

    grads = gradients(shape)
    got, _ = follow(base_optimizers.muon(nesterov=False), tree(np.zeros(shape)), map(tree, grads))
    w, m = np.zeros(shape), np.zeros(shape)
    for t, (g, d) in enumerate(zip(grads, adam(grads), strict=True), 1):
        if matrix is not None:
            m = 0.95 * m + 0.05 * g
            d = newton_schulz((m / (1 - 0.95**t)).reshape(matrix)).reshape(shape)
            d = d * 0.2 * np.sqrt(max(matrix))
        w = w - LR * d
        np.testing.assert_allclose(flatten(got[t - 1])["/".join(path)], w, rtol=2e-3, atol=1e-5)


def test_muon_treats_scanned_blocks_one_by_one():
    grad = gradients((3, 4, 2, 5))[0]

    def update(x):
        tree = {ATTENTION: {"key": {"kernel": x}}}
        return follow(base_optimizers.muon(), tree, [tree])[0][0][ATTENTION]["key"]["kernel"]

    np.testing.assert_allclose(update(grad), [update(x) for x in grad], rtol=1e-4, atol=1e-6)


def test_muon_without_matrices_is_refused():
    with pytest.raises(UserError, match="'muon': none of the trained parameters is a matrix"):
        follow(base_optimizers.muon(), {"head": {"kernel": jnp.ones((2, 2))}}, [])


def test_schedule_free_parameters_are_the_average_of_the_iterates():
    start = np.array([2.0, -1.0], np.float32)
    optimizer = make_optimizer(
        base=base_optimizers.schedule_free_adamw(b2=0.9),
        lr=LR,
        total_steps=STEPS,
        schedule="constant",
        warmup_steps=2,
        weight_decay=0.3,
    )
    params = {"kernel": start}
    state = optimizer.tx.init(params)
    x, z, v, total = start, start, 0.0, 0.0
    for t in range(STEPS):
        point = optimizer.gradient_point(state, params)["kernel"]
        y = 0.9 * x + 0.1 * z
        np.testing.assert_allclose(point, y, rtol=1e-5)
        g = 2 * y  # of a parabola
        updates, state = optimizer.tx.update({"kernel": 2 * point}, state, params)
        params = optax.apply_updates(params, updates)
        rate = LR * min(t / 2, 1)
        v = 0.9 * v + 0.1 * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-8) + 0.3 * y)
        total += rate**2
        share = rate**2 / total if total else 0
        x = (1 - share) * x + share * z
        np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "constant", "cooldown_steps": 2}, {"schedule": "linear"}]
)
def test_schedule_free_needs_a_constant_schedule(options):
    with pytest.raises(UserError, match=r"optimizer\.schedule='.*': a schedule-free optimizer"):
        make_optimizer(base=base_optimizers.schedule_free_adamw(), lr=LR, total_steps=9, **options)


def test_multipliers_scale_schedule_free_iterates():
    params = {"head": {"kernel": jnp.ones(2)}}
    options = {"lr_multipliers": (("head/.*", 5.0),)}
    _, state = follow(base_optimizers.schedule_free_adamw(), params, [params], **options)
    np.testing.assert_allclose(state.z["head"]["kernel"], 1 - 5 * LR, rtol=1e-4)


EVERY = {
    "adafactor": {"min_dim_size_to_factor": 8},
    "lamb": {},
    "lars": {"trust_coefficient": 0.01},
    "lion": {"lr": 1e-3},
    "muon": {},
    "schedule_free_adamw": {"schedule": "constant"},
    "sgd": {"sam": {"rho": 0.05, "alpha": 0.1}},
}


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def build(data_dir, name, *, mesh):
    optimizer = {"name": name, "lr": 1e-2, "weight_decay": 0.1} | EVERY[name]
    sizes = {"model__hidden_size": 32, "model__num_layers": 1}
    config = tiny_config(data_dir, optimizer=optimizer, evals={}, mesh=mesh, **sizes)
    return Experiment.from_config(config, devices=jax.devices()[: 8 if mesh else 1])


# Of the others only the state is looked at: compiling takes long.
@pytest.mark.parametrize(
    "name",
    [n if n == "adafactor" else pytest.param(n, marks=pytest.mark.slow) for n in EVERY],
)
def test_every_optimizer_gives_the_same_losses_on_a_mesh(name, data_dir):
    def losses(mesh):
        experiment = build(data_dir, name, mesh=mesh)
        state, batches, found = experiment.init_state(), experiment.train_batches(0), []
        for _ in range(4):
            state, metrics = experiment.train_step(state, next(batches))
            found.append(float(metrics["loss"]))
        return found

    np.testing.assert_allclose(losses(MESH), losses({}), rtol=2e-4)


@pytest.mark.parametrize("name", EVERY)
def test_state_as_large_as_its_parameter_lies_where_that_does(name, data_dir):
    state = build(data_dir, name, mesh=MESH).abstract_state
    params, checked = flatten(state.params), 0
    for path, leaf in flatten(state.opt_state).items():
        owner = next((param for end, param in params.items() if path.endswith(f"/{end}")), None)
        if owner is not None and leaf.shape == owner.shape:
            assert leaf.sharding.is_equivalent_to(owner.sharding, leaf.ndim), path
            checked += 1
        else:
            assert leaf.size <= 32 * 4, path
            assert leaf.sharding.is_fully_replicated, path
    assert checked >= len(params)


def test_rows_and_columns_of_adafactor_are_copied_to_all_devices(data_dir):
    optimizer = {"name": "adafactor", "lr": 1e-2, "min_dim_size_to_factor": 4}
    config = tiny_config(data_dir, optimizer=optimizer, evals={}, mesh=MESH)
    state = Experiment.from_config(config).abstract_state
    rows = {p: x for p, x in flatten(state.opt_state).items() if "/v_row/" in p or "/v_col/" in p}
    assert any("query/kernel" in path and x.ndim == 2 for path, x in rows.items())
    assert all(x.sharding.is_fully_replicated for x in rows.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"b1": 1.0}, r"optimizer\.b1=1\.0: expected 0 <= value < 1"),
        ("sgd", {"momentum": -0.1}, r"optimizer\.momentum=-0\.1"),
        ("adafactor", {"b2_cap": 1.0}, r"optimizer\.b2_cap=1\.0"),
        ("adafactor", {"decay_rate": 0.0}, r"optimizer\.decay_rate=0\.0"),
        ("adafactor", {"clipping_threshold": 0.0}, r"optimizer\.clipping_threshold=0\.0"),
        ("lars", {"momentum": 1.0}, r"optimizer\.momentum=1\.0"),
        ("lars", {"trust_coefficient": 0.0}, r"optimizer\.trust_coefficient=0\.0"),
        ("lion", {"b2": 1.0}, r"optimizer\.b2=1\.0"),
        ("muon", {"ns_steps": 0}, r"optimizer\.ns_steps=0"),
        ("muon", {"rms": 0.0}, r"optimizer\.rms=0\.0"),
        ("schedule_free_adamw", {"b1": 0.0}, r"optimizer\.b1=0"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        base_optimizers.BASE_OPTIMIZERS[name](**options)
