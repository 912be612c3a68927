# SPDX-License-Identifier: Apache-2.0
"""Datasets of 20 million rows start within a minute, in memory that grows by some bytes a row."""

import pytest

from benchmarks.large_data import SOURCES, measure, measure_apart, write_source

# Most bytes that a row may need while its source is opened, by measurement and some room.
BYTES = {"tar": 150, "manifest": 200, "raw": 100}


@pytest.mark.parametrize("kind", SOURCES)
def test_invented_rows_are_read_as_a_dataset(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    found = measure(write_source(kind, tmp_path / "data", 12_000))
    # A source without splits is cut: about 80 % of each class are to train on.
    assert found["rows"] == (10_000 if kind == "manifest" else 12_000)
    assert found["mixture_us"] > 0
    assert ("window_us" in found) == (kind != "manifest")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_20_million_rows_start_within_a_minute(kind, tmp_path):
    rows = 20_000_000
    found = measure_apart(kind, rows, tmp_path)
    # Of the processor, as the machine may do other work.
    assert found["cpu_seconds"] < 60
    assert found["peak_gb"] * 1e9 < BYTES[kind] * rows
    for order in ("shuffle", "mixture"):
        assert found[f"{order}_us"] < 100
