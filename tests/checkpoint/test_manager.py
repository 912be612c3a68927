# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in them, which are kept, and which are refused."""

import contextlib
import logging
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.checkpoint import manager
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import CheckpointManager, CheckpointOptions
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.checkpoint.state import TrainState
from vit_jax.parallel.mesh import make_mesh
from vit_jax.training.resume import open_workdir
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten


def make_state(step=4, *, ema=False, width=16, tx=None):
    """A small state with other values in each leaf, its kernel sharded over eight devices."""
    mesh = make_mesh(fsdp=8)
    kernel = jax.device_put(
        jnp.arange(width * 3, dtype=jnp.float32).reshape(width, 3) + step,
        NamedSharding(mesh, PartitionSpec("fsdp")),
    )
    bias = jax.device_put(jnp.full(3, -1.0 * step), NamedSharding(mesh, PartitionSpec()))
    params = {"head": {"kernel": kernel, "bias": bias}, "cls": bias + 7}
    tx = tx or optax.adam(1e-3)
    _, opt_state = tx.update(params, tx.init(params), params)
    count = jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec()))
    averages = jax.tree.map(lambda x: x / 2, params) if ema else None
    return TrainState(step=count, params=params, opt_state=opt_state, ema_params=averages)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(workdir, *states, metrics=({},), **options):
    """Saves states, under the steps that they hold."""
    metrics = list(metrics) * (len(states) if len(metrics) == 1 else 1)
    with CheckpointManager(
        workdir, CheckpointOptions(**({"keep": 1} | options)), {}
    ) as checkpoints:
        for state, values in zip(states, metrics, strict=True):
            checkpoints.save(int(state.step), state, values)


def restore(workdir, wanted):
    with CheckpointManager(workdir, CheckpointOptions(), {}) as checkpoints:
        return checkpoints.restore(wanted)


def kept(workdir):
    return {p.name for p in (workdir / "checkpoints").iterdir()}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = flatten(got), flatten(want)
    for path in want:
        assert got[path].dtype == want[path].dtype
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_is_restored_bit_for_bit_where_it_was(ema, tmp_path):
    state = make_state(ema=ema)
    save(tmp_path, state)
    restored = restore(tmp_path, abstract(state))
    assert_same(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert got.sharding == want.sharding


def test_the_newest_checkpoint_is_the_one_restored(tmp_path):
    save(tmp_path, make_state(2), make_state(10), keep=2)
    assert kept(tmp_path) == {"2", "10"}
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        assert checkpoints.latest_step() == 10
        assert checkpoints.path(10) == tmp_path / "checkpoints" / "10"
    assert int(restore(tmp_path, abstract(make_state())).step) == 10
    np.testing.assert_array_equal(load_params(tmp_path)[0]["head"]["bias"], [-10.0] * 3)


def test_a_state_may_be_donated_as_soon_as_its_save_has_begun(tmp_path):
    state, want = make_state(), make_state()
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        checkpoints.save(4, state, {})
        zero = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
        jax.block_until_ready(zero(state))
    assert_same(restore(tmp_path, abstract(want)), want)


def test_parameters_load_without_knowing_the_optimizer(tmp_path):
    state = make_state(ema=True)
    save(tmp_path, state)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "training")
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "ema_params")
    params = load_params(tmp_path)[0]
    assert_same(params, state.params)
    assert {len(x.devices()) for x in jax.tree.leaves(params)} == {1}


@pytest.mark.parametrize("ema", [True, False])
def test_the_average_is_stored_only_where_there_is_one(ema, tmp_path):
    save(tmp_path, make_state(ema=ema))
    folders = {p.name for p in (tmp_path / "checkpoints" / "4").iterdir() if p.is_dir()}
    assert folders == {"params", "training", "description"} | ({"ema_params"} if ema else set())


@pytest.mark.parametrize("written", ["nothing", "parameters", "all but the name"])
def test_a_half_written_checkpoint_is_ignored_and_the_next_save_removes_it(written, tmp_path):
    state, finished = make_state(4), tmp_path / "checkpoints" / "4"
    save(tmp_path, state)
    half = tmp_path / "checkpoints" / f"8{ocp.utils.TMP_DIR_SUFFIX}"
    half.mkdir()
    if written == "parameters":
        shutil.copytree(finished / "params", half / f"params{ocp.utils.TMP_DIR_SUFFIX}")
    elif written == "all but the name":
        shutil.copytree(finished, half, dirs_exist_ok=True)
    assert_same(load_params(tmp_path)[0], state.params)
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        assert checkpoints.latest_step() == 4
        assert_same(checkpoints.restore(abstract(state)), state)
        checkpoints.save(5, make_state(5), {})
    assert kept(tmp_path) == {"5"}


