# SPDX-License-Identifier: Apache-2.0
"""Local copies of workdirs in buckets: what they have, what is uploaded, and the lock."""

import contextlib
import json
import os
import time

import pytest

from tests.buckets import server
from tools.bucket_server import PAGE, BucketServer
from vit_jax.checkpoint.manifest import find_fault, write_manifest
from vit_jax.checkpoint.workdir import find_holder, lock_workdir
from vit_jax.utils import buckets, mirrors
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_folder, find_local, find_mirror
from vit_jax.utils.suggestions import suggest_workdir
from vit_jax.utils.text import printable

__all__ = ["server"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    retries = {"max_retries": 2, "initial_delay": "1ms", "max_delay": "2ms"}
    monkeypatch.setattr(buckets, "RETRIES", retries)
    monkeypatch.setattr(mirrors, "RENEW_S", 0.05)
    monkeypatch.setattr(mirrors, "LEASE_S", 0.4)
    yield
    mirrors._mirrors.clear()


def names(server: BucketServer) -> dict[str, bytes]:
    return {k.removeprefix("run/"): v for k, v in server.objects[server.bucket].items()}


def open_run(server: BucketServer, scheme: str = "gs", *, again: bool = False):
    """The folder of a workdir; `again` as another process opens it."""
    if again:
        mirrors._mirrors.clear()
    return find_folder(f"{scheme}://{server.bucket}/run")


def write_checkpoint(folder, text: str = "weights"):
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "d").write_text(text)
    (folder / "description").mkdir()
    (folder / "description" / "metadata").write_text("{}")
    (folder / "run.json").write_text("{}")
    write_manifest(folder)
    return folder


def write_foreign_lock(server: BucketServer, **changes):
    record = {"holder": "process 7 on other", "pid": 7, "boot": "other", "time": time.time()}
    server.put(server.bucket, "run/lock", json.dumps(record | changes).encode())


def test_a_local_folder_is_itself(tmp_path):
    assert find_folder(tmp_path) == tmp_path
    assert find_mirror(tmp_path) is None


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_small_files_come_and_go_and_lines_show_the_url(server, scheme):
    server.put(server.bucket, "run/config.json", b"{}")
    server.put(server.bucket, "run/tensorboard/events.1", b"large")
    folder = open_run(server, scheme)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]
    (folder / "metrics.jsonl").write_text("line\n")
    (folder / "evals").mkdir()
    (folder / "evals" / "x.json").write_text("1")
    (folder / "half.tmp").write_text("")
    mirrors.upload(folder)
    assert names(server)["metrics.jsonl"] == b"line\n"
    assert names(server)["evals/x.json"] == b"1"
    assert "half.tmp" not in names(server)
    before = len(server.requests)
    mirrors.upload(folder)
    assert len(server.requests) == before
    url = f"{scheme}://{server.bucket}/run"
    assert printable(f"wrote {folder / 'a'}") == f"wrote {url}/a"
    assert (open_run(server, scheme, again=True) / "evals" / "x.json").read_text() == "1"


def test_a_refresh_keeps_what_is_not_uploaded(server):
    folder = open_run(server)
    (folder / "evals.jsonl").write_text("mine")
    server.put(server.bucket, "run/evals.jsonl", b"theirs")
    server.put(server.bucket, "run/ledger.jsonl", b"1")
    mirrors.refresh(folder)
    assert (folder / "evals.jsonl").read_text() == "mine"
    server.put(server.bucket, "run/ledger.jsonl", b"2")
    mirrors.refresh(folder)
    assert (folder / "ledger.jsonl").read_text() == "2"


def test_arrays_of_a_checkpoint_are_read_when_it_is_verified(server, tmp_path):
    folder = open_run(server)
    mirror = find_mirror(folder)
    assert mirror is not None
    mirror.upload_checkpoint(4, write_checkpoint(tmp_path / "a"))
    folder = open_run(server, again=True)
    step = folder / "checkpoints" / "4"
    assert (step / "description" / "metadata").exists()
    assert not (step / "params").exists()
    assert find_fault(step) is None
    assert (step / "params" / "d").read_text() == "weights"
    # Another one of this step, by another process.
    mirror.upload_checkpoint(4, write_checkpoint(tmp_path / "b", "others"))
    mirrors.refresh(folder)
    assert find_fault(step) is None
    assert (step / "params" / "d").read_text() == "others"


