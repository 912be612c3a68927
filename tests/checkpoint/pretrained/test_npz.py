# SPDX-License-Identifier: Apache-2.0
"""Published files are read under their Linen names; bad files are refused and run no code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from vit_jax.checkpoint.pretrained.npz import load_npz, rename_to_linen
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "testdata" / "golden"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save_npz(path, **flat):
    np.savez(path, **flat)
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_npz(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "init_from" in message
    return message


def test_published_blocks_get_their_linen_names():
    params = load_npz(GOLDEN / "vit_token.npz")
    assert params.keys() == {"cls", "embedding", "Transformer", "head"}
    assert params["Transformer"]["encoderblock_1"].keys() == {
        "LayerNorm_0",
        "MultiHeadDotProductAttention_0",
        "LayerNorm_1",
        "MlpBlock_0",
    }
    with np.load(GOLDEN / "vit_token.npz") as file:
        np.testing.assert_array_equal(
            params["Transformer"]["encoderblock_1"]["LayerNorm_1"]["scale"],
            file["Transformer/encoderblock_1/LayerNorm_2/scale"],
        )
        np.testing.assert_array_equal(
            params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_1"]["kernel"],
            file["Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel"],
        )


def test_renaming_leaves_linen_names_alone():
    params = load_npz(GOLDEN / "vit_token.npz")
    again = traverse_util.flatten_dict(rename_to_linen(params))
    params = traverse_util.flatten_dict(params)
    assert again.keys() == params.keys()
    assert all(again[path] is params[path] for path in params)


def test_numbers_are_counted_per_class_in_natural_order():
    old = {"LayerNorm_0": "a", "Dense_1": "b", "Dense_10": "d", "LayerNorm_11": "e", "Dense_9": "c"}
    assert rename_to_linen(old) == {
        "LayerNorm_0": "a",
        "LayerNorm_1": "e",
        "Dense_0": "b",
        "Dense_1": "c",
        "Dense_2": "d",
    }


@pytest.mark.parametrize("name", ["encoderblock", "MixerBlock"])
def test_twelve_blocks_keep_their_places(name):
    blocks = {f"{name}_{i}": {"LayerNorm_2": {"scale": i}} for i in range(12)}
    assert rename_to_linen(blocks) == {
        f"{name}_{i}": {"LayerNorm_0": {"scale": i}} for i in range(12)
    }


def test_a_block_that_is_not_there_is_not_made_up_from_the_next():
    assert rename_to_linen({"encoderblock_0": 0, "encoderblock_2": 2}).keys() == {
        "encoderblock_0",
        "encoderblock_2",
    }


@pytest.mark.parametrize("wrapper", ["", "params/", "opt/target/", "opt/target/params/"])
def test_wrappers_are_stripped(tmp_path, wrapper):
    beside = {"opt/state/step": np.array(3)} if wrapper.startswith("opt") else {}
    kernel = np.ones((2, 3), np.float32)
    path = save_npz(tmp_path / "w.npz", **{f"{wrapper}head/kernel": kernel}, **beside)
    params = load_npz(path)
    assert traverse_util.flatten_dict(params, sep="/").keys() == {"head/kernel"}
    np.testing.assert_array_equal(params["head"]["kernel"], kernel)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_are_float32(tmp_path, dtype):
    path = save_npz(tmp_path / "d.npz", cls=np.full((1, 1, 2), 0.5, dtype))
    cls = load_npz(str(path))["cls"]
    assert cls.dtype == np.float32
    np.testing.assert_array_equal(cls, np.full((1, 1, 2), 0.5))


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.npz")


def test_folder(tmp_path):
    refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, share):
    whole = (GOLDEN / "vit_token.npz").read_bytes()
    path = tmp_path / "short.npz"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"not a whole zip archive but {path.stat().st_size} bytes" in refusal(path)


def test_damaged_file(tmp_path):
    path = save_npz(tmp_path / "damaged.npz", cls=np.zeros(1000, np.float32))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    assert "CRC" in refusal(path)


def test_web_page(tmp_path):
    path = tmp_path / "page.npz"
    path.write_text("<!DOCTYPE html>\n<html>404</html>\n")
    assert "start with b'<!DOCTYPE html>" in refusal(path)


def test_single_array(tmp_path):
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    assert "not a whole zip archive" in refusal(tmp_path / "array.npz")


@pytest.mark.parametrize("array", [np.array(3), np.array(["text"]), np.array([True])])
def test_what_is_no_float_is_no_parameter(tmp_path, array):
    message = refusal(save_npz(tmp_path / "i.npz", **{"head/bias": array}))
    assert f"head/bias is of type {array.dtype}" in message


def test_a_long_complaint_is_cut_to_its_first_line(tmp_path):
    table = np.zeros(1, [(f"column_{i}", np.float32) for i in range(1000)])
    assert "Header info length" in refusal(save_npz(tmp_path / "table.npz", table=table))


def test_array_where_others_have_a_level(tmp_path):
    refusal(save_npz(tmp_path / "clash.npz", **{"head": np.zeros(2), "head/bias": np.zeros(2)}))


def test_pickled_objects_are_refused_unread(tmp_path):
    array = np.array([Trap(tmp_path / "sprung"), None], dtype=object)
    message = refusal(save_npz(tmp_path / "trap.npz", kernel=array))
    assert "Object arrays" in message
    assert not (tmp_path / "sprung").exists()
    with np.load(tmp_path / "trap.npz", allow_pickle=True) as file:
        _ = file["kernel"]
    assert (tmp_path / "sprung").exists(), "the trap itself does not work"


def test_a_pickle_is_refused_unread(tmp_path):
    path = tmp_path / "pickle.npz"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refusal(path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap itself does not work"