def test_a_half_written_checkpoint_is_not_in_the_way_of_a_new_one(tmp_path):
    save(tmp_path, make_state(4))
    shutil.copytree(
        tmp_path / "checkpoints" / "4",
        tmp_path / "checkpoints" / f"8{ocp.utils.TMP_DIR_SUFFIX}",
    )
    save(tmp_path, make_state(8))
    assert kept(tmp_path) == {"8"}
    assert_same(restore(tmp_path, abstract(make_state())), make_state(8))


def test_a_checkpoint_has_its_name_only_once_it_is_complete(tmp_path):
    state = make_state()
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        checkpoints.save(4, state, {})
        while "4" not in (names := kept(tmp_path)):
            assert all(name.startswith(f"4{ocp.utils.TMP_DIR_SUFFIX}") for name in names)
        assert_same(load_params(tmp_path)[0], state.params)


# What else is where checkpoints are


@pytest.mark.parametrize("kind", ["file", "link", "folder", "broken link"])
def test_what_has_the_name_of_half_a_checkpoint_is_no_obstacle(kind, tmp_path):
    save(tmp_path, make_state(4))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    half = tmp_path / "checkpoints" / f"70{ocp.utils.TMP_DIR_SUFFIX}-x"
    if kind == "file":
        half.touch()
    elif kind == "folder":
        half.mkdir()
    else:
        half.symlink_to(elsewhere if kind == "link" else tmp_path / "none")
    assert_same(restore(tmp_path, abstract(make_state(4))), make_state(4))
    assert kept(tmp_path) == {"4"}
    assert (elsewhere / "precious").exists()


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_half_a_checkpoint_that_can_not_be_removed_is_named_and_stays(tmp_path, monkeypatch, said):
    save(tmp_path, make_state(4))
    half = tmp_path / "checkpoints" / f"8{ocp.utils.TMP_DIR_SUFFIX}-removed"
    half.mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert_same(restore(tmp_path, abstract(make_state(4))), make_state(4))
    (line,) = said
    assert line.startswith(f"{half} can't be removed (Permission denied)")


@pytest.mark.parametrize("name", ["abc", "007", "٣", "²", "9" * 5000, "-1", "1e3", " 8", "70.tmp"])
def test_other_names_are_no_checkpoints(name, tmp_path):
    save(tmp_path, make_state(4))
    with contextlib.suppress(OSError):  # Names have at most 255 bytes.
        (tmp_path / "checkpoints" / name).mkdir()
    assert list_steps(tmp_path) == [4]
    save(tmp_path, make_state(8))
    assert list_steps(tmp_path) == [8]


def make_obstacle(kind, path):
    if kind == "file":
        path.write_text("mine")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to(path.with_name("none"))


@pytest.mark.parametrize("kind", ["file", "empty folder", "broken link"])
@pytest.mark.parametrize("broken", ["folder", "file"])
def test_what_has_the_name_of_a_checkpoint_is_named_skipped_and_kept(kind, broken, tmp_path, said):
    save(tmp_path, make_state(4))
    make_obstacle(kind, tmp_path / "checkpoints" / "8")
    if broken == "file":
        (tmp_path / "broken").touch()
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        assert checkpoints.latest_step() == 4
        checkpoints.restore(abstract(make_state(4)))
        checkpoints.save(8, make_state(8), {})
    place = "checkpoints/broken-8" if broken == "file" else "broken/8"
    assert said[0].startswith(f"skipped {tmp_path / 'checkpoints' / '8'}, which is damaged: ")
    assert said[1].startswith(f"moved to {tmp_path / place}: ")
    assert os.path.lexists(tmp_path / place)
    assert list_steps(tmp_path) == [8]


def test_a_save_that_fails_leaves_no_traces_of_libraries(tmp_path, caplog, monkeypatch):
    save(tmp_path, make_state(4))
    caplog.clear()
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task ...>")
    assert caplog.records == []
    logging.getLogger("asyncio").error("something else")
    assert len(caplog.records) == 1
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    manager._silence_failed_saves.__wrapped__()
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(unraisable.exc_value) for unraisable in seen] == ["something else"]