def test_the_manifest_is_written_last_and_removed_first(server, tmp_path):
    mirror = find_mirror(open_run(server))
    assert mirror is not None
    checkpoint = write_checkpoint(tmp_path / "a")
    mirror.upload_checkpoint(4, checkpoint)
    wrote = [path for method, path in server.requests if method in ("POST", "PUT")]
    assert "manifest.json" in wrote[-1]
    server.requests.clear()
    mirror.remove_checkpoint(4)
    removed = [path for method, path in server.requests if method == "DELETE"]
    assert len(removed) == 4
    assert "manifest.json" in removed[0]
    assert not names(server)


def test_what_is_missing_or_changed_in_the_bucket_is_a_fault(server, tmp_path):
    mirror = find_mirror(open_run(server))
    assert mirror is not None
    mirror.upload_checkpoint(4, write_checkpoint(tmp_path / "a"))
    for content, fault in ((b"weightz", "has changed"), (b"", "bytes long"), (None, "is missing")):
        server.put(server.bucket, "run/checkpoints/4/params/d", content)
        step = open_run(server, again=True) / "checkpoints" / "4"
        assert fault in (find_fault(step) or "")


def test_a_bucket_that_fails_is_no_fault_of_a_checkpoint(server, tmp_path):
    mirror = find_mirror(open_run(server))
    assert mirror is not None
    mirror.upload_checkpoint(4, write_checkpoint(tmp_path / "a"))
    step = open_run(server, again=True) / "checkpoints" / "4"
    server.fail = lambda method, path: (503, "")
    with pytest.raises(UserError, match="params/d can't be read"):
        find_fault(step)


def test_a_torn_upload_is_no_checkpoint_and_is_removed_by_the_next_run(server):
    server.put(server.bucket, "run/checkpoints/8/params/d", b"half")
    server.put(server.bucket, "run/config.json", b"{}")
    folder = open_run(server)
    assert not (folder / "checkpoints").exists()
    assert "checkpoints/8/params/d" in names(server)
    with lock_workdir(folder):
        assert "checkpoints/8/params/d" not in names(server)


def test_one_run_holds_the_lock_and_uploads_at_its_end(server):
    folder = open_run(server)
    with lock_workdir(folder):
        assert find_holder(folder) == f"process {os.getpid()} on {os.uname().nodename}"
        (folder / "config.json").write_text("{}")
        (folder / "ledger.jsonl").write_text("end")
    assert names(server) == {"config.json": b"{}", "ledger.jsonl": b"end"}
    assert find_holder(folder) is None


def test_a_run_that_is_refused_leaves_nothing(server):
    folder = open_run(server)
    with contextlib.suppress(UserError), lock_workdir(folder):
        (folder / "ledger.jsonl").write_text("start")
        raise UserError("no such data")
    assert names(server) == {}


def test_a_folder_of_workdirs_or_images_is_not_copied(server):
    for name in ("a/config.json", "a/checkpoints/4/manifest.json", "x.jpg", "checkpoints/4/x"):
        server.put(server.bucket, f"run/{name}", b"large")
    assert list(open_run(server).iterdir()) == []


def test_errors_name_the_url(server):
    folder = open_run(server)
    assert str(UserError(f"{folder}/x is torn")) == f"gs://{server.bucket}/run/x is torn"


def test_a_folder_that_is_no_workdir_is_described(server):
    folder = open_run(server)
    assert "nothing is stored there: no run has begun, or the bucket" in suggest_workdir(folder)
    server.put(server.bucket, "run/x.jpg", b"")
    assert suggest_workdir(folder) == "; it holds x.jpg"
    server.put(server.bucket, "run/a/config.json", b"{}")
    assert suggest_workdir(folder) == f"; did you mean 'gs://{server.bucket}/run/a'?"


def test_a_lock_that_is_renewed_is_in_use(server):
    folder = open_run(server)
    write_foreign_lock(server)
    renewals = []

    def renew(method, path):
        renewals.append(write_foreign_lock(server, time=time.time() + len(renewals)))

    server.fail = renew
    with pytest.raises(UserError, match="is in use by process 7 on other"), lock_workdir(folder):
        pass


@pytest.mark.parametrize(
    "left",
    [
        {},  # It is not renewed.
        {"time": time.time() - 86400},
        {"pid": 2**22 + 1, "boot": mirrors._boot()},
    ],
)
def test_the_lock_of_a_process_that_was_killed_is_taken_over(server, left):
    folder = open_run(server)
    write_foreign_lock(server, **left)
    with lock_workdir(folder):
        assert f"process {os.getpid()} on" in names(server)["lock"].decode()


