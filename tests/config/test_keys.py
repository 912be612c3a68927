# SPDX-License-Identifier: Apache-2.0
"""All keys of a config, and the errors about those that it does not have."""

import pytest

from tests.tiny import tiny_config
from vit_jax.config.build import build_parts
from vit_jax.config.keys import list_keys
from vit_jax.utils.errors import UserError
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.suggestions import known_keys


def test_the_list_has_every_key_of_a_resolved_config(data_dir):
    parts = build_parts(tiny_config(data_dir))
    assert flatten_config(parts.config).keys() <= list_keys(("val",)).keys()


def test_a_key_of_some_parts_names_them():
    keys = list_keys()
    assert keys["model.tokens_mlp_dim"] == ("mixer",)
    assert keys["model.hidden_size"] == ("vit", "mixer")
    assert keys["model.dtype"] == ()
    assert keys["model.text.hidden_size"] == ("two_towers",)
    assert "model.text.constrain" not in keys
    assert keys["mesh.data"] == ()
    assert "optimizer.base" not in keys


def test_every_key_that_is_suggested_exists():
    suggested = {key for key in known_keys() if not key.startswith("--") and " " not in key}
    assert suggested <= list_keys().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1}, "unknown config key lr; did you mean '--config.optimizer.lr'?"),
        ({"evals__val__batchsize": 1}, "did you mean '--config.evals.val.batch_size'?"),
        ({"optimizer__momentum": 1}, "optimizer.momentum; it is a key of optimizer.name='ada"),
        ({"optimizer__sam": {"roh": 1}}, "did you mean '--config.optimizer.sam.rho'?"),
        ({"optimizer__name": "adamW"}, "optimizer.name='adamW' is unknown; did you mean 'adamw'?"),
        ({"objective__loss": "bce"}, "did you mean 'sigmoid'?"),
        ({"model__name": "vit_base_patch16_224"}, "--config.model.variant=B/16?"),
        ({"model__variant": "vit_base_patch16_224"}, "did you mean 'B/16'?"),
        (
            {"optimizer": "adamw"},
            "optimizer='adamw' is a str; expected dict: set --config.optimizer.name",
        ),
        (
            {"trainer__max_epochs": 3},
            "unknown config key trainer.max_epochs; did you mean '--config.epochs'?",
        ),
        ({"optimizer__class_path": "AdamW"}, "did you mean '--config.optimizer.name'?"),
        ({"optimizer__schedule": "CosineAnnealingLR"}, "did you mean 'cosine'?"),
        ({"base_lr": 0.1}, "unknown config key base_lr; did you mean '--config.optimizer.lr'?"),
        ({"epochs": 3}, "add --config.total_steps=none or --config.epochs=none"),
        ({"total_steps": None}, "expected exactly one of them, such as --config.epochs=10"),
        (
            {"optimizer__warmup_epochs": 1},
            "--config.optimizer.warmup_steps=none or --config.optimizer.warmup_epochs=none",
        ),
    ],
)
def test_an_error_says_which_key_is_meant(changes, message, data_dir):
    with pytest.raises(UserError) as error:
        build_parts(tiny_config(data_dir, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_duration_that_is_none_gives_way_to_one_in_another_unit(data_dir):
    changes = {
        "total_steps": None,
        "epochs": 1,
        "optimizer__warmup_steps": None,
        "optimizer__warmup_percent": 10,
        "evals__val__every": None,
        "evals__val__every_epochs": 1,
        "checkpoint__every": None,
        "checkpoint__every_epochs": 1,
        "log_every": None,
        "log_every_percent": 10,
    }
    parts = build_parts(tiny_config(data_dir, **changes))
    steps = parts.total_steps
    assert parts.settings.checkpoint.every == parts.evaluators[0].every == steps
    assert parts.settings.log_every == round(steps / 10)


def test_a_variant_is_recorded_by_its_own_name(data_dir):
    sizes = dict.fromkeys(("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"))
    config = tiny_config(data_dir, model=sizes | {"variant": "ViT-Ti_8"})
    assert build_parts(config).config["model"]["variant"] == "Ti/8"
