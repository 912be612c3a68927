# SPDX-License-Identifier: Apache-2.0
"""What the configs come to changes only on purpose."""

import pytest

from tools.config_dumps import CONFIGS, DUMPS, _collapse, dump_config

FILES = sorted(CONFIGS.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_parameters_and_rates_of_a_config_are_as_written_down(file, data_dir):
    want = (DUMPS / f"{file.stem}.txt").read_text()
    assert dump_config(file, data_dir=data_dir) == want, "if that is meant: make golden"


def test_every_dump_is_of_a_config():
    assert {p.stem for p in DUMPS.iterdir()} == {p.stem for p in FILES}


def test_equal_blocks_are_one_line_and_others_stay():
    lines = [("cls", "a"), *((f"T/encoderblock_{i}/LayerNorm_0/bias", "b") for i in range(3))]
    lines += [("T/encoderblock_3/LayerNorm_0/bias", "frozen"), ("MixerBlock_0/x", "b")]
    assert list(_collapse(lines)) == [
        "cls  a",
        "T/encoderblock_{0..2}/LayerNorm_0/bias  b",
        "T/encoderblock_3/LayerNorm_0/bias  frozen",
        "MixerBlock_0/x  b",
    ]