def test_a_run_whose_lock_was_taken_over_writes_nothing_more(server, tmp_path):
    folder = open_run(server)
    mirror = find_mirror(folder)
    assert mirror is not None
    with lock_workdir(folder):
        write_foreign_lock(server)
        until = time.monotonic() + 20
        while mirror._lost is None and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(OSError, match="taken over by process 7 on other"):
            mirror.upload_checkpoint(4, write_checkpoint(tmp_path / "a"))
        (folder / "ledger.jsonl").write_text("end")
    assert set(names(server)) == {"lock"}
    assert "process 7" in names(server)["lock"].decode()


def test_a_damaged_checkpoint_is_moved_to_a_free_name(server, tmp_path):
    mirror = find_mirror(open_run(server))
    assert mirror is not None
    for place in ("broken/4", "broken/4-2"):
        mirror.upload_checkpoint(4, write_checkpoint(tmp_path / place))
        assert mirror.set_aside(4) == place
        assert names(server)[f"{place}/params/d"] == b"weights"
        assert not any(name.startswith("checkpoints") for name in names(server))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_credentials_that_may_not_list_are_refused(server, scheme):
    server.put(server.bucket, "run/config.json", b"{}")
    refusal = (403, '{"error": {"code": 403}}')
    is_listing = ("/o?", f"/{server.bucket}/?")
    server.fail = lambda method, path: refusal if any(x in path for x in is_listing) else None
    with pytest.raises(UserError, match=rf"--workdir={scheme}://.* can't be listed"):
        open_run(server, scheme)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_listing_whose_later_pages_are_refused_is_no_empty_workdir(server, scheme):
    for i in range(PAGE + 5):
        server.put(server.bucket, f"run/checkpoints/4/params/{i:03}", b"")
    server.put(server.bucket, "run/checkpoints/4/manifest.json", b"{}")
    server.put(server.bucket, "run/config.json", b"{}")
    refusal = (403, '{"error": {"code": 403}}')
    later = ("pageToken", "continuation-token")
    server.fail = lambda method, path: refusal if any(x in path for x in later) else None
    with pytest.raises(UserError, match="can't be listed"):
        open_run(server, scheme)


def test_a_checkpoint_whose_manifest_is_not_listed_is_kept(server):
    folder = open_run(server)
    mirror = find_mirror(folder)
    assert mirror is not None
    for i in range(PAGE + 5):
        server.put(server.bucket, f"run/checkpoints/4/data/{i:03}", b"")
    server.put(server.bucket, "run/checkpoints/4/manifest.json", b"{}")
    refusal = (403, '{"error": {"code": 403}}')
    server.fail = lambda method, path: refusal if "pageToken" in path else None
    mirror.remove_halves()
    assert len(names(server)) == PAGE + 6


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_credentials_that_may_not_write_are_refused(server, scheme):
    folder = open_run(server, scheme)
    refused = ("PUT", "POST")
    server.fail = lambda method, path: (403, "") if method in refused else None
    with pytest.raises(UserError, match=r"lock can't be written: the credentials"):  # noqa: SIM117
        with lock_workdir(folder):
            pass


def test_names_that_leave_the_folder_are_not_copied(server, tmp_path):
    server.put(server.bucket, "run/../x", b"")
    server.put(server.bucket, "run//x", b"")
    folder = open_run(server)
    assert list(folder.iterdir()) == []


def test_copies_of_processes_that_were_killed_are_removed(server, tmp_path):
    left = tmp_path / "cache" / "vit_jax" / "workdirs" / "left"
    left.mkdir(parents=True)
    (left / ".used").touch()
    folder = open_run(server)
    assert not left.exists()
    open_run(server, again=True)
    assert folder.exists()


def test_sources_of_weights_in_a_bucket(server):
    url = f"gs://{server.bucket}/run"
    folder = open_run(server)
    assert find_local(url) == str(folder)
    assert find_local(f"{url}/checkpoints/4:ema_params") == f"{folder}/checkpoints/4:ema_params"
    for end in ("/checkpoints", "/checkpoints/4", ""):
        assert find_local(f"{url}{end}/") == f"{folder}{end}"
        assert find_local(f"{url}{end}") == f"{folder}{end}"
    for source in ("runs/a", f"{url}/x.npz", f"{url}/x.npz:img", "augreg:B/16", "https://h/x"):
        assert find_local(source) == source


@pytest.mark.parametrize(
    "url", ["az://b/x", "gs:/bucket/x", "gs://bucket", "file:///x", "GS://b/x"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(UserError, match=r"--workdir=.*expected .*gs://BUCKET/PATH"):
        find_folder(url)