def test_what_can_not_be_moved_costs_no_checkpoint(tmp_path, monkeypatch, said):
    save(tmp_path, make_state(4))
    make_obstacle("file", tmp_path / "checkpoints" / "8")
    original = os.rename

    def rename(source, target):
        return refuse() if Path(source).name == "8" else original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with CheckpointManager(tmp_path, CheckpointOptions(keep=1), {}) as checkpoints:
        checkpoints.restore(abstract(make_state(4)))
        checkpoints.save(6, make_state(6), {})
    assert "checkpoints/8 can't be moved aside (Permission denied)" in said[-1]
    # The newest two names are 6 and 8, and only one of them is a checkpoint.
    assert list_steps(tmp_path) == [6, 8]
    assert (tmp_path / "checkpoints" / "8").read_text() == "mine"


def test_what_comes_in_the_way_while_a_run_trains_is_set_aside(tmp_path, said):
    with CheckpointManager(tmp_path, CheckpointOptions(keep=2), {}) as checkpoints:
        checkpoints.save(4, make_state(4), {})
        checkpoints.wait(must=True)
        (tmp_path / "broken" / "8").mkdir(parents=True)
        make_obstacle("file", tmp_path / "checkpoints" / "8")
        checkpoints.save(8, make_state(8), {})
    assert_same(restore(tmp_path, abstract(make_state(8))), make_state(8))
    assert (tmp_path / "broken" / "8-2").read_text() == "mine"
    assert f"moved to {tmp_path / 'broken/8-2'}" in said[0]


def test_checkpoints_behind_links_are_used_and_what_the_links_lead_to_is_kept(tmp_path):
    workdir, disk = tmp_path / "w", tmp_path / "disk"
    save(workdir, make_state(2), make_state(4), keep=2)
    (workdir / "checkpoints").rename(disk)
    (workdir / "checkpoints").symlink_to(disk)
    assert_same(restore(workdir, abstract(make_state(4))), make_state(4))
    (disk / "4").rename(tmp_path / "4")
    (disk / "4").symlink_to(tmp_path / "4")
    assert_same(restore(workdir, abstract(make_state(4))), make_state(4))
    assert_same(load_params(workdir)[0], make_state(4).params)
    save(workdir, make_state(6))
    assert {path.name for path in disk.iterdir()} == {"6"}
    assert (tmp_path / "4" / "params").is_dir()


def test_an_old_checkpoint_that_can_not_be_removed_does_not_fail_a_save(
    tmp_path, monkeypatch, said
):
    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(tmp_path, *map(make_state, (2, 4, 6, 8)))
    assert list_steps(tmp_path) == [8]
    assert len(said) == 3
    assert "checkpoints/2 can't be removed (Permission denied): it is kept" in said[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("file", "can't be read (Not a directory)"), ("broken link", "is a link to .*/none, which")],
)
def test_a_folder_of_checkpoints_that_is_none_is_one_line(kind, words, tmp_path):
    make_obstacle(kind, tmp_path / "checkpoints")
    for act in (lambda: open_workdir(str(tmp_path), {"seed": 0}), lambda: load_params(tmp_path)):
        with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
            act()
    with pytest.raises(UserError, match="checkpoints"):
        CheckpointManager(tmp_path, CheckpointOptions(), {})


def test_checkpoints_that_can_not_be_read_are_not_none(tmp_path, monkeypatch, said):
    save(tmp_path, make_state(4), make_state(8), keep=2)
    original = os.listdir

    def list_folder(path):
        return refuse() if Path(path).name == unreadable else original(path)

    monkeypatch.setattr(os, "listdir", list_folder)
    unreadable = "8"
    assert_same(restore(tmp_path, abstract(make_state(4))), make_state(4))
    assert "checkpoints/8, which is damaged: it can't be read (Permission denied)" in said[0]
    unreadable = "checkpoints"
    with pytest.raises(UserError, match=r"checkpoints can't be read \(Permission denied\)"):
        list_steps(tmp_path)


# What can't be restored

# Where one array can't be read, Orbax drops the reads of the others with complaints of its own.
abandoned_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@abandoned_reads
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({}, {"width": 24}),
        ({}, {"tx": optax.sgd(1e-3, momentum=0.9)}),
        ({"tx": optax.sgd(1e-3)}, {}),
        ({}, {"ema": True}),
    ],
    ids=["other shapes", "other optimizer", "no moments", "no average"],
)
def test_a_checkpoint_of_something_else_is_refused(stored, wanted, tmp_path):
    save(tmp_path, make_state(**stored))
    with pytest.raises(UserError) as error:
        restore(tmp_path, abstract(make_state(**wanted)))
    for word in ("--workdir", str(tmp_path / "checkpoints" / "4"), "can't be restored"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@abandoned_reads
@pytest.mark.parametrize("item", ["params", "training"])
def test_a_checkpoint_with_missing_files_is_refused(item, tmp_path):
    save(tmp_path, make_state())
    for path in (tmp_path / "checkpoints" / "4" / item).rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(UserError, match=r"checkpoints/4 can't be restored"):
        restore(tmp_path, abstract(make_state()))


def test_parameters_of_a_run_without_checkpoint_are_refused(tmp_path):
    for workdir in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"has no checkpoint; expected the workdir of a run"):
            load_params(workdir)


