# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of speed and scale, in closed form."""

import pytest

from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.scale import predict
from vit_jax.planning.text import describe_scale
from vit_jax.planning.topologies import parse_topology
from vit_jax.runtime.chips import GPUS, TPUS

V5E = TPUS["v5e"]


@pytest.mark.parametrize(
    ("busy", "bound_by"),
    [
        ((0.4, 0.3, 0.2, 0.1), "compute"),
        ((0.1, 0.4, 0.3, 0.2), "hbm"),
        ((0.1, 0.2, 0.4, 0.3), "ici"),
        ((0.1, 0.2, 0.3, 0.4), "dcn"),
    ],
)
def test_a_step_takes_as_long_as_its_busiest_unit(busy, bound_by):
    compute, hbm, ici, dcn = busy
    work = Work(
        flops=compute * V5E.flops,
        model_flops=0.1 * V5E.flops,
        hbm_bytes=hbm * V5E.hbm_bandwidth,
        ici_bytes=ici * V5E.ici_bandwidth,
        dcn_bytes=dcn * V5E.dcn_bandwidth,
    )
    roofline = make_roofline(work, V5E)
    assert roofline.step_seconds == pytest.approx(0.4)
    assert roofline.bound_by == bound_by
    assert roofline.mfu_bound == pytest.approx(0.25)


def test_work_that_is_done_again_lowers_the_bound_of_mfu():
    work = Work(flops=4e12, model_flops=3e12, hbm_bytes=0, ici_bytes=0, dcn_bytes=0)
    assert make_roofline(work, V5E).mfu_bound == pytest.approx(0.75)


def point(batch_size, *, hbm, ici):
    return {
        "batch_size": batch_size,
        "num_devices": 16,
        "num_slices": 1,
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
        "predicted": {"params": 10**9},
        "flops_per_device": batch_size / 16 * 1e10,
        "model_flops_per_device": batch_size / 16 * 1e10,
        "hbm_bytes": hbm,
        "ici_bytes": ici,
        "step_seconds": 1.0,
        "expected_seconds": None,
    }


@pytest.fixture(scope="module")
def points():
    # 1e9 bytes of parameters and 1e7 an image; the gradients once around a ring of 16.
    ring = 2 * 15 / 16 * 1e9
    return [point(4096, hbm=1e9 + 256e7, ici=ring), point(2048, hbm=1e9 + 128e7, ici=ring)]


def test_a_compiled_point_is_reproduced(points):
    (row,) = predict(points, parse_topology("v5e:4x4"), [16])
    assert row.images_per_device == 256
    assert row.step_seconds == pytest.approx(256e10 / V5E.flops)
    assert row.ici_bytes == pytest.approx(2 * 15 / 16 * 1e9)
    assert (row.dcn_bytes, row.efficiency, row.scales) == (0, 1.0, True)


def test_slices_are_joined_by_the_network(points):
    _, row = predict(points, parse_topology("v5e:4x4"), [256, 1024])
    assert row.slices == 4
    # Of the sums of a slice each of its 256 devices exchanges a share with the 3 other slices.
    assert row.dcn_bytes == pytest.approx(2 * 3 / 4 * 1e9 / 256)
    assert row.ici_bytes == pytest.approx(2 * 255 / 256 * 1e9)


def test_the_recipe_ends_where_transfers_do_not_shrink_or_images_run_out(points):
    topology = parse_topology("v5e:4x4")
    rows = predict(points, topology, [16, 256, 8192])
    assert rows[1].bound_by == "ici"
    assert [row.scales for row in rows] == [True, False, False]
    assert rows[2].images_per_device < 1
    text = "\n".join(describe_scale(rows, points, topology))
    assert text.startswith("batch 4,096, at best; compiled for 16 chips")
    assert "256 *" in text
    assert "stops scaling before 256 chips, bound by ici" in text


def timed_point(batch_size):
    """On a host of GPUs: 10 ms and 0.1 ms an image; of 4 ms of transfers 1 ms is waited for."""
    kernels = 10e-3 + batch_size / 8 * 1e-4
    return point(batch_size, hbm=0, ici=2 * 7 / 8 * 1e9) | {
        "num_devices": 8,
        "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
        "flops_per_device": batch_size / 8 * 1e9,
        "model_flops_per_device": batch_size / 8 * 1e9,
        "kernel_seconds": kernels,
        "transfer_seconds": 4e-3,
        "wait_seconds": 1e-3,
        "expected_seconds": kernels + 1e-3,
    }


def test_gpus_scale_by_the_time_of_kernels_and_waits():
    topology, chip = parse_topology("h100:8"), GPUS["h100"]
    points = [timed_point(1600), timed_point(800)]
    rows = predict(points, topology, [8, 32])
    kernels = [10e-3 + 200e-4, 10e-3 + 50e-4]
    # Of the 1e9 bytes, each device sends 7/8 twice within its host, and of its eighth 3/4 twice to
    # the other three.
    links = [2 * 7 / 8 * 1e9 / chip.ici_bandwidth / 0.8] * 2
    links[1] += 2 * 3 / 4 * 1e9 / 8 / chip.dcn_bandwidth / 0.8
    hidden = [3e-3 * busy / kernels[0] for busy in kernels]
    for row, busy, sent, hides in zip(rows, kernels, links, hidden, strict=True):
        assert row.step_seconds == pytest.approx(busy + max(sent - hides, 0))
        assert row.images_per_second == pytest.approx(1600 / row.step_seconds)
        assert row.mfu == pytest.approx(1600 / row.chips * 1e9 / chip.flops / row.step_seconds)
    assert [row.slices for row in rows] == [1, 4]
    text = "\n".join(describe_scale(rows, points, topology))
    assert text.startswith("batch 1,600, expected; compiled for 8 chips")
    assert "hosts" in text
    assert "NVLink" in text


def test_a_part_of_a_host_grows_to_a_whole_one_before_there_are_two():
    points = [timed_point(1600), timed_point(800)]
    alone = predict(points, parse_topology("h100:2"), [2, 8, 16])
    assert [row.slices for row in alone] == [1, 1, 2]
    small_hosts = predict(points, parse_topology("h100:4", num_slices=2), [4, 8, 16])
    assert [row.slices for row in small_hosts] == [1, 2, 4]
