# SPDX-License-Identifier: Apache-2.0
"""The command that prepares a dataset before a run."""

import io
import tarfile

from tests.hub_server import forget_all, hub, push_birds
from tests.images import encode, write_folder
from vit_jax.data import prepare
from vit_jax.data.sources import find_dataset
from vit_jax.data.sources.tfds import preparing_nothing

__all__ = ["hub"]


def test_a_repository_is_downloaded(hub, capsys):
    commit = push_birds(hub)
    prepare.main(["hf:me/birds"])
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "hf:me/birds: downloads 3 files, 0.00 GB, to " in text
    assert f"this commit of it is read by hf:me/birds@{commit}" in text
    assert "train                      9 examples" in text
    forget_all()
    hub.requests.clear()
    with preparing_nothing():
        assert find_dataset(f"hf:me/birds@{commit}", data_dir=None).lengths["test"] == 2
    assert hub.requests == []


def test_shards_get_their_index_and_other_data_is_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(tmp_path / "images", {"train/auk": 2, "train/bat": 1})
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in (("7.png", encode(7)), ("7.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for name, line in {
        f"tar:{tmp_path}/train-{{0..0}}.tar": "has its index, and training reads the shards",
        f"folder:{tmp_path}/images": "needs no preparation: training reads it as it is",
        f"hf:{tmp_path}/images": "is here, and training reads it as it is",
    }.items():
        prepare.main([name])
        printed = capsys.readouterr()
        assert f"{name} {line}" in printed.out + printed.err
    assert len(list((tmp_path / "cache" / "vit_jax" / "tar").iterdir())) == 1
