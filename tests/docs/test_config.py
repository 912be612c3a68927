# SPDX-License-Identifier: Apache-2.0
"""The page on the config lists its keys, and its example can be trained."""

import dataclasses
import re

from tests.docs.blocks import ROOT, write_modules
from vit_jax.config.build import build_parts
from vit_jax.config.load import load_config
from vit_jax.config.schema import Config, may_change

PAGE = ROOT / "docs" / "config.md"


def test_every_key_has_a_row_that_tells_whether_it_may_change():
    rows = re.findall(r"^\| (`.*?) \| (yes|) ?\| ", PAGE.read_text(), flags=re.MULTILINE)
    listed = {key: mark == "yes" for keys, mark in rows for key in re.findall(r"`(\w+)`", keys)}
    for field in dataclasses.fields(Config):
        assert listed[field.name] == may_change(field.name), field.name


def test_the_example_is_a_config(tmp_path):
    write_modules(PAGE, tmp_path)
    parts = build_parts(load_config(str(tmp_path / "my_config.py"), {}))
    assert parts.total_steps == 400
    assert parts.train_data.batch_size == 64
