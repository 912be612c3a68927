# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket of moto, a server of S3 by others."""

import urllib.request

import pytest

from tests.tiny import tiny_config
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.training.run import train
from vit_jax.utils import mirrors
from vit_jax.utils.buckets import Bucket
from vit_jax.utils.mirrors import find_folder, find_mirror

pytestmark = pytest.mark.slow


@pytest.fixture
def moto(monkeypatch, tmp_path):
    server_module = pytest.importorskip("moto.server", reason="it is in the extra test-all")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mirrors, "LEASE_S", 0.5)
    request = urllib.request.Request(f"{url}/moto-bucket", data=b"", method="PUT")
    urllib.request.urlopen(request).read()
    yield "s3://moto-bucket"
    server.stop()
    mirrors._mirrors.clear()


def test_conditions_and_pages_of_listings_hold_there(moto):
    bucket = Bucket(f"{moto}/objects")
    _, none = bucket.read("lock")
    first = bucket.write("lock", b"1", if_generation=none)
    assert first is not None
    assert bucket.write("lock", b"2", if_generation=none) is None
    assert bucket.write("lock", None, if_generation=first) is not None
    names = [f"a/{i:04}" for i in range(1100)]
    bucket.each(names, lambda name: bucket.write(name, b""))
    assert bucket.list("a/") == names
    bucket.delete(names)
    assert bucket.list() == []


def test_a_run_resumes_there(moto, data_dir, tmp_path):
    for workdir in (str(tmp_path / "local"), f"{moto}/run"):
        train(tiny_config(data_dir, total_steps=4), workdir)
        mirrors._mirrors.clear()
        train(tiny_config(data_dir, total_steps=8), workdir)
    mirror = find_mirror(find_folder(f"{moto}/run"))
    assert mirror is not None
    assert mirror.find_holder() is None
    theirs = load_pretrained(str(tmp_path / "local")).params
    for path, x in load_pretrained(f"{moto}/run").params.items():
        assert (x == theirs[path]).all(), path
