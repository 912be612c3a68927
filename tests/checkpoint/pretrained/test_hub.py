# SPDX-License-Identifier: Apache-2.0
"""Folders of the hub are read, and files of other formats are refused with what to do."""

import json
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from vit_jax.checkpoint.pretrained.download import find_missing
from vit_jax.checkpoint.pretrained.hub import find_weights
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.safetensors import read_tensors, write_tensors
from vit_jax.inference.model import load_model
from vit_jax.training.evaluation import find_source
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "testdata" / "torch" / "hf_vit"
TIMM = GOLDEN.parent / "timm_vit"
INDEX = "model.safetensors.index.json"


def refusal(source):
    with pytest.raises(UserError) as caught:
        load_pretrained(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_golden(weights):
    expected = load_pretrained(str(GOLDEN / "model.safetensors"))
    assert weights.model == expected.model
    assert weights.params.keys() == expected.params.keys()
    for path, x in expected.params.items():
        np.testing.assert_array_equal(weights.params[path], x)


def write_shards(folder):
    """Writes the weights as two shards with an index, as transformers does."""
    shutil.copytree(GOLDEN, folder)
    tensors, _ = read_tensors(epath.Path(GOLDEN / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    placed = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        write_tensors(folder / shard, {n: tensors[n] for n in part}, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return folder


class Args:
    workdir, checkpoint = None, None

    def __init__(self, source):
        self.init_from = str(source)


def test_a_folder_of_the_hub_is_read_by_every_command(tmp_path):
    assert_golden(load_pretrained(str(GOLDEN)))
    assert find_source(Args(GOLDEN)) == str(GOLDEN)
    assert load_model(GOLDEN).module.num_classes == 5
    cache = tmp_path / "models--google--vit"
    shutil.copytree(GOLDEN, cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    assert_golden(load_pretrained(str(cache)))
    (cache / "snapshots" / "4567def").mkdir()
    assert "several snapshots: expected one of 0123abc, 4567def" in refusal(cache)


def test_shards_are_read_by_their_folder_or_their_index(tmp_path):
    folder = write_shards(tmp_path / "sharded")
    assert_golden(load_pretrained(str(folder)))
    assert_golden(load_pretrained(str(folder / INDEX)))
    message = refusal(folder / "model-00001-of-00002.safetensors")
    assert f"one of several shards: give {INDEX} or the folder" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: "{", "index.json: Expecting property name"),
        (lambda x: "[]", "expected the index of shards"),
        (lambda x: json.dumps({"weight_map": {}}), "expected the index of shards"),
        (lambda x: x.replace("00001-of", "00009-of"), "00009-of-00002.safetensors is not in the"),
        (lambda x: x.replace('"model-', '"../model-'), "expected a .safetensors file beside it"),
        (lambda x: x.replace("cls_token", "clt"), "does not hold vit.embeddings.clt"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, words, tmp_path):
    index = write_shards(tmp_path / "sharded") / INDEX
    index.write_text(change(index.read_text()))
    assert words in refusal(index)


def test_a_folder_with_several_files_or_none_is_refused(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        shutil.copy(GOLDEN / "model.safetensors", tmp_path / name)
    assert "several files: expected one of a.safetensors, b.safetensors" in refusal(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert find_weights(tmp_path) is None  # It is a workdir.
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no checkpoint" in refusal(empty)


@pytest.mark.parametrize("name", ["model.pth", "w.pt", "pytorch_model.bin", "x.pth.tar", "plain"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_pytorch_is_refused_with_the_command_that_converts_it(name, zipped, tmp_path):
    file = tmp_path / name
    content = pickle.dumps({"x": 1})
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        file.write_bytes(content)
    stem = name.partition(".")[0]
    for source in (file, tmp_path) if name == "pytorch_model.bin" else (file,):
        message = refusal(source)
        assert f"{file}: a file of PyTorch is not read" in message
        assert "python -c 'import torch; from safetensors.torch import save_file; " in message
        assert f"{tmp_path}/{stem}.safetensors" in message


def test_other_files_are_called_by_their_names(tmp_path):
    for name, words in (("x.h5", "of Keras"), ("x.msgpack", "of Flax"), ("x.onnx", "of ONNX")):
        (tmp_path / name).write_bytes(b"content")
        assert words in refusal(tmp_path / name)
    assert "no such file" in refusal(tmp_path / "none.pth")


def test_the_content_comes_before_the_name(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "x")
    file = (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "weights.bin")
    assert_golden(load_pretrained(str(file)))


class Hub(types.ModuleType):
    """In place of huggingface_hub: one repository, which is a folder on this machine."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []

    def snapshot_download(self, name, *, revision, allow_patterns=(), local_files_only=False):
        assert local_files_only or "config.json" in allow_patterns
        if local_files_only and "new" in name:
            raise FileNotFoundError("not in the cache")
        self.asked.append((name, revision))
        if "nothing" in name:
            raise OSError("404 Client Error\nRepository Not Found")
        return str(self.folder)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("timm:vit_tiny.in1k", ("timm/vit_tiny.in1k", None)),
        ("hf:google/vit-base", ("google/vit-base", None)),
        ("hf:google/vit-base@refs/pr/1", ("google/vit-base", "refs/pr/1")),
    ],
)
def test_a_repository_of_the_hub_is_fetched_by_its_library(source, asked, monkeypatch):
    hub = Hub(TIMM)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found, expected = load_pretrained(source), load_pretrained(str(TIMM))
    assert hub.asked == [asked]
    assert found.params.keys() == expected.params.keys()
    assert (found.model, found.preprocess) == (expected.model, expected.preprocess)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "hf:google/nothing",
            ["hf:google/nothing: ", "404 Client Error", "the folder of a download"],
        ),
        ("timm:nothing", ["timm/nothing can't be fetched"]),
        ("hf:vit-base", ["expected hf:USER/NAME"]),
        ("timm:timm/vit", ["expected hf:USER/NAME, or timm:NAME"]),
        ("hf:../../etc/x", ["expected hf:USER/NAME"]),
    ],
)
def test_a_repository_that_can_not_be_fetched_is_one_line(source, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(TIMM))
    with pytest.raises(UserError) as error:
        load_pretrained(source)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_not_in_the_cache_would_be_downloaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(TIMM))
    assert find_missing("timm:vit_tiny.in1k") is None
    assert find_missing("timm:new.in1k") == "https://huggingface.co/timm/new.in1k"
    assert find_missing("hf:google/new") == "https://huggingface.co/google/new"


def test_without_the_library_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub: pip install 'vit_jax\[hub\]'"):
        load_pretrained("timm:vit_tiny.in1k")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path))
    with pytest.raises(UserError, match=r"hf:a/b: it has no \.safetensors file"):
        load_pretrained("hf:a/b")
