# SPDX-License-Identifier: Apache-2.0
"""Every config builds, on eight devices and without its data."""

from pathlib import Path

import pytest

from vit_jax.experiment import Experiment
from vit_jax.main import load_config
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import count

CONFIGS = Path(__file__).parent.parent / "configs"

# Config with arguments, number of parameters, image size.
BUILDS = [
    ("digits.py", 119_242, 16),
    ("digits_finetune.py", 119_242 - 48 * 49 + 48 * 48, 32),
    ("vit.py:b16,cifar10", 86_567_656 - 990 * 769 + (576 - 196) * 768, 384),
    ("vit.py:l32,imagenet2012", 306_535_400 + (144 - 49) * 1024, 384),
    ("vit.py:s16,cifar100", 22_050_664 - 900 * 385 + (576 - 196) * 384, 384),
    ("vit_i1k.py:variant=B/16", 86_567_656 + 769 * 768, 224),
    ("vit_i1k.py:variant=Ti/16", 5_717_416 + 193 * 192, 224),
]


@pytest.mark.parametrize(("config", "parameters", "size"), BUILDS, ids=[b[0] for b in BUILDS])
def test_config_builds(config, parameters, size, tmp_path):
    config = load_config(str(CONFIGS / config), {"data.data_dir": str(tmp_path)})
    experiment = Experiment.from_config(config)
    assert count(experiment.abstract_state.params) == parameters
    assert experiment.abstract_batch["image"].shape[1:] == (size, size, 3)
    assert experiment.evaluators


def test_every_config_is_built_here():
    assert {p.name for p in CONFIGS.glob("*.py")} == {b[0].partition(":")[0] for b in BUILDS}


@pytest.mark.parametrize(
    "config",
    ["vit.py:x16,cifar10", "vit.py:b16,cifar11", "vit.py:b16", "vit_i1k.py:B/16"],
)
def test_wrong_arguments_are_refused(config):
    with pytest.raises(UserError, match="--config: "):
        load_config(str(CONFIGS / config), {})


def test_recipes_stay_short():
    for file in CONFIGS.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 120, file.name
