# SPDX-License-Identifier: Apache-2.0
"""The table in the documentation is that of the results in the repository."""

import json

from tools.input_table import LABELS, PAGE, RESULTS, renew


def test_the_documentation_has_the_newest_results():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["machine"]["cpu"] in text
    for measured in results["results"].values():
        assert set(measured["loaders"]) <= set(LABELS)
        speed = measured["loaders"]["vit_jax"]["images_per_core"]
        assert f"| **vit_jax** | {speed:,.0f} | 1.00 |" in text
