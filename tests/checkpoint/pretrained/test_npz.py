# SPDX-License-Identifier: Apache-2.0
"""Published files are read under their Linen names; bad files are refused and run no code."""

import dataclasses
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from vit_jax.checkpoint.pretrained.npz import read_npz, rename_to_linen, write_npz
from vit_jax.checkpoint.pretrained.weights import POSEMB, stack_blocks
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
        read_npz(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "expected" in message
    return message


def test_published_blocks_get_their_linen_names():
    params = traverse_util.unflatten_dict(read_npz(GOLDEN / "vit_token.npz").params, sep="/")
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


@pytest.mark.parametrize(
    ("case", "block"),
    [
        ("vit_token", "Transformer/encoderblock_0"),
        ("mixer", "MixerBlock_0"),
        ("hybrid_stages", "block1"),
    ],
)
def test_an_absent_block_is_named(case, block, tmp_path):
    flat = {n: x for n, x in np.load(GOLDEN / f"{case}.npz").items() if not n.startswith(block)}
    for prefix in ("", "opt/target/"):
        path = save_npz(tmp_path / "x.npz", **{prefix + name: x for name, x in flat.items()})
        assert f"nothing of {block}:" in refusal(path)


def test_renaming_leaves_linen_names_alone():
    params = traverse_util.unflatten_dict(read_npz(GOLDEN / "vit_token.npz").params, sep="/")
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
    with np.load(GOLDEN / "vit_token.npz") as file:
        wrapped = {f"{wrapper}{name}": file[name] for name in file.files}
    params = read_npz(save_npz(tmp_path / "w.npz", **wrapped, **beside)).params
    assert_same(params, read_npz(GOLDEN / "vit_token.npz").params)


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_arrays_are_float32(tmp_path, dtype):
    kernel = np.full((2, 2, 3, 4), 0.5, dtype)
    path = save_npz(tmp_path / "d.npz", **{"embedding/kernel": kernel})
    if dtype is ml_dtypes.bfloat16:
        with np.load(path) as file:
            assert file["embedding/kernel"].dtype == np.dtype("V2"), "not as big_vision stores it"
    value = read_npz(str(path)).params["embedding/kernel"]
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, kernel.astype(np.float32))


def test_group_norms_lose_their_empty_dimensions():
    params = read_npz(GOLDEN / "hybrid_stages.npz").params
    assert params["gn_root/scale"].shape == (32,)
    assert params["block2/unit1/gn_proj/bias"].shape == (256,)


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("vit_token", {"name": "vit", "classifier": "token", "patch_size": (8, 8), "num_heads": 4}),
        ("vit_gap", {"classifier": "gap", "hidden_size": 32, "mlp_dim": 64, "num_layers": 2}),
        ("vit_pre_logits", {"representation_size": 48}),
        ("hybrid_root", {"resnet_layers": (), "resnet_width": 0.5, "patch_size": (2, 2)}),
        ("hybrid_stages", {"resnet_layers": (1, 2), "resnet_width": 0.5}),
        ("mixer", {"name": "mixer", "tokens_mlp_dim": 24, "channels_mlp_dim": 64}),
    ],
)
def test_the_model_is_inferred(case, model):
    weights = read_npz(GOLDEN / f"{case}.npz")
    assert weights.model.items() >= model.items()
    assert weights.model["activation"] == "gelu_tanh"
    assert weights.preprocess == {"mean": 0.5, "std": 0.5}


def as_big_vision(params, *, scan=False, fold=False):
    """The same function in the layout of big_vision: positions at the root, without a class slot.

    `fold` moves the position of the class token into the token, where it has one.
    """
    params = dict(params)
    posemb = params.pop(POSEMB)
    if "cls" in params:
        params["cls"] = params["cls"] + posemb[:, :1] if fold else params["cls"]
        posemb = posemb[:, 1:]
    params["pos_embedding"] = posemb
    return stack_blocks(params) if scan else params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", ["vit_token", "vit_gap"])
