# SPDX-License-Identifier: Apache-2.0
"""Plans of a small run, compiled for the CPUs of the tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from tests.pairs import IMAGE, TEXT, pairs_config
from tests.teacher import write_teacher
from tests.tiny import tiny_config
from vit_jax import plan as command
from vit_jax.config.load import override_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.planning import compiled, search
from vit_jax.planning.compiled import parse_size
from vit_jax.planning.memory import find_saved
from vit_jax.planning.plan import _warn_of_slow_axes, make_plan
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.search import (
    Candidate,
    could_fit,
    format_overrides,
    make_candidates,
)
from vit_jax.planning.text import (
    describe_kernels,
    describe_plan,
    describe_remedies,
    describe_search,
)
from vit_jax.planning.topologies import make_devices, parse_topology
from vit_jax.runtime.chips import GPUS
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

KEYS = {
    "fits",
    "hbm_limit_bytes",
    "peak_bytes",
    "argument_bytes",
    "temp_bytes",
    "flops_per_device",
    "collectives",
    "step_seconds",
    "mfu_bound",
}


def small_config(**changes):
    """A model whose activations outweigh the rest, prepared, with no dataset on disk."""
    sizes = {"hidden_size": 64, "mlp_dim": 256, "num_layers": 2, "scan": True}
    sizes = {f"model__{key}": value for key, value in sizes.items()}
    config = tiny_config("nowhere", **sizes, data__batch_size=256, **changes)
    return reduce_for_planning(config.to_dict(), num_classes=16, image_size=32)


@pytest.fixture(scope="module", autouse=True)
def no_gpu_compiler():
    """CPUs take the place of GPUs, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_jax.planning.gpus.find_version", lambda name: None)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def candidates():
    return make_candidates(small_config(), parse_topology("h100:2"), images_per_device=(64, 128))


@pytest.fixture(scope="module")
def plan(cache):
    config = small_config(mesh__fsdp=2, mesh__tensor=2)
    return make_plan(config, parse_topology("h100:4", num_slices=2), cache=cache)


def test_state_and_batch_are_predicted_exactly_and_the_rest_about_right(plan):
    parts = ("params", "opt_state", "ema_params", "batch")
    assert sum(plan["predicted"][p] for p in parts) == plan["argument_bytes"]
    rest = plan["predicted"]["gradients"] + plan["predicted"]["activations"]
    assert 0.5 < rest / plan["temp_bytes"] < 2


def test_a_plan_has_memory_speed_and_transfers_along_all_axes(plan):
    assert plan["fits"]
    assert plan["hbm_limit_bytes"] == GPUS["h100"].hbm_bytes
    assert plan["peak_bytes"] >= plan["argument_bytes"] + plan["temp_bytes"]
    axes = {axis for c in plan["collectives"] for axis in c["axes"]}
    assert axes == {"data", "fsdp", "tensor"}
    assert plan["ici_bytes"] > 0
    assert plan["dcn_bytes"] > 0
    assert plan["images_per_second_per_chip"] == pytest.approx(256 / plan["step_seconds"] / 8)
    assert 0 < plan["mfu_bound"] < 1
    assert set(json.loads(json.dumps(plan))) >= KEYS


def test_images_of_packed_rows_are_counted_and_not_the_rows(cache):
    data = {"preprocess": "decode|patches(4, 32)", "images_per_row": 4, "batch_size": 32}
    changes = {f"data__{key}": value for key, value in data.items()}
    model = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 1, "patch_size": 4}
    model |= {"posemb_grid": (8, 8), "classifier": "gap"}
    changes |= {f"model__{key}": value for key, value in model.items()}
    config = tiny_config("nowhere", **changes)
    config = reduce_for_planning(config.to_dict(), num_classes=16)
    plan = make_plan(config, parse_topology("h100:2"), cache=cache)
    assert plan["batch_size"] == 32
    assert plan["images_per_device"] == 16
    assert plan["images_per_second_per_chip"] == pytest.approx(32 / plan["step_seconds"] / 2)
    # 8 rows, over 2 devices, of 33 patches in a column, with places of 32 and 4 grids and labels.
    row = 33 * 4 * 4 * 3 + 4 * (32 * 3 + 4 * 2 + 4)
    assert plan["predicted"]["batch"] == 4 * row
    parts = ("params", "opt_state", "ema_params", "batch")
    assert sum(plan["predicted"][part] for part in parts) == plan["argument_bytes"]
    # Both count four rows a device; the second without attention to padding and the like.
    assert 0.5 < plan["model_flops_per_device"] / plan["flops_per_device"] < 1.5
    rest = plan["predicted"]["gradients"] + plan["predicted"]["activations"]
    assert 0.5 < rest / plan["temp_bytes"] < 1.5


