# SPDX-License-Identifier: Apache-2.0
"""Cycles of kernels, read from what libtpu writes."""

import pytest

from tools.tpu_schedule import KERNELS, count_cycles
from vit_jax.models import attention_tpu


def test_the_bundles_of_a_schedule_are_its_cycles():
    analysis = "Schedule analysis:\n\ttotal scheduled bundles:    1042\n\tempty: 9\n"
    assert count_cycles(analysis) == 1042
    with pytest.raises(SystemExit, match="total scheduled bundles"):
        count_cycles("something else")


def test_the_kernels_have_the_names_that_are_looked_for():
    kernels = (attention_tpu._forward_heads, attention_tpu._backward_heads)
    assert tuple(f"attention{kernel.__name__}" for kernel in kernels) == KERNELS