def test_parameters_that_can_not_be_read_are_refused(tmp_path):
    save(tmp_path, make_state())
    (tmp_path / "checkpoints" / "4" / "params" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/4/params can't be read"):
        load_params(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "params")
    with pytest.raises(UserError, match=r"there is no .*checkpoints/4/params"):
        load_params(tmp_path)


def test_parameters_are_found_from_the_workdir_down(tmp_path):
    state = make_state(ema=True)
    save(tmp_path, state)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "4"):
        assert_same(load_params(folder)[0], state.params)
    assert_same(load_params(tmp_path, item="ema_params")[0], state.ema_params)
    params, described = load_params(tmp_path / "checkpoints" / "4" / "params")
    assert_same(params, state.params)
    assert described == {}


def test_a_run_without_averages_has_none_to_load(tmp_path):
    save(tmp_path, make_state())
    with pytest.raises(UserError, match=r"there is no .*checkpoints/4/ema_params"):
        load_params(tmp_path, item="ema_params")


def test_checkpoints_say_what_model_they_are_of(tmp_path):
    description = {"model": {"patch_size": [2, 2]}, "preprocess": {"mean": 0.5}}
    with CheckpointManager(tmp_path, CheckpointOptions(), description) as checkpoints:
        checkpoints.save(4, make_state(), {})
    assert load_params(tmp_path)[1] == description


# Which are kept


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, *map(make_state, (1, 2, 3, 4)), keep=2)
    assert kept(tmp_path) == {"3", "4"}


@pytest.mark.parametrize(("metric", "best"), [("val/top1", "2"), ("val/loss", "3")])
def test_the_best_is_kept_as_well_and_a_loss_is_best_when_low(metric, best, tmp_path):
    metrics = [{metric: value, "other": 1.0} for value in (0.5, 0.9, 0.1, 0.6, 0.4)]
    states = [make_state(step) for step in (1, 2, 3, 4, 5)]
    save(tmp_path, *states, metrics=metrics, keep_best=metric)
    assert kept(tmp_path) == {best, "5"}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("val/loss", (0.5, 0.1, NAN, 0.6, 0.4), "2"),
        ("val/loss", (NAN, NAN, 0.3, 0.6, 0.4), "3"),
        ("val/loss", (0.5, 0.1, -INF, 0.6, INF), "2"),
        ("val/top1", (0.5, 0.9, INF, NAN, 0.4), "2"),
        ("val/top1", (0.5, None, None, 0.4, None), "1"),
        ("val/top1", (NAN, None, NAN, INF, None), None),
    ],
)
def test_a_value_that_is_no_number_or_missing_does_not_cost_the_best(
    metric, values, best, tmp_path, said
):
    metrics = [{} if value is None else {metric: value} for value in values]
    states = [make_state(step) for step in (1, 2, 3, 4, 5)]
    save(tmp_path, *states, metrics=metrics, keep_best=metric)
    assert kept(tmp_path) == {"5"} | ({best} if best else set())
    bad = [i for i, x in enumerate(values, 1) if x is not None and not np.isfinite(x)]
    assert [line.split(" of step ")[1].split()[0] for line in said] == list(map(str, bad))
    assert all("can't be the best" in line for line in said)


@pytest.mark.parametrize("written", ["NaN", '{"val/loss": NaN}', "[]", "{", '{"val/loss": "low"}'])
def test_what_was_written_as_metric_before_does_not_cost_the_best(written, tmp_path):
    states = [make_state(step) for step in (1, 2)]
    save(tmp_path, *states, metrics=[{"val/loss": 0.1}, {}], keep_best="val/loss")
    folder = tmp_path / "checkpoints" / "2" / "metrics"
    folder.mkdir()
    (folder / "metadata").write_text(written)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "2" / "run.json").unlink()  # as of a version without checksums
    save(tmp_path, make_state(3), keep_best="val/loss")
    assert kept(tmp_path) == {"1", "3"}


@pytest.mark.parametrize("key", ["every", "keep"])
def test_options_below_one_are_refused(key):
    with pytest.raises(UserError, match=f"checkpoint.{key}=0: expected at least 1"):
        CheckpointOptions(**{key: 0})
