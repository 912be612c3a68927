# SPDX-License-Identifier: Apache-2.0
"""The table of pods: what was compiled, what is arithmetic, what does not fit."""

from tools.pods_table import END, PAGE, START, config_of, load_results, make_table, renew

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