def test_what_the_compiler_makes_again_is_not_saved():
    x, kernel = jnp.zeros((3, 8), jnp.bfloat16), jnp.zeros((8, 16), jnp.bfloat16)

    def results(x, kernel):
        product = x @ kernel
        scaled = product.astype(jnp.float32) / 3
        weights = jnp.exp(scaled)
        kept = jax.random.bits(jax.random.key(0), (3, 16)) > 7
        dropped = jnp.where(kept, scaled, 0)
        return x, product, product.T, kept, scaled, dropped, weights, 2 * weights

    saved = find_saved(jax.make_jaxpr(results)(x, kernel).jaxpr)
    assert sorted(size for _, size in saved) == [3 * 16 * size for size in (1, 2, 4)]

    def loop(x, kernel):
        def body(carry, _):
            product = carry @ kernel
            return carry + product.sum(), (product, product, jnp.exp(product))

        return jax.lax.scan(body, x, length=5)[1]

    saved = find_saved(jax.make_jaxpr(loop)(x, kernel).jaxpr)
    assert saved == [((5, 3, 16), 5 * 3 * 16 * 2)] * 2


def test_a_step_with_options_of_the_compiler_is_searched_over(monkeypatch):
    # Those of GPUs, of which there is no compiler here; this one CPUs have too.
    options = {"xla_embed_ir_in_executable": True}
    monkeypatch.setattr("vit_jax.training.experiment.compiler_options", lambda device: options)
    search._count_costs.cache_clear()
    assert make_candidates(small_config(), parse_topology("h100:1"), images_per_device=(64,))
    search._count_costs.cache_clear()


def test_a_teacher_is_planned_for_without_its_parameters_on_a_device(tmp_path, cache):
    objective = {"name": "distillation", "teacher": write_teacher(tmp_path, classes=16, size=32)}
    plan = make_plan(small_config(objective=objective), parse_topology("cpu:2"), cache=cache)
    assert plan["fits"]
    assert plan["flops_per_device"] > 0


def test_kernels_transfers_and_waits_have_times(plan):
    times = {"expected_seconds": 0.1, "expected_mfu": 0.2, "kernel_seconds": 0.09}
    known = plan | times | {"num_kernels": 7, "transfer_seconds": 0.02, "wait_seconds": 0.01}
    text = "\n".join(describe_plan(known))
    assert "h100:4 x 2 hosts: 8 devices" in text
    assert "7 kernels take 90.0 ms; transfers take 20.0 ms,\n" in text
    assert "10.0 of which no kernel runs meanwhile" in text
    # Each transfer has the axes that it crosses, and its time.
    (sums,) = [
        c for c in plan["collectives"] if (c["kind"], c["axes"]) == ("all-reduce", ("data",))
    ]
    chip = GPUS["h100"]
    seconds = sums["bytes"] / chip.ici_bandwidth + sums["dcn_bytes"] / chip.dcn_bandwidth
    assert sums["seconds"] == pytest.approx(seconds / 0.8)
    assert "MB between hosts, " in text
    assert "waits for transfers are not included" in "\n".join(
        describe_plan(known | {"wait_seconds": None})
    )


def test_axes_that_leave_a_host_are_named():
    hosts = [0, 0, 0, 0, 1, 1, 1, 1]
    topology = parse_topology("h100:4", num_slices=2)
    for mesh, slow in (
        ({"data": 2, "fsdp": 2, "tensor": 2}, []),
        ({"data": 1, "fsdp": 4, "tensor": 2}, ["mesh.fsdp goes over several hosts"]),
        ({"data": 1, "fsdp": 1, "tensor": 8}, ["mesh.tensor goes over several hosts"]),
    ):
        notes = _warn_of_slow_axes(mesh, hosts, topology)
        assert [note.partition(":")[0] for note in notes] == slow


def test_a_plan_for_gpus_says_that_cpus_stand_in_for_them(plan):
    assert plan["compiled_for"] == "cpu"
    text = "\n".join(describe_plan(plan))
    assert "compiled for as many CPUs" in text
    assert "pip install 'vit_jax[gpu-plan]'" in text
    assert list(describe_kernels(plan)) == ["  no kernels: the step was not compiled for this chip"]


