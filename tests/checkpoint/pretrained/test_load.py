# SPDX-License-Identifier: Apache-2.0
"""Weights with which no model can compute are refused, whatever file they are in."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import traverse_util

from tests.tiny import tiny_config
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.safetensors import read_tensors, write_tensors
from vit_jax.inference.model import load_model
from vit_jax.objectives.teacher import load_teacher
from vit_jax.training.evaluation import Judge
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

TESTDATA = Path(__file__).parents[2] / "testdata"
NPZ = TESTDATA / "golden" / "vit_gap.npz"
BIAS = "Transformer/encoder_norm/bias"


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_npz(folder, value, dtype=np.float32):
    arrays = {name: x.astype(dtype) for name, x in np.load(NPZ).items()}
    arrays[BIAS][3] = value
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def write_safetensors(folder, value):
    shutil.copytree(TESTDATA / "torch" / "hf_vit", folder / "hf")
    file = folder / "hf" / "model.safetensors"
    tensors = {n: x.copy() for n, x in read_tensors(epath.Path(file))[0].items()}
    tensors["vit.layernorm.bias"][3] = value
    write_tensors(file, tensors, metadata={})
    return file


def write_bfloat16(folder, value):
    file = write_safetensors(folder, value)
    tensors = {n: x.astype(jnp.bfloat16) for n, x in read_tensors(epath.Path(file))[0].items()}
    write_tensors(file, tensors, metadata={})
    return file.parent


def write_orbax(folder, value):
    params = {name: np.array(x) for name, x in load_pretrained(str(NPZ)).params.items()}
    params[BIAS][3] = value
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", traverse_util.unflatten_dict(params, sep="/"))
    return folder / "orbax"


@pytest.mark.parametrize("write", [write_npz, write_safetensors, write_bfloat16, write_orbax])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_parameters_that_are_not_finite_are_refused_and_named(write, value, tmp_path):
    source = write(tmp_path, value)
    message = refusal(load_pretrained, str(source))
    assert message.startswith(f"{source}: 1 of ")
    assert f"hold NaN or infinity, {BIAS} among them" in message


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path):
    assert "NaN or infinity" in refusal(load_pretrained, str(write_npz(tmp_path, 1e300, "f8")))


def test_every_use_of_weights_refuses_them(tmp_path, data_dir):
    source = str(write_npz(tmp_path, np.nan))
    experiment = Experiment.from_config(tiny_config(data_dir, init_from=source))
    assert refusal(experiment.init_state).startswith(f"init_from={source!r}: ")
    judge = Judge(Experiment.from_config(tiny_config(data_dir)))
    options = {"student": None, "num_classes": 10, "image_shape": (32, 32, 3)}
    for use in (load_model, judge.load, lambda x: load_teacher(x, **options)):
        assert "NaN or infinity" in refusal(use, source)


def test_integers_are_no_parameters(tmp_path):
    file = write_safetensors(tmp_path, 0)
    tensors = dict(read_tensors(epath.Path(file))[0])
    tensors["vit.layernorm.bias"] = np.zeros(32, np.int32)
    write_tensors(file, tensors, metadata={})
    assert f"{BIAS} is of type int32; expected a float type" in refusal(load_pretrained, str(file))


def test_a_model_without_layers_is_refused(tmp_path):
    arrays = {name: x for name, x in np.load(NPZ).items() if "encoderblock" not in name}
    np.savez(tmp_path / "x.npz", **arrays)
    message = refusal(load_pretrained, str(tmp_path / "x.npz"))
    assert "no layers with names that are known here" in message


def test_an_absent_block_of_a_checkpoint_is_named(tmp_path):
    block = "Transformer/encoderblock_0"
    params = load_pretrained(str(NPZ)).params
    params = {name: np.array(x) for name, x in params.items() if not name.startswith(block)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", traverse_util.unflatten_dict(params, sep="/"))
    assert f"nothing of {block}:" in refusal(load_pretrained, str(tmp_path / "orbax"))


def test_the_loss_of_an_older_run_comes_from_its_config():
    assert load_pretrained(str(TESTDATA / "old_workdir" / "workdir")).loss == "softmax"
