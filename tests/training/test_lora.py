# SPDX-License-Identifier: Apache-2.0
"""A run with adapters: what is trained, what checkpoints hold, how it is used and resumed."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny_config
from tests.trained import write_model, write_towers
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.manifest import write_manifest
from vit_jax.checkpoint.pretrained.load import load_params, load_pretrained
from vit_jax.checkpoint.pretrained.safetensors import write_safetensors
from vit_jax.checkpoint.workdir import read_config
from vit_jax.config.load import load_config
from vit_jax.convert import main as convert
from vit_jax.models.lora import Lora, merge_adapters
from vit_jax.observe.summary import last_results
from vit_jax.planning.memory import estimate_memory
from vit_jax.training.evaluation import Judge, make_evaluation
from vit_jax.training.experiment import Experiment
from vit_jax.training.resume import restore
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

BLOCK = "Transformer/encoderblock_0"
LORA = Lora(rank=2, alpha=4.0)  # that of `lora_config`


def lora_config(base, data_dir, **changes):
    options = {"init_from": str(base), "lora__rank": 2, "lora__alpha": 4.0, "ema_decay": 0.9}
    weights = {"objective__pixel_mean": 0.4, "objective__pixel_std": 0.3}
    return tiny_config(data_dir, **(options | weights | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights of the model of `tiny_config`, for images of another size and with another head."""
    sizes = {"patch_size": (2, 2), "num_layers": 1}
    folder = tmp_path_factory.mktemp("base")
    weights = load_pretrained(str(write_model(folder / "base.npz", size=10, **sizes)))
    write_safetensors(folder / "base.safetensors", weights)
    return folder / "base.safetensors"