def test_the_kernels_that_take_the_longest_are_listed():
    row = {
        "layer": "encoderblock_*/MlpBlock_0/Dense_0/dot_general",
        "backward": True,
        "kind": "fusion",
        "count": 24,
        "bytes": 198_400_000,
        "flops": 119_000_000_000,
        "bound": "compute",
        "seconds": 0.003,
    }
    kernels = [row, row | {"seconds": 0.001}]
    first, _, *shown = describe_kernels({"num_kernels": 26, "kernels": kernels}, limit=1)
    assert first == "  26 kernels, 4.00 ms; the longest:"
    (row,) = shown
    assert row.split()[:6] == ["3.000", "75.0%", "24", "198.4", "119.0", "compute"]
    assert row.endswith("  encoderblock_*/MlpBlock_0/Dense_0/dot_general (fusion, backward)")


def test_what_was_compiled_is_kept(plan, cache):
    config = small_config(mesh__fsdp=2, mesh__tensor=2)
    again = make_plan(config, parse_topology("h100:4", num_slices=2), cache=cache)
    assert again["cached"]
    assert not plan["cached"]
    assert again | {"cached": False} == plan


def test_no_memory_is_an_answer_that_says_what_would_fit(monkeypatch, candidates):
    topology = parse_topology("h100:2")
    config = small_config()
    first = next(c for c in candidates if c.overrides["model.remat"] == "none")
    need = first.argument_bytes + first.temp_bytes
    chip = dataclasses.replace(GPUS["h100"], hbm_bytes=need // 2)
    message = f"RESOURCE_EXHAUSTED: temporaries ({need / 2**20:.2f}M) exceeds available HBM"
    step = compiled.did_not_fit(first.argument_bytes, message, 1.0)
    monkeypatch.setattr("vit_jax.planning.plan.compile_step", lambda *_, **__: (step, False))
    plan = make_plan(config, dataclasses.replace(topology, chip=chip), cache=None)
    assert not plan["fits"]
    assert plan["step_seconds"] is None
    assert plan["temp_bytes"] == pytest.approx(need, rel=0.01)
    assert "does not fit" in "\n".join(describe_plan(plan))
    lines = list(describe_remedies(plan, candidates))
    assert "--config.model.remat=" in lines[1]
    smallest = {"hbm_limit_bytes": 1000}
    assert "nothing" in next(describe_remedies(smallest, candidates))


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("memory required for HLO temporaries (68.00G) exceeds available HBM (15.75G)", 68 * 2**30),
        ("Used 25.5G of 15.75G hbm. Exceeded hbm capacity by 9.75G.", round(25.5 * 2**30)),
        ("something else", 0),
    ],
)
def test_compilers_are_understood_when_memory_runs_out(message, peak):
    arguments = 1000 if "temporaries" in message else 0
    step = compiled.did_not_fit(arguments, message, 1.0)
    assert step.peak_bytes == peak + arguments
    assert parse_size("1.5K") == 1536


def test_candidates_are_ways_that_the_config_allows_the_fastest_first(candidates):
    # What is the same to three digits is as fast.
    seconds = [float(f"{c.seconds_per_image:.3g}") for c in candidates]
    assert seconds == sorted(seconds)
    devices = make_devices(parse_topology("h100:2"))
    for c in (candidates[0], candidates[-1]):
        Experiment.from_config(override_config(small_config(), c.overrides), devices=devices)
    ways = {(c.overrides["model.remat"], c.overrides["model.scan"]) for c in candidates}
    assert ways == {("none", False), ("none", True), ("dots", True), ("full", True)}
    assert {c.batch_size for c in candidates if c.mesh["tensor"] == 1} == {128, 256}
    # Of the same way, more computed again is less kept; more parts at a time are fewer images.
    memory = {
        (*(c.overrides[k] for k in ("model.remat", "model.scan")), accum_steps): c.temp_bytes
        for c in candidates
        if (accum_steps := c.overrides["optimizer.accum_steps"]) in (1, 4)
        and c.mesh == {"data": 2, "fsdp": 1, "tensor": 1}
        and c.batch_size == 256
    }
    assert memory["none", True, 1] > memory["dots", True, 1] > memory["full", True, 1]
    assert memory["none", True, 1] > memory["none", True, 4]
    # What a scan saves for the backward pass is in memory as it is saved.
    assert memory["none", False, 1] < memory["none", True, 1]


@pytest.mark.slow
def test_both_towers_are_recomputed_and_scanned():
    sizes = {"num_layers": 2, "mlp_dim": 64}
    config = pairs_config("nowhere", model__image=IMAGE | sizes, model__text=TEXT | sizes)
    prepared = reduce_for_planning(config.to_dict(), num_classes=1, image_size=16)
    candidates = make_candidates(prepared, parse_topology("h100:1"))
    keys = [f"model.{tower}.{key}" for tower in ("image", "text") for key in ("remat", "scan")]
    ways = {tuple(c.overrides[key] for key in keys) for c in candidates}
    assert ways == {
        way * 2 for way in (("none", False), ("none", True), ("dots", True), ("full", True))
    }
    memory = {
        c.overrides["model.text.remat"]: c.temp_bytes
        for c in candidates
        if c.overrides["model.text.scan"] and c.overrides["optimizer.accum_steps"] == 1
    }
    assert memory["none"] > memory["dots"] > memory["full"]


