# SPDX-License-Identifier: Apache-2.0
"""The page on Python names what there is."""

import importlib
import re

import vit_jax
from tests.docs.blocks import ROOT

NAMED = re.findall(
    r"^\.\. auto\w+:: (.+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
)


def test_everything_public_is_on_the_page():
    public = {f"vit_jax.{name}" for name in vit_jax.__all__ if name != "__version__"}
    assert {name for name in NAMED if name.count(".") == 1} - {"vit_jax.losses"} == public


def test_everything_on_the_page_exists():
    for name in NAMED:
        module, _, attribute = name.rpartition(".")
        assert name == "vit_jax.losses" or hasattr(importlib.import_module(module), attribute), name
