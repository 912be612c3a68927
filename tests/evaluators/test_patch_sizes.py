# SPDX-License-Identifier: Apache-2.0
"""FlexiViT: steps with patches of several sizes, and their evaluation."""

import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32}
MODEL = SIZES | {"patch_size": 4, "kernel_size": 3, "patch_sizes": (2, 8), "posemb_grid": (3, 3)}
VAL = {"split": "test[:50]", "preprocess": "decode"}


def flexi(data_dir, **changes):
    evals = {"val": VAL | {"name": "patch_sizes"}, "plain": VAL}
    return tiny_config(data_dir, model=MODEL, evals=evals, **changes)


@pytest.fixture(scope="module")
def experiment(data_dir):
    return Experiment.from_config(flexi(data_dir))


def test_the_size_of_a_step_is_a_function_of_the_seed_and_the_step(experiment):
    def draw(seed, steps):
        at = experiment.objective.at_step
        return [at(seed=seed, step=step).model.patch_size[0] for step in steps]

    drawn = draw(0, range(1, 400))
    assert drawn[100:] == draw(0, range(101, 400))
    assert drawn != draw(1, range(1, 400))
    assert set(drawn) == {2, 8}
    assert 160 < drawn.count(2) < 240


def test_there_is_one_program_for_each_size(experiment):
    steps = [experiment.train_step_at(step) for step in range(1, 40)]
    assert len(set(map(id, steps))) == 2


def test_a_step_takes_the_gradient_at_its_size(experiment):
    state = experiment.init_state()
    batch = next(experiment.train_batches(0))
    params = jax.device_get(state.params)
    _, metrics = experiment.train_step_at(1)(state, batch)
    objective = experiment.objective.at_step(seed=0, step=1)
    augmented = jax.jit(objective.augment)(batch, jax.random.key(0))
    want, _ = jax.jit(objective.loss)(params, augmented, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_each_size_is_evaluated_in_one_table(experiment, capsys):
    params = experiment.place_params(experiment.initial_params())
    params["head"]["kernel"] = params["head"]["kernel"] + np.random.default_rng(0).normal(
        size=(16, 10)
    ).astype(np.float32)
    plain, val = sorted(experiment.evaluators, key=lambda evaluator: evaluator.name)
    results = val.run(params)
    assert results["count"] == 50
    assert results["p2_loss"] != results["p8_loss"]
    assert results["loss"] == (results["p2_loss"] + results["p8_loss"]) / 2
    assert set(val.metrics) <= results.keys()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line[0] in "28"] == [["2", "16"], ["8", "1"]]
    fixed = plain.run(params)
    own = Experiment.from_config(
        tiny_config(
            experiment.train_data.data_dir,
            model=MODEL,
            evals={"val": VAL | {"name": "patch_sizes", "sizes": (4,)}},
        )
    )
    assert own.evaluators[0].run(params)["p4_loss"] == pytest.approx(fixed["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": MODEL | {"patch_sizes": (2, 3)}}, "3 does not divide the images of 8x8"),
        ({"objective": {"name": "mae"}}, "expected .supervised. or"),
        ({"evals": {"val": VAL | {"name": "patch_sizes", "sizes": (3,)}}}, "divisors of images"),
        ({"model": SIZES | {"patch_size": 4}}, "expected some, such as"),
        (
            {
                "model": SIZES | {"patch_size": 4, "position_embedding": "relative"},
                "evals": {"val": VAL | {"name": "patch_sizes", "sizes": (2, 4)}},
            },
            r"evals.val.sizes=\(2, 4\) with model.position_embedding='relative'",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(data_dir, changes, words):
    config = flexi(data_dir)
    for key, value in changes.items():
        config.update({key: value}) if key == "objective" else setattr(config, key, value)
    with pytest.raises(UserError, match=words):
        Experiment.from_config(config)
