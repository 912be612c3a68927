# SPDX-License-Identifier: Apache-2.0
"""The tables in the documentation are those of the results in the repository."""

from tools.mixed_tables import PAGE, START, TABLES, renew


def test_the_documentation_has_the_newest_results():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text
    assert all(START.format(name) in text for name in TABLES)