@pytest.fixture(scope="module")
def run(base, data_dir, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(lora_config(base, data_dir), str(workdir))
    return workdir


def read(workdir, step, item="params"):
    params, _ = load_params(workdir / "checkpoints" / str(step), item=item)
    return {path: np.asarray(x) for path, x in flatten(params).items()}


@pytest.mark.parametrize("item", ["params", "ema_params"])
def test_checkpoint_holds_adapters_and_head_alone(run, item):
    held = read(run, 8, item)
    assert all("/lora/" in path or path.startswith("head/") for path in held)
    assert f"{BLOCK}/MlpBlock_0/Dense_0/lora/b" in held
    assert np.any(held[f"{BLOCK}/MlpBlock_0/Dense_0/lora/b"])
    assert np.any(held["head/kernel"])


def test_optimizer_has_state_for_what_is_trained_alone(base, data_dir):
    state = Experiment.from_config(lora_config(base, data_dir)).abstract_state
    moments = [path for path in flatten(state.opt_state) if "/mu/" in path]
    assert moments
    assert all("/lora/" in path or "/head/" in path for path in moments)


def test_loaded_run_is_the_base_with_its_adapters_added(run, base, data_dir):
    found = load_pretrained(str(run))
    assert not any("/lora/" in path for path in found.params)
    experiment = Experiment.from_config(lora_config(base, data_dir))
    fitted, _ = experiment.fit_params(load_pretrained(str(base)), experiment.initial_params())
    merged = merge_adapters(
        {path: np.asarray(x) for path, x in flatten(fitted).items()} | read(run, 8),
        LORA,
    )
    assert found.params.keys() == merged.keys()
    for path, x in merged.items():
        np.testing.assert_array_equal(found.params[path], x, err_msg=path)
    untouched = f"{BLOCK}/LayerNorm_0/scale"
    np.testing.assert_array_equal(
        found.params[untouched], load_pretrained(str(base)).params[untouched]
    )


def test_adapters_are_written_alone_and_added_to_their_base(run, tmp_path, said):
    convert([str(run), str(tmp_path / "adapters"), "--adapters"])
    text = "\n".join(said)
    assert f"wrote {tmp_path / 'adapters' / 'adapter_config.json'}" in text
    assert "the position embeddings are those of the base, which the run has resized" in text
    found, expected = load_pretrained(str(tmp_path / "adapters")), load_pretrained(str(run))
    assert found.params.keys() == expected.params.keys()
    for path, x in found.params.items():
        if "pos_embedding" not in path:
            np.testing.assert_allclose(x, expected.params[path], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="exists; remove it"):
        convert([str(run), str(tmp_path / "adapters"), "--adapters"])


@pytest.fixture(scope="module")
def int8_run(base, data_dir, tmp_path_factory):
    """A finished run whose base is kept as int8, and its results."""
    workdir = tmp_path_factory.mktemp("lora") / "int8"
    train(lora_config(base, data_dir, lora__base="int8", ema_decay=None), str(workdir))
    return workdir


def test_run_with_an_int8_base_is_read_with_the_values_that_it_had(int8_run, data_dir):
    held = read(int8_run, 8)
    assert not any(x.dtype == np.int8 or "kernel_scale" in path for path, x in held.items())
    judge = Judge(make_evaluation(read_config(int8_run), {}))
    found = judge.record(str(int8_run), judge.load(str(int8_run)))
    assert found["val/loss"] == pytest.approx(last_results(int8_run)["val/loss"], rel=1e-5)


def test_adapters_of_a_rounded_base_are_written_with_a_note(int8_run, tmp_path, said):
    convert([str(int8_run), str(tmp_path / "adapters"), "--adapters"])
    assert "the run rounded kernels of the base to int8, and PEFT does not" in "\n".join(said)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_device_never_holds_a_rounded_base_as_float32(dtype, base, data_dir, monkeypatch):
    config = lora_config(base, data_dir, lora__base=dtype, ema_decay=None)
    experiment = Experiment.from_config(config)
    lora, held = experiment.settings.lora, []
    kernels = {p: x for p, x in flatten(experiment.abstract_state.params).items() if lora.rounds(p)}
    shapes = {x.shape for x in kernels.values()}

    def count_floats():
        return sum(x.dtype == jnp.float32 and x.shape in shapes for x in jax.live_arrays())

    def spy(call):
        def counted(*args, **options):
            result = call(*args, **options)
            held.append(count_floats())
            return result

        return counted

    before = count_floats()
    monkeypatch.setattr(jax, "device_get", spy(jax.device_get))
    monkeypatch.setattr(Lora, "store", spy(Lora.store))
    state = experiment.init_state()
    assert len(held) >= 3
    assert max(held) == before
    params = flatten(jax.device_get(state.params))
    assert {params[path].dtype for path in kernels} == {jnp.dtype(dtype)}


def test_int8_base_takes_a_quarter_of_the_memory_on_every_mesh(base, data_dir):
    states = {}
    for mesh in ({}, {"fsdp": 2, "tensor": 2}):
        config = lora_config(base, data_dir, lora__base="int8", mesh=mesh, ema_decay=None)
        experiment = Experiment.from_config(config)
        params = flatten(experiment.abstract_state.params)
        kernel = params[f"{BLOCK}/MlpBlock_0/Dense_0/kernel"]
        assert kernel.dtype == np.int8
        state = experiment.init_state()
        batch = next(experiment.train_batches(0))
        states[len(mesh)] = experiment.train_step(state, batch)
    (one, metrics), (split, others) = states.values()
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
    for path, x in flatten(one.params).items():
        np.testing.assert_allclose(x, flatten(split.params)[path], rtol=1e-4, atol=1e-5)


def test_plan_counts_the_bytes_of_a_rounded_base(base, data_dir):
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        experiment = Experiment.from_config(lora_config(base, data_dir, lora__base=dtype))
        sizes[dtype] = estimate_memory(experiment).params
    kernels = 4 * 16 * 16 + 2 * 16 * 32
    assert sizes["float32"] - sizes["bfloat16"] == 2 * kernels
    scales = 4 * (4 * 16 + 16 + 32)
    assert sizes["float32"] - sizes["int8"] == 3 * kernels - scales


def test_rounded_base_is_refused_with_float8(base, data_dir):
    config = lora_config(base, data_dir, lora__base="int8", precision="float8")
    with pytest.raises(UserError, match=r"lora.base='int8' with precision='float8'"):
        Experiment.from_config(config)


def test_a_source_without_adapters_is_refused(base, tmp_path):
    for source in (base, base.parent):
        with pytest.raises(UserError, match=r"expected SRC as a run|no adapters|no checkpoint"):
            convert([str(source), str(tmp_path / "adapters"), "--adapters"])
    assert not (tmp_path / "adapters").exists()


def test_stopped_run_resumes_to_the_same_bits(run, base, data_dir, tmp_path):
    workdir = tmp_path / "run"
    train(lora_config(base, data_dir), str(workdir), on_record=lambda record: record["step"] >= 4)
    assert not (workdir / "checkpoints" / "8").exists()
    train(lora_config(base, data_dir), str(workdir))
    for item in ("params", "ema_params"):
        for path, x in read(run, 8, item).items():
            np.testing.assert_array_equal(read(workdir, 8, item)[path], x, err_msg=path)


def start(config, workdir, seed):
    """Starts or resumes a run, writes a checkpoint, and returns its parameters, float32.

    All that is initialised is random; nothing is compiled for that.
    """
    experiment, rng = Experiment.from_config(config), np.random.default_rng(seed)
    shapes, lora = experiment.abstract_state, experiment.settings.lora
    initial = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes.params)
    params, _ = experiment.fit_params(experiment.load_weights(), initial)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = dataclasses.replace(zeros, params=lora.store(params, xp=np))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    with (
        pytest.MonkeyPatch.context() as patch,
        CheckpointManager(
            workdir, experiment.settings.checkpoint, experiment.description, keep=experiment.keep
        ) as checkpoints,
    ):
        patch.setattr(Experiment, "init_state", lambda *_: state)
        patch.setattr(Experiment, "initial_params", lambda *_: initial)
        step, state = restore(experiment, checkpoints)
        checkpoints.save(step + 1, dataclasses.replace(state, step=state.step + 1), {})
    return flatten(lora.restore(jax.device_get(state.params)))


