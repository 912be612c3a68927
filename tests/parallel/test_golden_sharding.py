# SPDX-License-Identifier: Apache-2.0
"""Where each parameter of the presets lies changes on purpose only."""

import pytest

from tests.testdata.make_sharding_golden import FOLDER, PRESETS, render


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_the_presets_lie_where_they_did(preset):
    golden = (FOLDER / f"{preset}.txt").read_text()
    assert render(preset) == golden, "if that is meant: make golden"
