# SPDX-License-Identifier: Apache-2.0
"""The tables in the documentation are those of the results in the repository."""

import json

import pytest

from tools.performance_tables import PAGE, RESULTS, TABLES, renew


@pytest.mark.parametrize("name", TABLES)
def test_the_documentation_has_the_newest_results(name):
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text
    results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert f"on {results['date'][:10]}: {results['machine']['cores']} cores of" in text
