# SPDX-License-Identifier: Apache-2.0
"""All readers of files that others wrote, each with all kinds of hostile files in its place."""

import contextlib
import dataclasses
import json
import os
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from tests.images import encode, write_folder
from tests.trained import NAMES, write_model, write_run
from vit_jax import report, status
from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.pretrained import safetensors
from vit_jax.checkpoint.pretrained.catalogue import select_augreg
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.safetensors import write_safetensors
from vit_jax.checkpoint.workdir import find_holder, read_config, read_labels
from vit_jax.config.load import load_config
from vit_jax.data import pack, sources
from vit_jax.data.ops.decode import ImageError
from vit_jax.evaluators.real import read_labels as read_real
from vit_jax.inference.images import Preparation
from vit_jax.objectives.supervised import _read_class_weights
from vit_jax.observe.divergence import read_rollbacks
from vit_jax.observe.jsonl import drop_metrics_after, read_metrics
from vit_jax.observe.ledger import read_ledger
from vit_jax.pages.comparison import read_runs
from vit_jax.pages.run_page import make_report
from vit_jax.sweep import read_states, read_sweep
from vit_jax.training.resume import open_workdir
from vit_jax.utils.class_names import read_names
from vit_jax.utils.errors import UserError

# Seconds of the CPU, and bytes of Python, that a file may take.
SECONDS, BYTES = 5.0, 2**26


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file, below a folder that `make` fills, and what reads it."""

    file: str
    read: Callable[[Path], object]
    kinds: Sequence[str] = ()


def rows(name):
    def read(folder):
        for cached in (
            sources.files.manifest_dataset,
            sources.parquet.parquet_dataset,
            sources.tar.tar_dataset,
        ):
            cached.cache_clear()
        sources.packed._dataset.cache_clear()
        dataset = sources.find_dataset(name.format(folder), data_dir=None)
        with contextlib.suppress(ImageError):
            dataset.records.read(0)

    return read


def start(folder):
    """Opens the workdir of a run, as one that resumes does."""
    config = json.loads((folder / "config_before.json").read_text())
    open_workdir(str(folder / "run"), config, NAMES)


def show_report(folder):
    report.main([f"--workdir={folder / 'run'}", "--no_predict"])


def show_status(folder):
    status.show(folder / "run", status.describe(folder / "run"))


def sweep(folder):
    read_states(folder)
    read_sweep([str(folder / "sweep.py")])


# Of those that read another checkpoint if they can, which takes long, and of code.
FEW = ("fifo", "folder", "empty", "hole", "nested", "list", "no_utf8")
RUN, STEP = "run", "run/checkpoints/8"
READERS = {
    "npz": Reader("model.npz", lambda f: read_npz(f / "model.npz")),
    "npz_load": Reader("model.npz", lambda f: load_pretrained(str(f / "model.npz"))),
    "npz_json": Reader("model.json", lambda f: read_npz(f / "model.npz")),
    "safetensors": Reader(
        "timm/model.safetensors", lambda f: load_pretrained(str(f / "timm/model.safetensors"))
    ),
    "config_beside": Reader(
        "timm/config.json", lambda f: load_pretrained(str(f / "timm/plain.safetensors"))
    ),
    "run_weights": Reader(f"{STEP}/params/_METADATA", lambda f: load_pretrained(str(f / RUN)), FEW),
    "run_manifest": Reader(f"{STEP}/manifest.json", lambda f: find_checkpoint(f / RUN)),
    "run_description": Reader(
        f"{STEP}/description/metadata", lambda f: load_pretrained(str(f / RUN)), FEW
    ),
    "unsigned_run": Reader(
        "orbax/8/params/_METADATA", lambda f: load_pretrained(str(f / "orbax")), FEW
    ),
    "unsigned_tree": Reader("orbax/8/params/x", lambda f: load_pretrained(str(f / "orbax")), FEW),
    "config": Reader(f"{RUN}/config.json", lambda f: read_config(f / RUN)),
    "start_config": Reader(f"{RUN}/config.json", start),
    "start_labels": Reader(f"{RUN}/labels.txt", start),
    "start_metrics": Reader(f"{RUN}/metrics.jsonl", start),
    "start_ledger": Reader(f"{RUN}/ledger.jsonl", start),
    "labels": Reader(f"{RUN}/labels.txt", lambda f: read_labels(f / RUN)),
    "metrics": Reader(f"{RUN}/metrics.jsonl", lambda f: read_metrics(f / RUN)),
    "metrics_dropped": Reader(f"{RUN}/metrics.jsonl", lambda f: drop_metrics_after(f / RUN, 0)),
    "ledger": Reader(f"{RUN}/ledger.jsonl", lambda f: read_ledger(f / RUN)),
    "lock": Reader(f"{RUN}/lock", lambda f: find_holder(f / RUN)),
    "rollbacks": Reader(f"{RUN}/divergence/rollbacks.jsonl", lambda f: read_rollbacks(f / RUN)),
    "status": Reader(f"{RUN}/ledger.jsonl", show_status),
    "report_run": Reader(f"{RUN}/run.json", show_report),
    "report_details": Reader(f"{RUN}/evals/val_8.json", show_report),
    "report_confusion": Reader(f"{RUN}/evals/val_8_confusion.csv", show_report),
    "report_config": Reader(f"{RUN}/config.json", lambda f: make_report(f / RUN)),
    "compare": Reader(f"{RUN}/metrics.jsonl", lambda f: read_runs([f / RUN])),
    "sweep_states": Reader("sweep.json", sweep),
    "sweep_file": Reader("sweep.py", sweep, FEW),
    "config_file": Reader("config.py", lambda f: load_config(str(f / "config.py"), {}), FEW),
    "csv": Reader("rows.csv", rows("manifest:{}/rows.csv")),
    "jsonl": Reader("rows.jsonl", rows("manifest:{}/rows.jsonl")),
    "csv_image": Reader("images/train/a/000.png", rows("manifest:{}/rows.csv")),
    "image": Reader(
        "images/train/a/000.png",
        lambda f: Preparation("decode|resize(8)", (8, 8, 3))(f / "images/train/a/000.png"),
    ),
    "parquet": Reader("train.parquet", rows("parquet:{}/train.parquet")),
    "tar": Reader("train.tar", rows("tar:{}/train.tar")),
    "pack": Reader("packed/pack.json", rows("packed:{}/packed")),
    "pack_labels": Reader("packed/train-00000-of-00001.npz", rows("packed:{}/packed")),
    "pack_images": Reader("packed/train-00000-of-00001.array_record", rows("packed:{}/packed")),
    "raw_pixels": Reader("raw/train.pixels", rows("raw:{}/raw")),
    "real_labels": Reader("real.json", lambda f: read_real(str(f / "real.json"), key="real")),
    "class_names": Reader("names.txt", lambda f: read_names(f / "names.txt", key="--labels")),
    "class_weights": Reader("weights.txt", lambda f: _read_class_weights(f"{f}/weights.txt", 2)),
    "augreg_index": Reader("index.csv", lambda f: select_augreg(f / "index.csv", "B_16")),
}


@pytest.fixture(scope="module")
def good(data_dir, tmp_path_factory):
    """A folder with a good file for each reader."""
    folder = tmp_path_factory.mktemp("good")
    weights = read_npz(write_model(folder / "model.npz", size=16))
    (folder / "timm").mkdir()
    write_safetensors(folder / "timm" / "model.safetensors", weights)
    tensors, _ = safetensors.read_tensors(epath.Path(folder / "timm" / "model.safetensors"))
    safetensors.write_tensors(folder / "timm" / "plain.safetensors", tensors, metadata={})
    described = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4}}
    (folder / "timm" / "config.json").write_text(json.dumps(described))
    workdir, experiment, _ = write_run(folder / "run", data_dir)
    (folder / "config_before.json").write_text(json.dumps(experiment.config))
    shutil.copytree(workdir / "checkpoints", folder / "orbax")
    for name in ("manifest.json", "run.json"):
        (folder / "orbax" / "8" / name).unlink()
    (folder / "orbax" / "8" / "params" / "x").touch()
    seconds = {"step": 1.0, "compile": 2.0, "data_wait": 0.1, "save": 0.1, "evaluation": 0.1}
    record = {"event": "start", "time": 1.0, "step": 8, "total": 8, "seconds": seconds}
    (workdir / "ledger.jsonl").write_text(json.dumps(record) + "\n")
    (workdir / "run.json").write_text(json.dumps({"command": "x", "params": [], "groups": []}))
    (workdir / "lock").write_text("process 1 on host\n")
    (workdir / "divergence").mkdir()
    (workdir / "divergence" / "rollbacks.jsonl").write_text('{"to": 1, "past": 2, "reason": "x"}\n')
    (workdir / "evals").mkdir()
    details = {
        "classes": [{"label": 0, "name": "a"}, {"label": 1, "name": None}],
        "calibration": [{"confidence": 0.5, "accuracy": 0.5, "count": 2}],
    }
    (workdir / "evals" / "val_8.json").write_text(json.dumps(details))
    confusion = "label,predicted,count\n0,1,2\n"
    (workdir / "evals" / "val_8_confusion.csv").write_text(confusion)
    (folder / "sweep.json").write_text(json.dumps({"runs": [{"run": "a", "state": {"code": 0}}]}))
    (folder / "sweep.py").write_text("def get_sweep():\n    return {'seed': [0, 1]}\n")
    (folder / "config.py").write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict()\n"
    )
    write_folder(folder / "images", {"train/a": 3, "train/b": 3})
    names = sorted(p.relative_to(folder) for p in (folder / "images").rglob("*.png"))
    lines = [f"{name},{name.parent.name}" for name in names]
    (folder / "rows.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    objects = [{"image": str(name), "label": name.parent.name} for name in names]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    table = pa.table({"image": [encode(i) for i in range(4)], "label": [0, 1, 0, 1]})
    pq.write_table(table, folder / "train.parquet")
    with tarfile.open(folder / "train.tar", "w") as shard:
        shard.add(folder / names[0], "a.png")
        shard.add(folder / "rows.csv", "a.txt")
    for kind in ([], ["--raw=8"]):
        target = folder / ("raw" if kind else "packed")
        pack.main([f"folder:{folder / 'images'}", str(target), *kind, "--num_threads=1"])
    (folder / "real.json").write_text(json.dumps([[1], [2, 3]]))
    (folder / "names.txt").write_text("a\nb\n")
    (folder / "weights.txt").write_text("1.0\n2.0\n")
    index = "filename,ds,final_val\nB_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0,i21k,1\n"
    (folder / "index.csv").write_text(index)
    return folder


def write(content):
    return lambda path: path.write_bytes(content)


def put(make):
    """Puts something else in the place of a file."""

    def change(path):
        path.unlink()
        make(path)

    return change


def grow(size):
    """Lets a file claim to be larger, by a hole at its end."""
    return lambda path: os.truncate(path, size)


# What is put in the place of a file, by name.
HOSTILE = {
    "fifo": put(os.mkfifo),
    "link_to_a_device": put(lambda path: path.symlink_to("/dev/zero")),
    "link_to_nothing": put(lambda path: path.symlink_to("none")),
    "link_to_itself": put(lambda path: path.symlink_to(path)),
    "folder": put(os.mkdir),
    "empty": write(b""),
    "hole": put(lambda path: (path.touch(), os.truncate(path, 2**42))),
    "hole_at_the_end": grow(2**42),
    "zeros": write(bytes(2**20)),
    "letters": write(b"a" * 2**20),
    "lines": write(b"\n" * 2**14),
    "brackets": write(b"[" * 2**18),
    "nested": write(b"[" * 900 + b"]" * 900),
    "nested_objects": write(b'{"a":' * 500 + b"1" + b"}" * 500),
    "digits": write(b"9" * 2**18),
    "null": write(b"null"),
    "list": write(b"[1, 2, 3]"),
    "text": write(b'"text"'),
    "not_a_number": write(b"NaN"),
    "object": write(b'{"a": {"b": [1, "c", null]}, "runs": [[]], "classes": [1], "params": 5}'),
    "no_utf8": write(b"\xff\xfe\x00\xd8" * 100),
    "commas": write(b"," * 2**17),
    "quotes": write(b'"' * (2**17 + 1)),
    "zip": write(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.parametrize("name", READERS)
def test_no_hostile_file_takes_time_or_memory_or_a_traceback(
    name, good, said, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reader = READERS[name]
    file = good / reader.file
    content = file.read_bytes()
    reader.read(good)
    for kind in reader.kinds or HOSTILE:
        HOSTILE[kind](file)
        said.clear()
        begun = time.process_time()
        tracemalloc.start()
        try:
            reader.read(good)
        except (UserError, ImageError) as e:
            said.append(str(e))
        except Exception as e:
            raise AssertionError(f"{kind}: {type(e).__name__}: {e}") from e
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(content)
        assert time.process_time() - begun < SECONDS, kind
        assert peak < BYTES, (kind, peak)
        assert all("\n" not in line and len(line) < 20_000 for line in said), kind
    reader.read(good)
