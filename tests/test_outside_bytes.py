# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes come from outside: a value, or one line that says what is wrong with them."""

import contextlib
import io
import json
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from tests.images import write_folder
from tests.tiny import tiny_config
from tests.trained import write_model
from vit_jax import status
from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.manifest import checksum_of, find_fault, write_manifest
from vit_jax.checkpoint.pretrained.load import load_params, load_pretrained
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.rebuild import rebuild_model
from vit_jax.checkpoint.pretrained.safetensors import (
    read_safetensors,
    read_tensors,
    write_safetensors,
    write_tensors,
)
from vit_jax.checkpoint.workdir import read_config
from vit_jax.config.load import override_config, parse_overrides
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources.files import manifest_dataset
from vit_jax.data.sources.hub import hub_dataset
from vit_jax.data.sources.packed import read_manifest
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.data.sources.tar import tar_dataset
from vit_jax.training.experiment import Experiment
from vit_jax.training.resume import open_workdir
from vit_jax.utils.command import print_error
from vit_jax.utils.errors import UserError

INPUTS = 60
MANY_INPUTS = 1000
# Seconds of the CPU for one input.
LIMIT = 5.0

# What tends to go wrong in numbers, texts and nesting.
PIECES = [
    *(b"\x00", b"\xff", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80", b"\n", b'"', b"'", b"\\"),
    *(b"{", b"}", b"[", b"]", b"(", b")", b"," * 3, b":", b"|", b"=", b"-1", b"0", b"1e999"),
    *(b"NaN", b"null", b"true", b"9" * 30, b"9" * 5000, b"[" * 3000, b"(" * 300, b"{" * 300),
    *(
        b"\xed\xa0\x80",
        "ü".encode(),
        b"\\ud800",
        b"../",
        b"__class__",
        b"lambda: 0",
        b"1" + b"+1" * 2000,
    ),
]


def mutate(data, rng):
    """Some of: bits flipped, a piece put in, taken out, copied or exchanged, the end cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        end = min(at + int(2 ** rng.uniform(0, 8)), len(data))
        piece = PIECES[rng.integers(len(PIECES))]
        kind = rng.integers(6)
        if kind == 0 and data:
            data[at - 1] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at:at] = piece
        elif kind == 2:
            data[at : at + len(piece)] = piece
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at:end]
        else:
            del data[max(at, len(data) // 8) :]
    return bytes(data)


class Reader:
    """A file as it should be, and what reads it."""

    def __init__(self, file, read, *, whole=True):
        self.file, self.read, self.good = file, read, file.read_bytes()
        self.whole = whole  # Whether `read` accepts it.


def read_rows(dataset):
    for row in range(min(len(dataset.labels), 4)):
        with contextlib.suppress(ImageError):
            dataset.records.read(row)


def npz(folder, data_dir):
    file = write_model(folder / "model.npz")
    return Reader(file, lambda: read_npz(file))


def npz_description(folder, data_dir):
    file = write_model(folder / "model.npz")
    return Reader(file.with_suffix(".json"), lambda: read_npz(file))


def safetensors(folder, data_dir):
    file = folder / "model.safetensors"
    write_safetensors(file, read_npz(write_model(folder / "model.npz", size=16)))
    return Reader(file, lambda: read_safetensors(file))


def csv(folder, data_dir):
    write_folder(folder / "images", {"train/a": 2, "train/b": 1})
    names = sorted(p.relative_to(folder) for p in (folder / "images").rglob("*.png"))
    file = folder / "rows.csv"
    file.write_text("image,label,split\n" + "".join(f"{n},{n.parent.name},train\n" for n in names))
    return Reader(file, lambda: read_rows(manifest_dataset.__wrapped__(str(file))))


def jsonl(folder, data_dir):
    write_folder(folder / "images", {"train/a": 2, "train/b": 1})
    names = sorted(p.relative_to(folder) for p in (folder / "images").rglob("*.png"))
    rows = [{"image": str(n), "labels": [n.parent.name]} for n in names]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reader(file, lambda: read_rows(manifest_dataset.__wrapped__(str(file))))


def parquet(folder, data_dir):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "train.parquet"
    names = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [b"one", b"two", b"three"], "label": [0, 1, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), file)
    return Reader(file, lambda: read_rows(parquet_dataset.__wrapped__(str(file))))


def arrow(folder, data_dir):
    import pyarrow as pa

    file = folder / "train.arrow"
    names = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    images = pa.array([{"bytes": b"one"}, {"bytes": b"two"}, {"bytes": b"three"}])
    table = pa.table({"image": images, "label": [0, 1, 1], "text": ["x", "y", None]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return Reader(file, lambda: read_rows(hub_dataset.__wrapped__(str(folder))))


def card(folder, data_dir):
    parquet(folder, data_dir)
    file = folder / "README.md"
    file.write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: train*\n"
        "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n"
        "        names:\n          '0': a\n          '1': b\n---\n"
    )
    return Reader(file, lambda: read_rows(hub_dataset.__wrapped__(str(folder))))


def tar(folder, data_dir):
    file = folder / "train.tar"
    members = {"a.jpg": b"one", "a.cls": b"0", "b.jpg": b"two", "b.json": b'{"label": 1}'}
    with tarfile.open(file, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    # Most of the file is the room after its end.
    file.write_bytes(file.read_bytes()[: 10 * 512])
    return Reader(file, lambda: read_rows(tar_dataset.__wrapped__(str(file))))


def preprocess(folder, data_dir):
    file = folder / "line"
    file.write_text(
        "decode|resize(224, method='area')|random_crop(8)|flip_lr|rand_augment('rand-m9')"
    )
    text = lambda: file.read_bytes().decode(errors="surrogateescape")  # noqa: E731
    return Reader(file, lambda: parse_preprocess(text(), key="data.preprocess"))


def overrides(folder, data_dir):
    file = folder / "arguments"
    keys = ("data.batch_size=16", "model.hidden_size=16", "log_every=2", "mesh.data=-1", "seed=1")
    file.write_text("\n".join(f"--config.{key}" for key in keys))
    config = tiny_config(data_dir, evals={}).to_dict()

    def read():
        arguments = file.read_bytes().decode(errors="surrogateescape").split("\n")
        values, _ = parse_overrides(arguments)
        Experiment.from_config(override_config(json.loads(json.dumps(config)), values))

    return Reader(file, read)


def checkpoint(folder, data_dir):
    for item in ("params", "training"):
        (folder / "4" / item).mkdir(parents=True)
        for name in ("_METADATA", "manifest.ocdbt"):
            (folder / "4" / item / name).write_text(name)
    write_manifest(folder / "4")

    def read():
        assert find_checkpoint(folder) == folder / "4"
        if fault := find_fault(folder / "4"):
            raise UserError(fault)

    return Reader(folder / "4" / "manifest.json", read)


def save_by_orbax(folder, params=None):
    """As another program would, with a description as this one writes: no checksums."""
    params = params or {"head": {"kernel": np.ones((8, 3), np.float32)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params)
    description = folder / "description" / "metadata"
    description.parent.mkdir()
    description.write_text(json.dumps({"model": {"name": "vit"}, "preprocess": "decode"}))
    return folder


def orbax_metadata(folder, data_dir):
    save_by_orbax(folder)
    return Reader(folder / "params" / "_METADATA", lambda: load_params(folder))


def orbax_arrays(folder, data_dir):
    files = (save_by_orbax(folder) / "params").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    return Reader(largest, lambda: load_params(folder))


def orbax_description(folder, data_dir):
    save_by_orbax(folder)
    return Reader(folder / "description" / "metadata", lambda: load_params(folder))


def config_json(folder, data_dir):
    config = {"seed": 0, "total_steps": 8, "model": {"patch_size": [2, 2]}, "evals": {"val": {}}}
    file = folder / "config.json"
    file.write_text(json.dumps(config))

    def read():
        try:
            read_config(folder)
        finally:
            open_workdir(str(folder), config)

    return Reader(file, read)


def labels(folder, data_dir):
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    file = folder / "labels.txt"
    file.write_text("cat\ndog\n")
    return Reader(file, lambda: open_workdir(str(folder), {"seed": 0}, ("cat", "dog")))


def ledger(folder, data_dir):
    seconds = {"step": 1.0, "compile": 2.0, "data_wait": 0.1, "save": 0.1, "evaluation": 0.1}
    start = {"event": "start", "time": 1.0, "step": 0, "total": 8, "seconds": seconds}
    rows = [start, {**start, "event": "progress", "step": 4, "saved": 4}, {**start, "step": 4}]
    rows += [
        {**start, "event": "rollback", "to": 4, "past": 6},
        {**start, "event": "end", "cause": "x"},
    ]
    file = folder / "ledger.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reader(file, lambda: status.show(folder, status.describe(folder)))


def pack_json(folder, data_dir):
    content = {
        "source": "digits",
        "splits": {"train": 5},
        "num_classes": 2,
        "multi_label": False,
        "class_names": ["a", "b"],
        "short_side": 8,
        "quality": 90,
        "raw": None,
        "shard_size": 4,
    }
    file = folder / "pack.json"
    file.write_text(json.dumps(content))
    return Reader(file, lambda: read_manifest(folder, key="data.name").shards())


# Behind the checksums: a part is mutated, and what surrounds it is made to fit.


def sealed_manifest(folder, data_dir):
    found = checkpoint(folder, data_dir)
    whole, file = found.file, folder / "files"
    file.write_text(json.dumps(json.loads(whole.read_text())["files"]))

    def read():
        try:
            content = {"algorithm": "crc32", "files": json.loads(file.read_bytes())}
        except (ValueError, RecursionError):
            raise UserError("no JSON") from None
        whole.write_text(json.dumps(content | {"crc32": checksum_of(content)}))
        found.read()

    return Reader(file, read)


def sealed_checkpoint(folder, data_dir):
    save_by_orbax(folder / "4")
    files = [p for p in sorted((folder / "4").rglob("*")) if p.is_file() and p.stat().st_size]
    content = {file: file.read_bytes() for file in files}
    part = folder / "part"  # Its bytes choose a file and how that is changed.
    part.write_bytes(b"0" * 8)

    def read():
        rng = np.random.default_rng(zlib.crc32(part.read_bytes()))
        file = files[rng.integers(len(files))]
        file.write_bytes(mutate(content[file], rng))
        try:
            write_manifest(folder / "4")
            load_params(folder)
        finally:
            file.write_bytes(content[file])

    return Reader(part, read, whole=False)


def sealed_safetensors(folder, data_dir):
    whole = safetensors(folder, data_dir).file
    length = int.from_bytes(whole.read_bytes()[:8], "little")
    header, data = whole.read_bytes()[8 : 8 + length], whole.read_bytes()[8 + length :]
    file = folder / "header"
    file.write_bytes(header)

    def read():
        header = file.read_bytes()
        whole.write_bytes(len(header).to_bytes(8, "little") + header + data)
        read_safetensors(whole)

    return Reader(file, read)


def sealed_npz(folder, data_dir):
    whole = write_model(folder / "model.npz")
    with zipfile.ZipFile(whole) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = "cls.npy"
    file = folder / "member"
    file.write_bytes(members[name])

    def read():
        with zipfile.ZipFile(whole, "w") as archive:
            for other, content in (members | {name: file.read_bytes()}).items():
                archive.writestr(other, content)
        read_npz(whole)

    return Reader(file, read)


def sealed_parquet(folder, data_dir):
    found = parquet(folder, data_dir)
    length = int.from_bytes(found.good[-8:-4], "little")
    file = folder / "footer"
    file.write_bytes(found.good[-8 - length : -8])

    def read():
        footer = file.read_bytes()
        body = found.good[: -8 - length]
        found.file.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        found.read()

    return Reader(file, read)


READERS = (
    npz,
    npz_description,
    safetensors,
    csv,
    jsonl,
    parquet,
    arrow,
    card,
    tar,
    preprocess,
    overrides,
    checkpoint,
    orbax_metadata,
    orbax_arrays,
    orbax_description,
    config_json,
    labels,
    ledger,
    pack_json,
    sealed_manifest,
    sealed_checkpoint,
    sealed_safetensors,
    sealed_npz,
    sealed_parquet,
)


@pytest.mark.parametrize(
    "count", [INPUTS, pytest.param(MANY_INPUTS, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_damaged_bytes_are_one_line_or_a_value(
    reader, count, tmp_path, data_dir, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = reader(tmp_path, data_dir)
    if found.whole:
        found.read()
    rng = np.random.default_rng(READERS.index(reader))
    refused = 0
    for i in range(count):
        content = mutate(found.good, rng)
        found.file.write_bytes(content)
        begun = time.process_time()
        try:
            found.read()
        except UserError as e:
            refused += 1
            print_error(e)
            errors = capsys.readouterr().err
            assert errors.startswith("vit_jax: error: "), f"input {i}"
            assert errors.count("\n") == 1, f"input {i}"
            assert len(errors) < 5000, f"input {i}"
        except Exception as e:
            raise AssertionError(f"input {i}: {content[:2000]!r}") from e
        assert time.process_time() - begun < LIMIT, f"input {i}: {content[:2000]!r}"
    assert refused


def npy(shape, content, *, descr="<f4"):
    """An array by its header, which may lie, and its bytes."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


CLAIMS = {
    "more_than_there_is": ({"a.npy": npy((1 << 34,), bytes(8))}, "says that it has 68,719,476,"),
    "less_than_nothing": ({"a.npy": npy((-1, 4), bytes(8))}, "has the shape"),
    "overflow": ({"a.npy": npy((1 << 40, 1 << 40), bytes(8))}, "says that it has"),
    "a_bomb": ({"a.npy": npy((1 << 21,), bytes(1 << 23))}, "bytes that would become 8,388,"),
    "pickle": ({"a.npy": npy((1,), b"cos\nsystem\n", descr="|O")}, "expected the whole"),
    "no_array": ({"a.npy": b"cos\nsystem\n(S'echo'\ntR."}, "expected the whole"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_sizes_that_a_file_only_claims_take_no_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.utils.bounds._MIN_BOUND", 1 << 20)
    members, words = CLAIMS[name]
    file = tmp_path / "model.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    del members, content
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            read_npz(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_a_safetensors_header_that_is_longer_than_its_file_takes_no_memory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{" + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_safetensors(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_arrays_of_a_checkpoint_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.utils.bounds._MIN_BOUND", 1 << 20)
    with ocp.StandardCheckpointer() as checkpointer:  # Zeros, which compress to almost nothing.
        checkpointer.save((tmp_path / "params").absolute(), {"kernel": np.zeros(1 << 20)})
    with pytest.raises(UserError, match=r"bytes that would become 8,388,608\); expected a whole"):
        load_params(tmp_path)


# What a file beside weights may say, by the name of a case: a section, its key and the value.
DESCRIPTIONS = {
    "many_layers": ("model", "num_layers", 10**9, "num_layers is 1000000000"),
    "wide": ("model", "hidden_size", 10**9, "hidden_size is 1000000000"),
    "other_width": ("model", "hidden_size", 32, "hidden_size is 32; its arrays are of 16"),
    "long_integer": ("model", "mlp_dim", 10**4000, "model.mlp_dim is about 2**13288"),
    "text_for_a_size": ("model", "mlp_dim", "32", "model.mlp_dim is '32'; its arrays are of 32"),
    "patch": ("model", "patch_size", [10**6, 10**6], "patch_size is (1000000, 1000000)"),
    "no_name": ("model", "name", 5, "model.name is 5; expected a text"),
    "infinite": ("model", "rope_theta", float("inf"), "model.rope_theta is inf; expected a finite"),
    "nan_epsilon": ("model", "norm_epsilon", float("nan"), "model.norm_epsilon is nan"),
    "hybrid": ("model", "resnet_layers", [10**6], "model.resnet_layers is 1000000; expected"),
    "nested": ("model", "x", [[10**7]], "model.x is 10000000; expected an integer"),
    "many": ("model", "x", [0] * 10**6, "model has more than 100,000 values"),
    "long_text": ("model", "activation", "x" * 10**6, "model.activation has 1,000,000 characters"),
    "one_side": ("preprocess", "image_size", [16], "image_size is (16,); expected height and w"),
    "no_side": ("preprocess", "image_size", [0, 8], "image_size is 0; expected an integer, 1 to"),
    "large_image": ("preprocess", "image_size", [10**9, 8], "image_size is 1000000000"),
    "many_pixels": ("preprocess", "image_size", [2**15] * 2, "number of pixels by image_size is"),
    "number_for_a_line": ("preprocess", "eval", 5, "eval is 5; expected a line of operations"),
    "nan_mean": ("preprocess", "mean", [0.5, float("nan"), 0.5], "preprocess.mean is nan"),
    "text_mean": ("preprocess", "mean", "0.5", "mean is '0.5'; expected a number"),
    "empty_mean": ("preprocess", "mean", [], "mean is (); expected a number"),
    "zero_std": ("preprocess", "std", 0, "std is 0; expected a number above 0"),
    "list_of_all": ("preprocess", None, [1, 2], "expected what was written with"),
}


# Safetensors files of this package have a list of keys, and their reader leaves others out.
LEFT_OUT = [("safetensors", name) for name in ("nested", "many", "hybrid")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("npz", "safetensors", "orbax")
        for name in DESCRIPTIONS
        if (kind, name) not in LEFT_OUT
    ],
)
def test_a_description_that_can_not_be_of_its_arrays_is_refused(name, kind, tmp_path):
    section, key, value, words = DESCRIPTIONS[name]
    file = write_model(tmp_path / "model.npz", size=16)
    weights = read_npz(file)
    stated = {"model": {**weights.model}, "preprocess": {**weights.preprocess}}
    if key is None:
        stated[section], words = value, ""
    else:
        stated[section][key] = value
    if kind == "npz":
        file.with_suffix(".json").write_text(json.dumps({"vit_jax": stated}))
    elif kind == "safetensors":
        file = tmp_path / "model.safetensors"
        write_safetensors(file, weights)
        tensors, metadata = read_tensors(epath.Path(file))
        described = json.loads(metadata["vit_jax"])
        described = stated | {"model": described["model"] | stated["model"]}
        write_tensors(file, tensors, metadata={"vit_jax": json.dumps(described)})
    else:
        file = save_by_orbax(tmp_path / "run", weights.params)
        (file / "description" / "metadata").write_text(json.dumps(stated))
    begun = time.process_time()
    with pytest.raises(UserError) as error:
        rebuild_model(load_pretrained(str(file)))
    assert time.process_time() - begun < LIMIT
    assert words in str(error.value)
    assert len(str(error.value)) < 500
