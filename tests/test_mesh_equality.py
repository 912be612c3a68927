# SPDX-License-Identifier: Apache-2.0
"""The same config on any mesh: the same losses."""

import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from vit_jax.training.experiment import Experiment
from vit_jax.utils.tree import flatten


def losses(data_dir, *, steps=20, devices=None, **changes):
    if "model" not in changes:
        model = {"dropout_rate": 0.1, "num_layers": 2, "representation_size": 16}
        changes |= {f"model__{key}": value for key, value in model.items()} | changes
    changes.setdefault("objective__mixup", 0.2)
    config = tiny_config(data_dir, total_steps=steps, **changes)
    experiment = Experiment.from_config(config, devices=devices)
    state, found = experiment.init_state(), []
    batches = experiment.train_batches(0)
    for _ in range(steps):
        state, metrics = experiment.train_step(state, next(batches))
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.fixture(scope="module")
def one_device(data_dir):
    return losses(data_dir, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8, "data": 1}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=lambda mesh: "-".join(f"{k}{v}" for k, v in mesh.items()),
)
def test_losses_do_not_depend_on_the_mesh(mesh, one_device, data_dir):
    want, _ = one_device
    got, state = losses(data_dir, mesh=mesh)
    assert want[-1] < want[0]
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    kernel = flatten(state.params)["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"]
    moments = [x for path, x in flatten(state.opt_state).items() if path.endswith("Dense_0/kernel")]
    assert {x.sharding for x in moments} == {kernel.sharding}
    used = {axis for axis in kernel.sharding.spec if axis}
    assert used == {axis for axis in ("fsdp", "tensor") if mesh.get(axis, 1) > 1} - (
        {"fsdp"} if kernel.size < 1024 else set()
    )


STRATEGIES = {
    "data": {"data": 8},
    "zero1": {"data": 8, "zero1": True},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"data": 2, "tensor": 4, "sequence_parallel": True},
    "all": {"data": 2, "fsdp": 2, "tensor": 2, "zero1": True, "sequence_parallel": True},
    "fsdp": {"rules": (("gpu", {"tensor": 8}), ("cpu x8", {"data": 1, "fsdp": 8}))},
}


def two_updates(data_dir, **changes):
    """Metrics, and parameters after two plain gradient steps, so that they show the gradients."""
    config = tiny_config(
        data_dir,
        total_steps=2,
        optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.5, "schedule": "constant"},
        model__num_layers=1,
        model__mlp_dim=64,
        evals={},
        **changes.pop("config", {}),
    )
    experiment = Experiment.from_config(config, **changes)
    state, found = experiment.init_state(), []
    batches = experiment.train_batches(0)
    for _ in range(2):
        state, metrics = experiment.train_step(state, next(batches))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    return np.array(found), flatten(state.params), flatten(state.opt_state)


@pytest.fixture(scope="module")
def two_updates_on_one_device(data_dir):
    return two_updates(data_dir, devices=jax.devices()[:1])


# The others are parts of "all", or the test above has them.
FAST = ("all",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in STRATEGIES]
)
def test_every_strategy_gives_the_same_gradients_and_updates(
    name, two_updates_on_one_device, data_dir
):
    metrics, params, opt_state = two_updates(data_dir, config={"mesh": STRATEGIES[name]})
    want, want_params, _ = two_updates_on_one_device
    np.testing.assert_allclose(metrics, want, rtol=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(value, want_params[path], rtol=1e-5, atol=1e-6, err_msg=path)
    (moment,) = (
        x for path, x in opt_state.items() if path.endswith("_0/MlpBlock_0/Dense_0/kernel")
    )
    parts = {"data": 1, "zero1": 8, "tensor": 2, "sequence": 4, "all": 8, "fsdp": 8}
    assert moment.size == parts[name] * moment.addressable_shards[0].data.size


# tests/models/test_gradients.py has it without a mesh, and tests/test_any_resolution.py on one.
@pytest.mark.slow
def test_gradient_accumulation_equals_the_large_batch(data_dir):
    changes = {"model__dropout_rate": 0.0, "model__num_layers": 1, "mesh": {"data": 4, "fsdp": 2}}
    want, _ = losses(data_dir, steps=6, data__batch_size=32, **changes)
    got, _ = losses(data_dir, steps=6, data__batch_size=32, optimizer__accum_steps=4, **changes)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bfloat16_trains_close_to_float32(data_dir, one_device):
    got, state = losses(data_dir, precision="bfloat16")
    np.testing.assert_allclose(got, one_device[0], rtol=0.05)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


EVERYTHING = {
    "num_registers": 2,
    "layer_scale_init": 0.5,
    "qk_norm": True,
    "activation": "swiglu",
    "rope_theta": 100.0,
    "classifier": "map",
    "stochastic_depth_rate": 0.3,
    "patch_dropout_rate": 0.2,
}
HYBRID = {"resnet_layers": (1,), "resnet_width": 0.5, "patch_size": 1}
MIXER = {"name": "mixer", "tokens_mlp_dim": 8, "channels_mlp_dim": 32}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EVERYTHING, marks=pytest.mark.slow),
        EVERYTHING | {"scan": True, "remat": "dots"},
        pytest.param(HYBRID, marks=pytest.mark.slow),
        pytest.param(MIXER, marks=pytest.mark.slow),
    ],
    ids=["every_option", "scan", "hybrid", "mixer"],
)
def test_every_model_gives_the_same_losses_on_a_mesh(options, data_dir):
    layers = 2 if "scan" in options else 1
    sizes = {"patch_size": 2, "hidden_size": 16, "num_layers": layers, "dropout_rate": 0.1}
    if "name" not in options:
        sizes |= {"num_heads": 4, "mlp_dim": 32}
    changes = {"model": sizes | options, "steps": 5}
    if options is HYBRID:  # Its first layers make the image four times smaller.
        changes |= {"data__preprocess": "decode|resize(16)", "evals": {}}
    want, _ = losses(data_dir, devices=jax.devices()[:1], **changes)
    got, _ = losses(data_dir, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **changes)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-4)
