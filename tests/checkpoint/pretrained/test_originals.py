# SPDX-License-Identifier: Apache-2.0
"""Files of DINOv3 and ViT-5 by the names of their own repositories."""

import re

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.pretrained.test_safetensors import (
    GOLDEN,
    assert_same,
    random_params,
    raw_tensors,
    read_case,
    refusal,
)
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, write_tensors
from vit_jax.checkpoint.pretrained.timm_tensors import to_timm

NAMES = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^embeddings\.", ""),
    (r"^layer\.", "blocks."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"attention\.o_proj", "attn.proj"),
)


def dinov3(name, mlp):
    """Returns the tensors of a case of Hugging Face as the file of the repository has them."""
    found = dict(raw_tensors(GOLDEN / name / "model.safetensors")[0])
    tensors = {"rope_embed.periods": (100.0 ** (np.arange(2) / 2)).astype(ml_dtypes.bfloat16)}
    for i in range(2):
        parts = [found.pop(f"layer.{i}.attention.{x}_proj.weight") for x in "qkv"]
        tensors[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(parts)
        biases = [found.pop(f"layer.{i}.attention.{x}_proj.bias", None) for x in "qv"]
        if biases[0] is not None:
            # The bias of keys is masked, whatever the file has.
            biases.insert(1, np.full(32, 7, np.float32))
            tensors[f"blocks.{i}.attn.qkv.bias"] = np.concatenate(biases)
            tensors[f"blocks.{i}.attn.qkv.bias_mask"] = np.full(96, np.nan, np.float32)
    for old, x in found.items():
        new = old
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        for theirs, ours in mlp.items():
            new = new.replace(f"mlp.{theirs}.", f"mlp.{ours}.")
        tensors[new] = x[0] if new == "mask_token" else x
    return tensors


@pytest.mark.parametrize(
    ("name", "mlp"),
    [
        ("hf_dinov3", {"up_proj": "fc1", "down_proj": "fc2"}),
        ("hf_dinov3_gated", {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}),
    ],
)
def test_dinov3_is_read_by_the_names_of_its_repository(name, mlp, tmp_path):
    tensors = dinov3(name, mlp) | {"local_cls_norm.weight": np.ones(32, np.float32)}
    write_tensors(tmp_path / "dinov3.safetensors", tensors, metadata={})
    weights, expected = read_safetensors(tmp_path / "dinov3.safetensors"), read_case(name)
    assert weights.layout == "DINOv3 safetensors"
    assert_same(weights.params, expected.params)
    assert_same(weights.objective_params, expected.objective_params)
    assert {**weights.model, "rope_reference_grid": None} == {
        **expected.model,
        "rope_reference_grid": None,
    }
    assert any(note.startswith("local_cls_norm: ") for note in weights.notes)


def test_other_periods_are_refused(tmp_path):
    tensors = dinov3("hf_dinov3", {}) | {"rope_embed.periods": np.ones(2, np.float32)}
    write_tensors(tmp_path / "dinov3.safetensors", tensors, metadata={})
    assert "rope_embed.periods" in refusal(read_safetensors, tmp_path / "dinov3.safetensors")


def vit5(tmp_path, **changes):
    plain = {"norm": "rms_norm", "qk_norm": True, "qkv_bias": "none", "num_registers": 4}
    plain |= {"layer_scale_init": 1e-5, "activation": "gelu_erf", "norm_epsilon": 1e-6}
    params, model = random_params(**plain)
    # The class token has no position there.
    params["Transformer/posembed_input/pos_embedding"][:, 0] = 0
    tensors = to_timm(params, model=model, grid=(4, 4))
    for i in range(2):
        for name, base in (("rope", 1e4), ("rope_reg", 100.0)):
            tensors[f"blocks.{i}.attn.{name}.freqs"] = base ** -(np.arange(2, dtype=np.float32) / 2)
    renamed = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): x for n, x in tensors.items()} | changes
    write_tensors(tmp_path / "vit5.safetensors", renamed, metadata={})
    return tmp_path / "vit5.safetensors", params, model


def test_vit5_is_read_by_the_names_of_its_repository(tmp_path):
    path, params, model = vit5(tmp_path)
    weights = read_safetensors(path)
    assert weights.layout == "ViT-5 safetensors"
    assert_same(weights.params, params)
    expected = {**model, "patch_size": (8, 8), "rope_theta": 1e4, "rope_register_theta": 100.0}
    assert {key: weights.model[key] for key in expected} == expected


def test_frequencies_that_are_no_powers_are_refused(tmp_path):
    odd = np.array([1.0, 2.0], np.float32)
    path, _, _ = vit5(tmp_path, **{"blocks.1.attn.rope.freqs": odd})
    assert "blocks.*.attn.rope.freqs" in refusal(read_safetensors, path)
