# SPDX-License-Identifier: Apache-2.0
"""The programs that the training step is compared with."""

import json

import pytest

from benchmarks.step import PEERS, VARIATIONS, make_command, parse_variant
from vit_jax.config.precision import PRECISIONS


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ti/16", ("Ti/16", 224, 32)),
        ("S/16:256", ("S/16", 224, 256)),
        ("L/16@384:16", ("L/16", 384, 16)),
    ],
)
def test_a_variant_may_have_a_size_and_a_batch_size(text, found):
    assert parse_variant(text) == found


@pytest.mark.parametrize("text", ["S", "S/16@", "S/16:x", "S/32"])
def test_other_variants_are_refused(text):
    with pytest.raises(SystemExit, match=rf"--variants {text}: expected NAME"):
        parse_variant(text)


@pytest.mark.parametrize("peer", [*PEERS, *VARIATIONS])
def test_each_peer_has_an_interpreter_and_a_program(peer):
    command = make_command(peer, "B/16", 224, 8, "torch", tcmalloc="lib.so")
    *_, program, name, variant, size, batch_size, overrides = command
    assert program.endswith("step_peers.py")
    assert name == ("vit_jax" if peer in VARIATIONS else peer)
    assert (variant, size, batch_size) == ("B/16", "224", "8")
    assert ("torch" in command) == peer.startswith("timm")
    assert ("LD_PRELOAD=lib.so" in command) == (peer == "vit_jax_tcmalloc")
    assert json.loads(overrides).get("precision") in (None, *PRECISIONS)
