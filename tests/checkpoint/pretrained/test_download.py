# SPDX-License-Identifier: Apache-2.0
"""Published files are fetched once, whole, and never left damaged in the cache."""

import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import threading
import types
import zipfile
from pathlib import Path

import pytest
import rich.console

from tests.clock import wait_until
from tests.file_server import serve
from vit_jax.checkpoint.pretrained import catalogue, download
from vit_jax.checkpoint.pretrained.catalogue import find
from vit_jax.checkpoint.pretrained.download import cache_path, compute_sha256, fetch, resolve
from vit_jax.observe import console, progress_log
from vit_jax.utils.errors import UserError


def npz(size=3 * 2**20):
    """A zip archive of about `size` bytes that don't compress."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("head/bias.npy", bytes(range(256)) * (size // 256))
    return file.getvalue()


DATA = npz()


@pytest.fixture
def server():
    with serve() as server:
        server.files["bucket/a.npz"] = DATA
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def published(server, **known):
    row = find("sam:B/16")
    return dataclasses.replace(row, url_https=server.url("bucket/a.npz"), **known)


def part_of(path):
    return path.with_name(path.name + ".part")


def refusal(source, **kwargs):
    with pytest.raises(UserError) as caught:
        fetch(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_is_fetched_once_and_named_on_the_screen(server, cache, capsys):
    path = fetch(server.url("bucket/a.npz"))
    assert path.read_bytes() == DATA
    assert files(cache) == [str(path.relative_to(cache))]
    screen = capsys.readouterr().out
    assert server.url("bucket/a.npz") in screen
    assert f"wrote {path} (3.0 MiB)" in screen
    assert fetch(server.url("bucket/a.npz")) == path
    assert len(server.asked) == 1


def test_the_cache_mirrors_buckets(cache):
    name = "imagenet21k+imagenet2012:B/16@224"
    expected = cache / "vit_models" / "imagenet21k+imagenet2012" / "ViT-B_16-224.npz"
    assert cache_path(find(name)) == expected
    assert cache_path(find(name).url_gs) == expected
    assert cache_path("https://example.org:80/x.npz") == cache / "example.org_80" / "x.npz"


def test_the_cache_is_in_the_home_folder_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path("gs://b/x.npz") == tmp_path / ".cache" / "vit_jax" / "b" / "x.npz"
    assert cache_path("gs://b/x.npz", cache_dir=Path("here")) == Path("here/b/x.npz")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "https://h/../x", "https://h/%2e%2e/x", "x"])
def test_other_addresses_and_ways_out_of_the_cache_are_refused(url, cache):
    assert url in refusal(url)


def test_a_cut_download_goes_on(server, cache):
    server.cut_after = [2**20, 2**20]
    assert fetch(server.url("bucket/a.npz")).read_bytes() == DATA
    ranges = [wanted for _, wanted in server.asked]
    assert ranges == [None, f"bytes={2**20}-", f"bytes={2**21}-"]


def test_a_later_call_goes_on_with_what_came(server, cache):
    server.cut_after = [2**20, 0]
    message = refusal(server.url("bucket/a.npz"))
    path = cache_path(server.url("bucket/a.npz"))
    assert "1.0 MiB are kept" in message
    assert str(path) in message
    assert not path.exists()
    assert part_of(path).stat().st_size == 2**20
    assert fetch(server.url("bucket/a.npz")).read_bytes() == DATA
    assert server.asked[-1][1] == f"bytes={2**20}-"
    assert not part_of(path).exists()


def test_a_server_without_ranges_starts_anew(server, cache):
    server.ranges, server.cut_after = False, [2**20]
    assert fetch(server.url("bucket/a.npz")).read_bytes() == DATA


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_a_part_of_full_length_or_more_is_finished(server, cache, extra):
    path = cache_path(server.url("bucket/a.npz"))
    path.parent.mkdir(parents=True)
    part_of(path).write_bytes(DATA + extra)
    assert fetch(server.url("bucket/a.npz")).read_bytes() == DATA
    assert len(server.asked) == (2 if extra else 1)


def test_a_length_that_nobody_says_is_no_matter(server, cache):
    server.send_length = False
    assert fetch(server.url("bucket/a.npz")).read_bytes() == DATA


def test_half_a_file_of_unknown_length_is_not_kept(server, cache):
    server.send_length, server.cut_after = False, [2**20]
    message = refusal(server.url("bucket/a.npz"))
    assert "1048576 bytes that are not a whole .npz file" in message
    assert files(cache) == []


def test_a_size_other_than_published_is_refused_before_the_download(server, cache):
    message = refusal(published(server, size=len(DATA) + 1))
    assert f"{len(DATA)} bytes, but {len(DATA) + 1} in the catalogue" in message
    assert files(cache) == []


def test_a_hash_other_than_published_is_refused(server, cache):
    sha256 = hashlib.sha256(DATA).hexdigest()
    message = refusal(published(server, sha256="0" * 64))
    assert sha256 in message
    assert "0" * 64 in message
    assert files(cache) == []
    path = fetch(published(server, sha256=sha256, size=len(DATA)))
    assert compute_sha256(path) == sha256


def test_a_file_put_there_by_hand_is_compared_too(server, cache):
    path = fetch(published(server))
    message = refusal(published(server, sha256="0" * 64))
    assert f"delete {path}" in message
    assert path.exists()
    path.write_bytes(DATA[:1000])
    assert "1000 bytes" in refusal(published(server, size=len(DATA)))
    assert "not a whole .npz" in refusal(published(server))


def test_a_missing_file_says_so(server, cache):
    message = refusal(server.url("bucket/none.npz"))
    assert "HTTP 404" in message
    assert server.url("bucket/none.npz") in message
    assert files(cache) == []


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream"])
@pytest.mark.parametrize("name", ["page.npz", "page.csv"])
def test_a_web_page_is_not_kept(server, cache, content_type, name):
    server.files[name] = b" <!doctype html><html>Please log in</html>"
    server.content_type = content_type
    assert "a web page" in refusal(server.url(name))
    assert files(cache) == []


def test_a_web_page_does_not_destroy_what_came(server, cache):
    server.cut_after = [2**20, 0]
    refusal(server.url("bucket/a.npz"))
    server.content_type, server.ranges = "text/html", False
    refusal(server.url("bucket/a.npz"))
    assert part_of(cache_path(server.url("bucket/a.npz"))).stat().st_size == 2**20


def test_offline_a_line_says_what_to_put_where(cache):
    with serve() as server:
        url = server.url("bucket/a.npz")
    message = refusal(url)
    path = cache_path(url)
    assert f"can't fetch {url}" in message
    assert f"put it at {path}" in message
    assert files(cache) == []
    path.write_bytes(DATA)
    assert fetch(url) == path


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(server.url("bucket/a.npz"), cache_dir=tmp_path / "file")
    assert "set VIT_JAX_CACHE" in message


def test_two_downloads_at_once_are_one(server, cache, capsys):
    server.hold = threading.Event()
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(server.url("bucket/a.npz"))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: "waiting for the process" in capsys.readouterr().out)
    server.hold.set()
    for thread in threads:
        thread.join(600)
    assert len(server.asked) == 1
    assert paths == [cache_path(server.url("bucket/a.npz"))] * 2
    assert paths[0].read_bytes() == DATA
    assert len(files(cache)) == 1


def test_who_waited_for_a_failed_download_fetches_itself(server, cache, capsys):
    path = cache_path(server.url("bucket/a.npz"))
    path.parent.mkdir(parents=True)
    with part_of(path).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=fetch, args=(server.url("bucket/a.npz"),))
        thread.start()
        wait_until(lambda: "waiting" in capsys.readouterr().out)
        part_of(path).unlink()
    thread.join(600)
    assert path.read_bytes() == DATA


def test_without_locks_each_process_has_a_part_of_its_own(server, cache, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(download.fcntl, "flock", flock)
    path = fetch(server.url("bucket/a.npz"))
    assert path.read_bytes() == DATA
    assert len(files(cache)) == 1


@pytest.fixture
def screen(monkeypatch):
    """Makes a terminal, or a file, the screen; what it shows is to be read from the result."""
    monkeypatch.delenv("CI", raising=False)  # a log there, whatever the screen

    def make(*, terminal):
        file = io.StringIO()
        screen = rich.console.Console(
            file=file,
            force_terminal=terminal,
            width=120,
            color_system=None,
            highlight=False,
            _environ={"TERM": "xterm"},
        )
        for module in (console, progress_log):
            monkeypatch.setattr(module, "console", screen)
        return file

    return make


def test_progress_is_a_line_every_ten_seconds(server, cache, screen, monkeypatch):
    server.files["bucket/b.npz"] = npz(20 * 2**20)
    shown = screen(terminal=False)
    seconds = itertools.count(step=4)  # for each MiB
    clock = types.SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(progress_log, "time", clock)
    fetch(server.url("bucket/b.npz"))
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("b.npz")]
    assert [line.split("/20.0 MiB")[0] for line in lines] == [
        f"b.npz  {mib}.0" for mib in (3, 6, 9, 12, 15, 18, 20)
    ]
    assert lines[0] == "b.npz  3.0/20.0 MiB  0.2 MiB/s  ETA 0:01:08"


def test_progress_is_a_bar_on_a_terminal(server, cache, screen):
    shown = screen(terminal=True)
    fetch(server.url("bucket/a.npz"))
    assert "━" in shown.getvalue()
    assert "3.0/3.0 MiB" in shown.getvalue()


INDEX = """\
name,ds,final_val,filename,adapt_ds,adapt_filename
Ti/16,i21k,0.41,Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0,cifar100,x
Ti/16,i21k,0.43,Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0,cifar100,x
"""


@pytest.fixture
def bucket(server, monkeypatch):
    """Puts the server in the place of Google storage."""
    monkeypatch.setattr(catalogue, "_GOOGLE_STORAGE", f"{server.address}/")
    return server


def test_a_name_gives_a_file_and_what_is_known_of_it(server, cache, monkeypatch):
    rows = {"sam:B/16": published(server)}
    monkeypatch.setattr(download, "load_catalogue", lambda: rows)
    found = resolve("sam:B/16")
    assert found is not None
    path, row = found
    assert path.read_bytes() == DATA
    assert row == rows["sam:B/16"]
    with pytest.raises(UserError, match="did you mean 'sam:B/16'"):
        resolve("sam:B/61")


def test_a_published_spelling_asks_the_index(bucket, cache):
    stem = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
    better = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.5"
    bucket.files["vit_models/augreg/index.csv"] = INDEX.replace(
        "0.03-do_0.0-sd_0.0", "0.03-do_0.0-sd_0.5"
    ).encode()
    bucket.files[f"vit_models/augreg/{better}.npz"] = DATA
    bucket.files[f"vit_models/augreg/{stem}.npz"] = DATA
    found = resolve("augreg:Ti_16")
    assert found is not None
    path, row = found
    assert path.name == f"{better}.npz"
    assert (row.variant, row.num_classes) == ("Ti/16", 21843)
    bucket.files.clear()
    assert resolve("augreg:Ti_16") == found  # All of it is in the cache.


def test_a_file_name_needs_no_index(bucket, cache):
    stem = "S_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
    bucket.files[f"vit_models/augreg/{stem}.npz"] = DATA
    found = resolve(f"augreg:{stem}")
    assert found is not None
    assert found[0].name == f"{stem}.npz"
    assert len(bucket.asked) == 1


@pytest.mark.parametrize(
    "text", ["runs/digits", "ViT-B_16.npz", "/a/b.npz", "gs://b/a.npz", "https://h/a", "a.npz:img"]
)
def test_paths_and_urls_are_no_names(text):
    assert resolve(text) is None


def test_what_exists_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sam:B").mkdir()
    (tmp_path / "sam:B" / "16").write_text("")
    assert resolve("sam:B/16") is None
