# SPDX-License-Identifier: Apache-2.0
"""Kernels are compared with plain XLA before a run; formulas take the place of kernels on a CPU."""

import jax.numpy as jnp
import pytest

from tests.tiny import tiny_config
from vit_jax.models import attention
from vit_jax.models.text import TextTransformer
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import run
from vit_jax.training.kernel_check import check_kernels
from vit_jax.utils.errors import UserError

SHAPE = (8, 8, 3)
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "num_classes": 4}
ORIGINAL = attention.fused_attention


def make_vit(**changes):
    options = {"patch_size": (4, 4), "dtype": "bfloat16", "dropout_rate": 0.1, "scan": True}
    return VisionTransformer(
        **(SIZES | options | {"attention": "fused", "blocks": "xla"} | changes)
    )


@pytest.fixture
def kernel(monkeypatch):
    """Replaces the kernel by its formula, and what the formula returns by a function of that."""

    def replace(change):
        def formula(query, key, value, **options):
            return change(ORIGINAL(query, key, value, **options, implementation="xla"))

        monkeypatch.setattr(attention, "fused_attention", formula)

    return replace


def test_right_kernel_is_compared_and_named(kernel, said):
    kernel(lambda x: x)
    check_kernels(make_vit(), SHAPE)
    (line,) = said
    assert line.startswith("model.attention='fused': compared with XLA on one block")


@pytest.mark.parametrize("per_row", [1, 3])
def test_rows_are_compared_with_their_masks(per_row, kernel, said, monkeypatch):
    options = {"any_size": True, "posemb_grid": (2, 2), "classifier": "gap"}
    kernel(lambda x: x)
    check_kernels(make_vit(**options), (4 * 13, 4, 3), per_row=per_row)
    assert len(said) == 1

    def forget(query, key, value, **options):
        return ORIGINAL(query, key, value, length=query.shape[1], implementation="xla")

    monkeypatch.setattr(attention, "fused_attention", forget)
    with pytest.raises(UserError, match="other gradients than XLA"):
        check_kernels(make_vit(**options), (4 * 13, 4, 3), per_row=per_row)


def test_both_towers_are_compared(kernel, said):
    kernel(lambda x: x)
    text = TextTransformer(**SIZES, vocab_size=7, context_length=8, attention="fused", blocks="xla")
    check_kernels(TwoTowers(img=make_vit(), txt=text), SHAPE)
    assert len(said) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 1.5 * x,
        lambda x: x.at[:, 0].set(0),
        lambda x: x * jnp.nan,
        lambda x: jnp.roll(x, 1, axis=1),
    ],
    ids=["scaled", "a token is lost", "nan", "tokens are shifted"],
)
def test_wrong_kernel_is_refused(kernel, wrong):
    kernel(wrong)
    with pytest.raises(
        UserError, match=r"other gradients than XLA.*set --config.model.attention=xla"
    ):
        check_kernels(make_vit(), SHAPE)


def test_kernel_that_fails_is_refused(kernel):
    def fail(x):
        raise RuntimeError("no kernel image is available")

    kernel(fail)
    with pytest.raises(
        UserError, match=r"can't run on this device .*no kernel image.*attention=xla"
    ):
        check_kernels(make_vit(), SHAPE)


def test_model_without_kernels_is_not_computed(said, monkeypatch):
    monkeypatch.setattr(VisionTransformer, "init", None)
    check_kernels(make_vit(attention="xla"), SHAPE)
    assert not said


def test_run_with_a_wrong_kernel_writes_nothing(data_dir, tmp_path, monkeypatch):
    def refuse(model, image_shape, *, per_row):
        raise UserError(f"model.blocks='fused' on images of {image_shape}")

    monkeypatch.setattr(run, "check_kernels", refuse)
    with pytest.raises(UserError, match=r"images of \(8, 8, 3\)"):
        run.train(tiny_config(data_dir), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
