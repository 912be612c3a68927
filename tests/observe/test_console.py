# SPDX-License-Identifier: Apache-2.0
"""Lines on the screen are what was logged."""

import logging

import pytest

from vit_jax.observe import console


@pytest.mark.parametrize("line", ["folder:one: no images", ":smile: [red]x[/red]", "a:b:c:100: 1"])
def test_a_line_is_printed_as_it_is(line, capsys, monkeypatch):
    monkeypatch.setattr(console.console, "quiet", False)
    monkeypatch.setattr(console.console, "stderr", False)
    console.log(line)
    console._ConsoleHandler().emit(logging.makeLogRecord({"msg": line}))
    assert capsys.readouterr().out == f"{line}\n" * 2