def test_frozen_parameters_that_the_base_lacks_are_saved(base, data_dir, tmp_path):
    changes = {
        "model__representation_size": 8,
        "adapt__dont_load": (f"{BLOCK}/.*",),
        "optimizer__freeze": ("head/.*",),
        "lora__base": "int8",
        "lora__targets": (".*",),
    }
    config = lora_config(base, data_dir, ema_decay=None, **changes)
    params = start(config, tmp_path, seed=0)
    found, expected = load_pretrained(str(tmp_path)).params, merge_adapters(params, LORA)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    for path, x in start(config, tmp_path, seed=1).items():
        np.testing.assert_array_equal(params[path], x, err_msg=path)


def test_checkpoint_without_parameters_that_its_run_initialised_is_refused(
    base, data_dir, tmp_path, monkeypatch
):
    config = lora_config(base, data_dir, ema_decay=None, model__representation_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "find_initialised", lambda *_: [])
        params = start(config, tmp_path, seed=0)
    with pytest.raises(UserError, match=r"nor the checkpoint holds: pre_logits/bias, pre_logits/k"):
        load_pretrained(str(tmp_path))
    start(config, tmp_path, seed=0)
    found = load_pretrained(str(tmp_path)).params
    np.testing.assert_array_equal(found["pre_logits/kernel"], params["pre_logits/kernel"])


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to write to."""
    return shutil.copytree(run, tmp_path / "copy")


def change_base(workdir, **changes):
    """Changes what the newest checkpoint says about its base."""
    checkpoint = workdir / "checkpoints" / "8"
    file = checkpoint / "description" / "metadata"
    described = json.loads(file.read_text())
    described["base"] |= changes
    file.write_text(json.dumps(described))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def test_other_base_is_refused(copied, base, data_dir, tmp_path):
    other = write_model(tmp_path / "other.npz", patch_size=(2, 2), num_layers=1, size=8)
    change_base(copied, path=str(other))
    with pytest.raises(UserError, match=f"{other}: these weights are not those .*base.safetensors"):
        load_pretrained(str(copied))
    with pytest.raises(UserError, match="init_from: these weights are not those"):
        train(lora_config(other, data_dir, total_steps=12), str(copied))


def test_missing_base_is_named(copied):
    change_base(copied, path="/nowhere/base.npz")
    with pytest.raises(UserError, match=r"holds adapters of .*, which is not at /nowhere/base.npz"):
        load_pretrained(str(copied))


def test_run_that_is_its_own_base_is_refused(copied):
    change_base(copied, path=str(copied))
    with pytest.raises(UserError, match="at most 8 runs"):
        load_pretrained(str(copied))


def test_adapters_without_weights_to_start_from_are_refused(data_dir):
    with pytest.raises(UserError, match=r"lora.rank=2 without init_from"):
        Experiment.from_config(tiny_config(data_dir, lora__rank=2)).check()


def test_target_that_matches_nothing_is_refused(base, data_dir):
    config = lora_config(base, data_dir, lora__targets=(".*/nothing/kernel",))
    with pytest.raises(UserError, match=r"lora.targets: '.*/nothing/kernel' matches no kernel"):
        Experiment.from_config(config).check()


def test_of_two_towers_both_heads_scale_and_bias_are_trained(tmp_path):
    base = write_towers(tmp_path / "towers.npz")
    with np.load(base) as file:
        paths = [*file.files, "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/lora/a"]
    trained = [p for p in paths if not any(re.fullmatch(f, p) for f in Lora(rank=2).frozen)]
    heads = [f"{part}/head/{name}" for part in ("img", "txt") for name in ("kernel", "bias")]
    assert sorted(trained) == sorted([*heads, "t", "b", paths[-1]])
    chosen = Lora(rank=2, train=("img/head/.*",))
    assert any(re.fullmatch(f, "t") for f in chosen.frozen)


def test_config_of_two_towers_takes_adapters_with_its_rate_of_scale_and_bias(captions_dir):
    config = load_config("configs/digits_text.py", {})
    config.data.data_dir = captions_dir
    config.lora = {"rank": 2}
    config.init_from = "towers.npz"
    experiment = Experiment.from_config(config)
    experiment.check()
    kept = flatten(experiment.keep(experiment.abstract_state.params))
    assert {"t", "b", "img/head/kernel", "txt/head/kernel"} <= kept.keys()
    assert "img/embedding/kernel" not in kept