def test_transfers_of_gpus_are_estimated_to_come_on_top():
    chip = GPUS["h100"]
    work = Work(
        flops=0.68e-3 * chip.flops,
        model_flops=0,
        hbm_bytes=1.6e-3 * chip.hbm_bandwidth,
        ici_bytes=2.4e-3 * chip.ici_bandwidth,
        dcn_bytes=0.8e-3 * chip.dcn_bandwidth,
    )
    # A millisecond of products, meanwhile two of memory; three of NVLink, and one of the network.
    assert search._estimate_seconds(work, parse_topology("h100:8")) == pytest.approx(6e-3)
    tpu = parse_topology("v5e:4x4")
    assert search._estimate_seconds(work, tpu) == make_roofline(work, tpu.chip).step_seconds


def candidate(remat, *, temp, seconds):
    overrides = {"model.remat": remat, "optimizer.accum_steps": 1}
    return Candidate(overrides, {}, 8, 100, temp, seconds, 64)


def test_search_compiles_the_fastest_that_fit_and_learns_from_what_did_not():
    candidates = [
        candidate("none", temp=900, seconds=1),
        candidate("none", temp=880, seconds=1.1),
        candidate("dots", temp=500, seconds=1.2),
        candidate("full", temp=100, seconds=2),
        candidate("full", temp=10**6, seconds=0.1),
    ]
    compiled_for = []

    def compile_candidate(c):
        compiled_for.append(c.temp_bytes)
        fits = c.temp_bytes <= 500
        speed = {"images_per_second_per_chip": 64 / c.step_seconds} if fits else {}
        return {"fits": fits, "temp_bytes": 2 * c.temp_bytes, "error": "too much"} | speed

    results = search.search(candidates, 1000, compile_candidate, max_compiles=9, jobs=1)
    # First what fits with some to spare, the fastest first; of those that just might fit, none
    # that is like one that did not. What is a thousand times too large is not tried.
    assert compiled_for == [500, 100, 900]
    assert [c.temp_bytes for c, _ in results] == [500, 100, 900]
    text = list(describe_search([], 5))
    assert "nothing fits" in text[-1]
    assert not could_fit(candidates[-1], 1000)


def test_overrides_are_printed_as_the_command_reads_them():
    overrides = {"model.remat": "none", "mesh.fsdp": 4}
    text = format_overrides(overrides)
    assert text == "--config.model.remat='\"none\"' --config.mesh.fsdp=4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--topology=v9:4"], "there is"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "mesh: "),
        (["--topology=cpu:8", "--config.model.attention=fused"], "(this is cpu)"),
        (
            ["--topology=h100:2", "--config.model.attention=fused"],
            "pip install 'vit_jax[gpu-plan]'",
        ),
        (["--topology=cpu:8", "--config.data.name=imagnet"], "data.name='imagnet'"),
        (["--topology=cpu:8", "--search"], "needs a TPU or a GPU"),
        (["--topology=cpu:8", "--search", "--scale=8"], "one of them"),
        (["--topology=cpu:8", "--scale=8"], "expected a TPU or a GPU"),
        (["--topology=cpu:8", "--jobs=0"], "at least 1"),
        (["--topology=v5e:4x4", "--num_slices=0"], "--num_slices=0"),
    ],
)
def test_bad_input_gets_one_line(arguments, expected):
    with pytest.raises(UserError) as error:
        command.main(["--config=configs/digits.py", "--config.model.scan=True", *arguments])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_imagenet_needs_no_network_to_be_planned():
    config = command.load_config("configs/vit_i1k.py:variant=S/16", {}).to_dict()
    devices = make_devices(parse_topology("cpu:8"))
    experiment = Experiment.from_config(reduce_for_planning(config), devices=devices)
    assert experiment.model.num_classes == 1000
    assert experiment.abstract_batch["image"].shape == (4096, 224, 224, 3)


def test_the_command_prints_json(capsys, cache):
    arguments = ["--config=configs/digits.py", "--topology=cpu:2", "--json", f"--cache={cache}"]
    shrink = ["--config.model.scan=True", "--config.objective.mixup=0.0"]
    command.main([*arguments, *shrink, "--num_classes=10", "--image_size=16"])
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) >= KEYS
    assert plan["fits"]
    assert plan["hbm_limit_bytes"] is None
    assert plan["step_seconds"] is None