def test_big_vision_files_are_the_same_function(tmp_path, case, scan):
    expected = dict(read_npz(GOLDEN / f"{case}.npz").params)
    file = as_big_vision(expected, scan=scan, fold=True)
    weights = read_npz(save_npz(tmp_path / "bv.npz", **{f"params/{k}": v for k, v in file.items()}))
    if case == "vit_token":
        expected["cls"] = expected["cls"] + expected[POSEMB][:, :1]
        expected[POSEMB] = expected[POSEMB].copy()
        expected[POSEMB][:, 0] = 0
    assert weights.layout == "big_vision npz"
    assert_same(weights.params, expected)


def test_pooling_modules_at_the_root_become_a_head(tmp_path):
    old = {
        "probe": np.ones((1, 1, 4), np.float32),
        "LayerNorm_0/scale": np.ones(4, np.float32),
        "MlpBlock_0/Dense_0/bias": np.ones(8, np.float32),
        "MultiHeadDotProductAttention_0/query/bias": np.ones((2, 2), np.float32),
        "embedding/kernel": np.ones((2, 2, 3, 4), np.float32),
        "pos_embedding": np.ones((1, 4, 4), np.float32),
    }
    weights = read_npz(save_npz(tmp_path / "map.npz", **old))
    assert weights.model["classifier"] == "map"
    assert weights.params.keys() == {
        "MAPHead_0/probe",
        "MAPHead_0/LayerNorm_0/scale",
        "MAPHead_0/MlpBlock_0/Dense_0/bias",
        "MAPHead_0/MultiHeadDotProductAttention_0/query/bias",
        "embedding/kernel",
        POSEMB,
    }


def test_a_file_without_position_embeddings_has_fixed_ones(tmp_path):
    params = {k: v for k, v in read_npz(GOLDEN / "vit_gap.npz").params.items() if k != POSEMB}
    model = read_npz(save_npz(tmp_path / "fixed.npz", **params)).model
    assert model["position_embedding"] == "sincos2d"


def test_a_part_of_a_file_is_selected_by_name(tmp_path):
    image = read_npz(GOLDEN / "vit_gap.npz").params
    both = {f"params/img/{k}": v for k, v in image.items()}
    both |= {"params/txt/head/bias": np.ones(3, np.float32), "params/t": np.ones(1, np.float32)}
    path = save_npz(tmp_path / "two_towers.npz", **both)
    assert_same(read_npz(path, subtree="img").params, image)
    assert f"name the part to take: {path}:img" in refusal(path)
    with pytest.raises(UserError, match=r"two_towers\.npz:text: there is nothing of that name"):
        read_npz(path, subtree="text")


@pytest.mark.parametrize(
    "case", ["vit_token", "vit_gap", "vit_pre_logits", "hybrid_root", "hybrid_stages", "mixer"]
)
def test_a_written_file_is_the_published_one(tmp_path, case):
    write_npz(tmp_path / "out.npz", read_npz(GOLDEN / f"{case}.npz"))
    with np.load(GOLDEN / f"{case}.npz") as expected, np.load(tmp_path / "out.npz") as got:
        assert_same(dict(got), dict(expected))
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", "out.json"}


def test_what_the_layout_has_no_place_for_stands_beside_the_file(tmp_path):
    weights = read_npz(GOLDEN / "vit_gap.npz")
    model = weights.model | {"activation": "gelu_erf", "norm_epsilon": 1e-12}
    preprocess = {"mean": (0.4, 0.5, 0.6), "std": 0.5, "image_size": (32, 32)}
    write_npz(tmp_path / "w.npz", dataclasses.replace(weights, model=model, preprocess=preprocess))
    again = read_npz(tmp_path / "w.npz")
    assert (again.model, again.preprocess) == (model, preprocess)
    (tmp_path / "w.json").write_text("[")
    with pytest.raises(UserError, match=r"w\.json"):
        read_npz(tmp_path / "w.npz")


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
