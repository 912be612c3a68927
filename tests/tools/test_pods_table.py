# SPDX-License-Identifier: Apache-2.0
"""The table of pods: what was compiled, what is arithmetic, what does not fit."""

import pytest

from tools import pods_table
from tools.pods_table import (
    END,
    PAGE,
    START,
    config_of,
    fill_cell,
    load_results,
    make_table,
    make_topology,
    renew,
)
from vit_jax.planning.search import Candidate

GIB = 2**30
ESTIMATED = {
    "compiled": False,
    "fits": True,
    "accum_steps": 2,
    "images_per_device": 16.0,
    "peak_bytes": 3 * GIB,
    "hbm_limit_bytes": 16 * GIB,
    "overrides": "--config.mesh.data=-1 --config.mesh.fsdp=16 --config.model.remat=full",
}
COMPILED = ESTIMATED | {
    "compiled": True,
    "accum_steps": 1,
    "images_per_second_per_chip": 1234.5,
    "mfu_bound": 0.5,
    "expected_mfu": 0.25,
    "bound_by": "hbm",
}


def test_rows_say_what_is_known_and_from_where():
    table = make_table(
        {
            "S/16@v5e:4x4": COMPILED,
            "B/16@v5e:4x4": ESTIMATED,
            "L/16@v5e:4x4": {"compiled": False, "fits": False},
            "H/14@v5e:4x4": COMPILED | {"fits": False, "peak_bytes": 20 * GIB},
            "H/14@v5p:4x4x4": COMPILED | {"expected_mfu": None},
        }
    )
    way = "`mesh.fsdp=16 model.remat=full` |"
    speed = "1,234 images/s, MFU 25% | MFU 50%, hbm"
    assert f"| S/16 | v5e:4x4 | yes | 16 | 3.0 of 16.0 | {speed} | {way}" in table
    assert f"| B/16 | v5e:4x4 | yes * | 16 in 2 parts | 3.0 of 16.0 |  |  | {way}" in table
    assert "| L/16 | v5e:4x4 | no *: nothing fits |" in table
    assert "| H/14 | v5e:4x4 | no: 20.0 of 16.0 GiB |" in table
    assert "| H/14 | v5p:4x4x4 | yes | 16 | 3.0 of 16.0 |  | MFU 50%, hbm |" in table
    assert "| G/14 | v5e:4x4 | not looked at yet |" in table


def test_only_the_table_of_the_page_is_made_anew():
    page = f"before\n{START}old\n{END}after\n"
    assert renew(page, {}) == f"before\n{START}{make_table({})}{END}after\n"


def test_sizes_that_the_recipe_does_not_name_are_made_of_its_largest():
    assert config_of("B/16") == ("configs/vit_i1k.py:variant=B/16", {})
    assert config_of("G/14")[1]["model.variant"] == "G/14"


def test_the_page_shows_the_results_in_the_repository():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text, load_results()) == text


def test_slices_and_hosts_are_counted_before_the_name():
    hosts = make_topology("4xh200:8")
    assert (hosts.name, hosts.num_slices, hosts.num_devices) == ("h200:8", 4, 32)
    assert make_topology("v5e:4x4").num_slices == 1


@pytest.mark.parametrize(
    ("name", "fits", "compiled"),
    [
        ("h100:8", True, [False]),  # on GPUs a scan is only for what does not fit without one
        ("4xh200:8", False, [False] * 3 + [True] * 3),
        ("v5e:4x4", True, [False, True]),
    ],
)
def test_a_cell_is_compiled_unrolled_and_as_a_scan(monkeypatch, tmp_path, name, fits, compiled):
    def candidate(scan, size):
        remat = "dots" if scan else "none"
        overrides = {"model.remat": remat, "model.scan": scan, "optimizer.accum_steps": 1}
        return Candidate(overrides, {}, 8, size, size, 1.0, 64)

    candidates = [candidate(scan, size) for scan in (False, True) for size in (1, 2, 3)]
    calls = []

    def plan(arguments, overrides):
        calls.append(overrides["model.scan"])
        assert f"--num_slices={make_topology(name).num_slices}" in arguments
        return {"fits": fits, "images_per_second_per_chip": 2 if overrides["model.scan"] else 1}

    monkeypatch.setattr(pods_table, "find_candidates", lambda *_: candidates)
    monkeypatch.setattr(pods_table, "plan_in_subprocess", plan)
    cell = fill_cell("S/16", name, tmp_path, ("unrolled", "scan"))
    assert calls == compiled
    assert cell["fits"] == fits
    if fits:
        assert f"model.scan={compiled[-1]}" in cell["overrides"]
