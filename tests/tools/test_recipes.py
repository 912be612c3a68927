# SPDX-License-Identifier: Apache-2.0
"""The page of recipes is what the configs say."""

import re

from tools.recipes import CONFIGS, PAGE, read_docstring, renew


def test_the_documentation_has_every_config_as_it_is():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text
    sections = re.findall(r"^## `(.+)`$", text, flags=re.MULTILINE)
    assert sections == sorted(file.name for file in CONFIGS.glob("*.py"))


def test_each_config_starts_with_a_command_that_names_it():
    for file in CONFIGS.glob("*.py"):
        assert f"--config=configs/{file.name}" in read_docstring(file)[1]


def test_results_stand_in_the_table():
    text = PAGE.read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| [`deit.py`]"))
    assert "300 epochs" in row
    assert "1,024" in row
    assert "S/16 79.9 %" in row
