# SPDX-License-Identifier: Apache-2.0
from vit_jax.utils.nested import flatten_config


def test_a_config_is_flattened_to_dotted_keys():
    config = {"a": {"b": 1, "c": {"d": (2, 3)}}, "e": None, "f": {}}
    assert flatten_config(config) == {"a.b": 1, "a.c.d": (2, 3), "e": None, "f": {}}
