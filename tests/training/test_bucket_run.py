# SPDX-License-Identifier: Apache-2.0
"""Runs whose workdir is in a bucket, and commands that read one."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import vit_jax
from tests.buckets import server
from tests.tiny import tiny_config
from tests.trained import write_images, write_run
from tools.bucket_server import BucketServer
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.training.run import train
from vit_jax.utils import buckets, mirrors
from vit_jax.utils.errors import UserError

__all__ = ["server"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    retries = {"max_retries": 3, "initial_delay": "1ms", "max_delay": "2ms"}
    monkeypatch.setattr(buckets, "RETRIES", retries)
    monkeypatch.setattr(mirrors, "RENEW_S", 0.1)
    monkeypatch.setattr(mirrors, "LEASE_S", 0.5)
    yield
    mirrors._mirrors.clear()


@pytest.fixture(scope="module")
def local(data_dir, tmp_path_factory):
    """The workdir of an uninterrupted run in a folder."""
    workdir = tmp_path_factory.mktemp("runs") / "local"
    train(tiny_config(data_dir), workdir)
    return workdir


def names(server: BucketServer) -> set[str]:
    return {name.removeprefix("run/") for name in server.objects[server.bucket]}


def read_records(text: str) -> list[dict]:
    """Records of `metrics.jsonl` without what is measured in seconds."""
    records = [json.loads(line) for line in text.splitlines()]
    kept = [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]
    return [record for record in kept if record.keys() != {"step"}]


def assert_like_local(server: BucketServer, scheme: str, local: Path) -> None:
    mirrors._mirrors.clear()
    ours = load_pretrained(f"{scheme}://{server.bucket}/run").params
    theirs = load_pretrained(str(local)).params
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)
    metrics = server.objects[server.bucket]["run/metrics.jsonl"].decode()
    assert read_records(metrics) == read_records((local / "metrics.jsonl").read_text())


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_in_a_bucket_is_that_in_a_folder(scheme, server, data_dir, local, capsys):
    url = f"{scheme}://{server.bucket}/run"
    result = train(tiny_config(data_dir), url)
    assert result.load().module.num_classes == 10
    assert_like_local(server, scheme, local)
    there = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    there = {name for name in there if not name.startswith(("tensorboard", "checkpoints"))}
    assert there <= names(server)
    assert any(name.startswith("tensorboard/") for name in names(server))
    steps = {name.split("/")[1] for name in names(server) if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (local / "checkpoints").iterdir()}
    assert "lock" not in names(server)
    assert f"{url}/checkpoints/8" in capsys.readouterr().out
    # It is killed before the last checkpoint counts.
    written = [name for name, _ in server.history]
    server.rewind(written.index("run/checkpoints/8/manifest.json"))
    assert "checkpoints/8/params/_METADATA" in names(server)
    mirrors._mirrors.clear()
    train(tiny_config(data_dir), url)
    assert "resuming from" in (out := capsys.readouterr().out)
    assert f"{url}/checkpoints/4" in out
    assert_like_local(server, scheme, local)
    # What is finished is not trained again.
    mirrors._mirrors.clear()
    before = len(server.history)
    train(tiny_config(data_dir), url)
    assert not any("checkpoints" in name for name, _ in server.history[before:])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_that_is_killed_at_any_moment_resumes_bit_for_bit(scheme, server, data_dir, local):
    url = f"{scheme}://{server.bucket}/run"
    train(tiny_config(data_dir), url)
    history = list(server.history)
    rng = np.random.default_rng(0)
    for moment in sorted(rng.choice(len(history), 8, replace=False)):
        server.history[:] = history
        server.rewind(int(moment))
        mirrors._mirrors.clear()
        train(tiny_config(data_dir), url)
        assert_like_local(server, scheme, local)


@pytest.mark.slow
def test_a_checkpoint_that_can_not_be_uploaded_is_tried_again(server, data_dir, local, capsys):
    def fail(method, path):
        is_first = "checkpoints/4/" in path and method in ("PUT", "POST", "DELETE")
        return (503, "") if is_first else None

    server.fail = fail
    train(tiny_config(data_dir), f"gs://{server.bucket}/run")
    assert "the checkpoint of step 4 can't be written" in capsys.readouterr().out
    assert "checkpoints/8/manifest.json" in names(server)
    assert_like_local(server, "gs", local)


@pytest.mark.slow
def test_a_second_run_is_refused(server, data_dir):
    url = f"s3://{server.bucket}/run"
    refused = []

    def try_again(record):
        if not refused:
            known = dict(mirrors._mirrors)
            mirrors._mirrors.clear()
            with pytest.raises(UserError, match="is in use by process"):
                train(tiny_config(data_dir), url)
            mirrors._mirrors.update(known)
            refused.append(record)

    train(tiny_config(data_dir), url, on_record=try_again)
    assert refused
    assert "checkpoints/8/manifest.json" in names(server)


def test_commands_read_a_workdir_in_a_bucket(server, data_dir, tmp_path, monkeypatch, capsys):
    workdir, _, _ = write_run(tmp_path / "local", data_dir)
    seconds = dict.fromkeys(("step", "compile", "data_wait", "save", "evaluation"), 1)
    event = {"time": 1.0, "step": 8, "seconds": seconds}
    ledger = [event | {"event": "start", "total": 8}, event | {"event": "end", "cause": "finished"}]
    (workdir / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in ledger))
    for file in workdir.rglob("*"):
        if file.is_file():
            name = f"run/{file.relative_to(workdir)}"
            server.put(server.bucket, name, file.read_bytes())
    url = f"gs://{server.bucket}/run"
    images = write_images(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)

    def call(command, *arguments):
        code = importlib.import_module(f"vit_jax.{command}").main(list(map(str, arguments)))
        assert not code
        return capsys.readouterr().out

    capsys.readouterr()
    out = call("status", url)
    assert out.startswith(f"{url}: step 8 of 8")
    assert "8, all files are there" in out
    assert not any("%2Fparams%2F" in path for _, path in server.requests)
    assert "75.00 %" in call("compare", url, workdir)
    assert "digit" in call("predict", url, "--checkpoint=best", *images)
    call("convert", url, "converted.npz")
    local = vit_jax.load_model(workdir)
    for source in (url, f"{url}/checkpoints/8", "converted.npz"):
        model = vit_jax.load_model(source)
        np.testing.assert_array_equal(model(images).logits, local(images).logits)
    assert f"wrote {url}/report.html" in call("report", url, "--no_predict")
    assert "report.html" in names(server)
    call("evaluate", url, "--follow", "--timeout=10")
    results = server.objects[server.bucket]["run/evals.jsonl"].decode().splitlines()
    assert [json.loads(line)["checkpoint"] for line in results] == [
        f"{url}/checkpoints/4",
        f"{url}/checkpoints/8",
    ]
