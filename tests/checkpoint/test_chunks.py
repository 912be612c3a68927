# SPDX-License-Identifier: Apache-2.0
"""Each process downloads the chunks that its own devices need."""

import itertools
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from tests.buckets import server
from tests.checkpoint.test_manager import abstract, make_state
from vit_jax.checkpoint.chunks import fetch_needed, find_places
from vit_jax.checkpoint.manager import _items, _make_checkpointer
from vit_jax.checkpoint.manifest import find_fault, write_manifest
from vit_jax.utils import mirrors
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_folder

__all__ = ["server"]


@pytest.fixture(autouse=True)
def forget():
    yield
    mirrors._mirrors.clear()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A state, and its checkpoints as several processes and as one write them."""
    state, root = make_state(ema=True), tmp_path_factory.mktemp("written")
    for apart in (True, False):
        items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        with _make_checkpointer(apart=apart) as checkpointer:
            checkpointer.save(root / str(apart), args=ocp.args.Composite(**items))
        (root / str(apart) / "run.json").write_text("{}")
        write_manifest(root / str(apart))
    return state, root


@pytest.fixture
def open_checkpoint(server, written):
    """Uploads a checkpoint, and opens a copy of it as another process does."""

    def open_checkpoint(*, apart=True):
        folder = written[1] / str(apart)
        for file in folder.rglob("*"):
            if file.is_file():
                name = f"run/checkpoints/4/{file.relative_to(folder).as_posix()}"
                server.put(server.bucket, name, file.read_bytes())
        server.put(server.bucket, "run/config.json", b"{}")
        mirrors._mirrors.clear()
        return find_folder(f"gs://{server.bucket}/run") / "checkpoints" / "4"

    return open_checkpoint


def only(devices, state):
    """What is to be restored by the process of some devices."""

    def choose(leaf):
        indices = leaf.sharding.devices_indices_map(leaf.shape).items()
        own = {device: index for device, index in indices if device in devices}
        sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: own)
        return types.SimpleNamespace(shape=leaf.shape, sharding=sharding)

    return jax.tree.map(choose, _items(abstract(state)))


def chunks(folder):
    """The chunks of the kernels that are in a folder."""
    found = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    return {name for name in found if "kernel/" in name and not name.endswith(".zarray")}


def test_a_process_downloads_the_chunks_of_its_devices(open_checkpoint, written):
    state, devices = written[0], jax.devices()[2:4]
    folder = open_checkpoint()
    fetch_needed(folder, only(devices, state))
    names = ("params/head", "ema_params/head", "training/opt_state.0.mu.head")
    names += ("training/opt_state.0.nu.head",)
    # 16 rows over eight devices are chunks of two rows.
    assert chunks(folder) == {f"{name}.kernel/{i}.0" for name in names for i in (2, 3)}
    for name, value in (("head.kernel", state.params["head"]["kernel"]), ("cls", None)):
        spec = {"driver": "zarr", "fill_missing_data_reads": False}
        spec["kvstore"] = {"driver": "file", "path": f"{folder}/params/{name}/"}
        array = ts.open(spec).result()
        if value is None:
            np.testing.assert_array_equal(array.read().result(), state.params["cls"])
            continue
        np.testing.assert_array_equal(array[4:8].read().result(), value[4:8])
        with pytest.raises(ValueError, match="NOT_FOUND"):  # It is no zero.
            array[3:8].read().result()


def test_all_of_a_process_that_has_all_devices_is_downloaded(open_checkpoint, written):
    folder = open_checkpoint()
    fetch_needed(folder, _items(abstract(written[0])))
    assert find_fault(folder) is None
    assert len(chunks(folder)) == 4 * 8


def test_what_one_process_wrote_is_downloaded_whole(open_checkpoint, written):
    folder = open_checkpoint(apart=False)
    fetch_needed(folder, only(jax.devices()[:1], written[0]))
    there = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    source = written[1] / "False"
    assert there == {f.relative_to(source).as_posix() for f in source.rglob("*") if f.is_file()}


def test_a_chunk_that_is_not_as_it_was_written_is_an_error(open_checkpoint, written, server):
    wanted = only(jax.devices()[2:3], written[0])
    name = "run/checkpoints/4/params/head.kernel/2.0"
    for damage, words in ((b"x", "bytes long"), (None, "is missing")):
        folder = open_checkpoint()
        server.put(server.bucket, name, damage)
        with pytest.raises(UserError, match=rf"params/head\.kernel/2\.0 .*{words}"):
            fetch_needed(folder, wanted)
        server.put(server.bucket, name.replace("2.0", "5.0"), damage)  # Of another process.
        assert "kernel" in (find_fault(folder) or "")


def test_places_are_those_of_the_chunks_that_a_part_overlaps_with():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rank = rng.integers(0, 4)
        shape, sizes = rng.integers(1, 9, rank), rng.integers(1, 9, rank)
        bounds = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        inside = np.zeros(shape, bool)
        inside[index] = True
        if not inside.any():
            continue
        grid = itertools.product(*map(range, -(-shape // sizes)))
        expected = {
            place
            for place in grid
            if inside[tuple(map(slice, place * sizes, (np.array(place) + 1) * sizes))].any()
        }
        assert set(find_places(shape.tolist(), sizes.tolist(), index)) == expected
    assert set(find_places((4, 4), (2, 4), (slice(None), slice(0, 4, None)))) == {(0, 0), (1, 0)}
