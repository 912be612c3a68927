# SPDX-License-Identifier: Apache-2.0
"""The loop: what it allows around a step."""

import jax
import pytest

from tests.tiny import tiny_config
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train


class FromTheHost(Experiment):
    """Hands over batches that are still in the memory of the host."""

    def train_batches(self, step, *, corrupt=None):
        return (jax.device_get(batch) for batch in super().train_batches(step, corrupt=corrupt))


def test_a_copy_to_the_device_within_a_step_is_an_error(tmp_path, data_dir):
    config = tiny_config(data_dir, evals={})
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        train(config, tmp_path, make_experiment=FromTheHost.from_config)
