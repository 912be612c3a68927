# SPDX-License-Identifier: Apache-2.0
"""The command that averages weights, on files and on runs."""

import numpy as np
import pytest

from tests.trained import write_run
from vit_jax import convert
from vit_jax.average import main
from vit_jax.checkpoint.pretrained.load import load_pretrained


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A run whose checkpoint of step 4 has half of the parameters of that of step 8."""
    return write_run(tmp_path_factory.mktemp("average") / "run", data_dir)[0]


def test_mean_of_two_checkpoints_is_written_and_evaluated(run, tmp_path, said):
    output = tmp_path / "mean.npz"
    main([f"{run}/checkpoints/4", f"{run}/checkpoints/8", f"--output={output}"])
    found, half, whole = (
        load_pretrained(str(x)) for x in (output, run / "checkpoints/4", run / "checkpoints/8")
    )
    assert found.params.keys() == whole.params.keys()
    for path, x in found.params.items():
        expected = (half.params[path] + whole.params[path]) / 2
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7, err_msg=path)
    text = "\n".join(said)
    assert f"wrote {output}" in text
    assert "not evaluated" in text


def test_points_between_two_runs_are_evaluated(run, tmp_path, said):
    output = tmp_path / "wise.npz"
    options = ["--method=interpolate", "--alphas=0,1", "--metric=val/loss", f"--output={output}"]
    main([str(run), f"{run}/checkpoints/4", *options])
    text = "\n".join(said)
    values = {a: float(text.split(f"alpha {a} ")[1].split()[1]) for a in "01"}
    best = min(values, key=values.get)
    assert f"best: alpha {best}, with val/loss" in text
    source = run if best == "0" else run / "checkpoints/4"
    expected, found = load_pretrained(str(source)), load_pretrained(str(output))
    for path, x in found.params.items():
        np.testing.assert_allclose(x, expected.params[path], rtol=1e-6, err_msg=path)


def test_folders_of_the_hub_are_averaged(run, tmp_path):
    for step in (4, 8):
        folder = tmp_path / str(step)
        folder.mkdir()
        convert.main([f"{run}/checkpoints/{step}", str(folder / "model.safetensors")])
        (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    main([str(tmp_path / "4"), str(tmp_path / "8"), f"--output={tmp_path / 'mean.npz'}"])
    found = load_pretrained(str(tmp_path / "mean.npz")).params
    half, whole = (load_pretrained(str(tmp_path / step)).params for step in "48")
    for path, x in found.items():
        np.testing.assert_allclose(x, (half[path] + whole[path]) / 2, rtol=1e-5, atol=1e-6)
