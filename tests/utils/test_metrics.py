# SPDX-License-Identifier: Apache-2.0
"""What follows from the name of a metric."""

import pytest

from vit_jax.utils.metrics import describe_metric, format_value, lower_is_better


@pytest.mark.parametrize(
    ("name", "label", "text", "lower"),
    [
        ("val/loss", "loss", "0.125", True),
        ("train/loss_0.1", "loss", "0.125", True),
        ("val/0.1_loss", "loss", "0.125", True),
        ("val/top1", "accuracy", "12.50 %", False),
        ("train/top1_0.1", "accuracy", "12.50 %", False),
        ("val_ema/real_top1", "accuracy", "12.50 %", False),
        ("fewshot/10shot", "accuracy", "12.50 %", False),
        ("knn/20nn", "accuracy", "12.50 %", False),
        ("val/ece", "calibration error", "12.50 %", True),
        ("val/mAP", "average precision", "12.50 %", False),
        ("perf/mfu", "peak", "12.50 %", False),
        ("train/lr", "learning rate", "0.125", False),
        ("mine/my_score", "my score", "0.125", False),
    ],
)
def test_a_name_says_what_is_measured(name, label, text, lower):
    assert describe_metric(name).label == label
    assert format_value(name, 0.125) == text
    assert lower_is_better(name) == lower
