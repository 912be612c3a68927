# SPDX-License-Identifier: Apache-2.0
"""Packing in parts: together they make what one job makes, and nothing before they are joined."""

import errno
import fcntl
import json
import shutil

import cv2
import numpy as np
import pytest

from tests.buckets import server
from vit_jax.data import sources
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pack import main
from vit_jax.data.pack_parts import parse_part
from vit_jax.data.sources import find_dataset, open_source
from vit_jax.data.sources.packed import read_manifest
from vit_jax.utils.errors import UserError

__all__ = ["server"]

# 22 images in shards of 4: two of `test` and four of `train`.
ROWS = {"test": 7, "train": 15}
FLAGS = ["--short_side=16", "--shard_size=4"]
RAW = ["--raw=8", "--shard_size=4"]
KINDS = pytest.mark.parametrize("flags", [FLAGS, RAW], ids=["jpegs", "pixels"])


def jpeg(seed):
    image = cv2.resize(np.random.default_rng(seed).uniform(0, 255, (4, 4, 3)), (30, 20 + seed))
    return cv2.imencode(".jpg", image)[1].tobytes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of which one image is broken."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in ROWS.items():
        for number in range(count):
            path = root / split / ("cat", "dog")[number % 2] / f"{number:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"nothing" if (split, number) == ("train", 5) else jpeg(number))
    return root


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The packs of one job, by their flags."""
    root = tmp_path_factory.mktemp("whole")
    for name, flags in (("jpegs", FLAGS), ("pixels", RAW)):
        main([f"folder:{photos}", str(root / name), *flags])
    return {str(FLAGS): root / "jpegs", str(RAW): root / "pixels"}


@pytest.fixture
def run(photos, tmp_path, said):
    """Runs the command on the photos."""

    def run(*arguments, source=photos):
        sources.packed._dataset.cache_clear()
        main([f"folder:{source}", str(tmp_path / "dst"), *arguments])

    return run


def refuse(run, *arguments, words, **others):
    with pytest.raises(UserError) as error:
        run(*arguments, **others)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(source, index):
    try:
        return np.asarray(source[index]["image"]).tobytes()
    except ImageError as e:
        return str(e)


def assert_same_records(name, other):
    """Every record of every split has the same label and the same pixels or bytes."""
    assert find_dataset(name, data_dir=None).info == find_dataset(other, data_dir=None).info
    for split, rows in ROWS.items():
        a, b = (open_source(n, split, data_dir=None, key="split") for n in (name, other))
        assert len(a) == len(b) == rows
        for i in range(rows):
            assert a.label(i) == b.label(i)
            assert read(a, i) == read(b, i)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_parts_of_jpegs_make_the_bytes_of_one_job(count, whole, run, tmp_path):
    for number in reversed(range(count)):
        run(*FLAGS, f"--part={number}/{count}")
        assert not (tmp_path / "dst" / "pack.json").exists()
    run(*FLAGS, "--join")
    assert contents(tmp_path / "dst") == contents(whole[str(FLAGS)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_parts_of_pixels_make_the_records_of_one_job(count, whole, run, tmp_path):
    for number in range(count):
        run(*RAW, f"--part={number}/{count}")
    run(*RAW, "--join")
    assert_same_records(f"raw:{tmp_path / 'dst'}", f"raw:{whole[str(RAW)]}")
    manifest = read_manifest(tmp_path / "dst", key="k")
    files = [tmp_path / "dst" / file.name for file in manifest.pixel_files()]
    found = b"".join(file.read_bytes() for file in files)
    one = whole[str(RAW)]
    assert found == (one / "test.pixels").read_bytes() + (one / "train.pixels").read_bytes()
    assert sorted(path.name for path in files) == sorted(
        path.name for path in (tmp_path / "dst").glob("*.pixels")
    )


@KINDS
def test_a_part_that_was_killed_resumes_its_own_files(flags, whole, run, tmp_path):
    for number in range(2):
        run(*flags, f"--part={number}/2")
    folder = tmp_path / "dst"
    # As after a kill: one shard of a part has its images alone, and a temporary file is left.
    (folder / "train-00001-of-00004.npz").unlink()
    (folder / "train-00001-of-00004.npz.0123abcd.tmp").write_bytes(b"half")
    refuse(run, *flags, "--join", words=["1 of 2 parts are not complete: 1;", "--part=1/2"])
    assert not (folder / "pack.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    run(*flags, "--part=1/2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    run(*flags, "--join")
    kind = "raw" if flags is RAW else "packed"
    assert_same_records(f"{kind}:{folder}", f"{kind}:{whole[str(flags)]}")


@KINDS
def test_joining_and_packing_again_change_nothing(flags, run, tmp_path, said):
    for number in range(3):
        run(*flags, f"--part={number}/3")
    run(*flags, "--join")
    before = contents(tmp_path / "dst")
    run(*flags, "--join")
    run(*flags, "--part=1/3")
    assert said[-1] == f"part 1/3 is complete, and DST={str(tmp_path / 'dst')!r} has been joined"
    assert contents(tmp_path / "dst") == before


def test_a_join_that_was_killed_before_its_end_can_be_repeated(run, tmp_path, whole):
    for number in range(2):
        run(*FLAGS, f"--part={number}/2")
    saved = contents(tmp_path / "dst")
    run(*FLAGS, "--join")
    # Killed after the dataset was complete, before the records of parts were removed.
    for name, content in saved.items():
        (tmp_path / "dst" / name).write_bytes(content)
    run(*FLAGS, "--join")
    assert contents(tmp_path / "dst") == contents(whole[str(FLAGS)])


def test_a_killed_start_is_not_complete(run, tmp_path):
    for number in range(9):
        run(*FLAGS, f"--part={number}/9")
    record = tmp_path / "dst" / "part-00004-of-00009.json"
    record.write_bytes(record.read_bytes()[:100])
    refuse(run, *FLAGS, "--join", words=["1 of 9 parts are not complete: 4;"])
    run(*FLAGS, "--part=4/9")
    run(*FLAGS, "--join")


def test_missing_parts_are_named(run):
    run(*FLAGS, "--part=2/12")
    run(*FLAGS, "--part=7/12")
    words = ["10 of 12 parts are not complete: 0-1, 3-6, 8-11; run", "--part=0/12"]
    refuse(run, *FLAGS, "--join", words=words)
    refuse(run, *FLAGS, words=["has parts of a pack, such as 2/12", "--join"])


def test_a_folder_without_parts_is_not_joined(run, tmp_path):
    refuse(run, *FLAGS, "--join", words=["dst' does not exist: run --part=0/N"])
    (tmp_path / "dst").mkdir()
    refuse(run, *FLAGS, "--join", words=["has no parts: run --part=0/N"])
    run(*FLAGS)
    run(*FLAGS, "--join")  # The pack of one job is complete as it is.
    (tmp_path / "dst" / "test-00000-of-00002.npz").unlink()
    refuse(run, *FLAGS, "--join", words=["1 of 6 shards are missing, such as test-00000-of-00002"])
    refuse(run, *FLAGS, "--part=0/2", words=["lacks shards of part 0/2", "without --part"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64/64", ["--part=64/64: expected 0/64 to 63/64", "count from 0"]),
        ("1/0", ["--part=1/0: expected 1 to 65,536 parts"]),
        ("0/99999", ["expected 1 to 65,536 parts"]),
        ("3", ["--part='3': expected NUMBER/COUNT, such as 0/64 to 63/64"]),
        ("-1/4", ["--part='-1/4': expected NUMBER/COUNT"]),
        ("/64", ["--part='/64'"]),
        ("1/64/2", ["expected NUMBER/COUNT"]),
        ("", ["--part='': expected NUMBER/COUNT"]),
        ("a\nb", ["--part='a\\nb'"]),
    ],
)
def test_a_part_is_a_number_below_the_count(text, words):
    with pytest.raises(UserError) as error:
        parse_part(text)
    for word in words:
        assert word in str(error.value)


def test_parts_with_other_settings_are_refused(run, tmp_path):
    run(*FLAGS, "--part=0/2")
    other = ["--short_side=24", "--shard_size=4"]
    words = ["--part=1/2 and part 0/2 in DST=", "not of one pack: short_side='16' there", "'24'"]
    refuse(run, *other, "--part=1/2", words=words)
    words = ["--part=0/2 and what was begun", "quality='90' there, and '50' here"]
    refuse(run, *FLAGS, "--quality=50", "--part=0/2", words=words)
    refuse(run, *FLAGS, "--part=0/3", words=["has part 0/2 of another job: expected parts of 3"])
    run(*FLAGS, "--part=1/2")
    refuse(run, *other, "--join", words=["holds another pack: short_side='16' there, and '24'"])
    record = tmp_path / "dst" / "part-00001-of-00002.json"
    values = json.loads(record.read_text())
    values["manifest"]["quality"] = 80
    record.write_text(json.dumps(values) + "\n")
    words = ["part 0 in DST=", "part 1 are not of one pack: quality='80' there"]
    refuse(run, *FLAGS, "--join", words=words)
    record.rename(record.with_name("part-00001-of-00007.json"))
    refuse(run, *FLAGS, "--join", words=["has parts of jobs of 2 and 7 parts: expected one"])


def test_data_that_changed_between_parts_is_refused(photos, run, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    run(*FLAGS, "--part=0/2", source=tmp_path / "photos")
    (tmp_path / "photos" / "train" / "cat" / "00.jpg").write_bytes(jpeg(9))
    words = ["the records of 'train' have changed between them"]
    refuse(run, *FLAGS, "--part=1/2", source=tmp_path / "photos", words=words)
    refuse(run, *FLAGS, "--part=0/2", source=tmp_path / "photos", words=words)


@KINDS
def test_damaged_files_are_found_before_the_dataset_is_made(flags, run, tmp_path):
    for number in range(2):
        run(*flags, f"--part={number}/2")
    ending = "pixels" if flags is RAW else "array_record"
    path = sorted((tmp_path / "dst").glob(f"train*.{ending}"))[0]
    path.write_bytes(path.read_bytes()[:50])
    words = [path.name, "delete the files of that shard, and run its part"]
    refuse(run, *flags, "--join", words=words)
    labels = sorted((tmp_path / "dst").glob("train*.npz"))[0]
    labels.write_bytes(b"")
    refuse(run, *flags, "--join", words=[f"{labels.name}: not a whole zip", words[1]])
    words = [f"{labels.name} can't be read: ValueError: not a whole zip", "delete it, and the same"]
    refuse(run, *flags, "--part=0/2", words=words)
    assert not (tmp_path / "dst" / "pack.json").exists()
    assert len(list((tmp_path / "dst").glob("part-*.json"))) == 2


def test_a_part_runs_once_at_a_time(run, tmp_path, said, monkeypatch):
    run(*FLAGS, "--part=0/2")
    with open(tmp_path / "dst" / "part-00000-of-00002.json", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuse(run, *FLAGS, "--part=0/2", words=["another process is packing part 0/2 there"])
        run(*FLAGS, "--part=1/2")  # Parts do not wait for each other.

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run(*FLAGS, "--part=0/2")
    words = "part-00000-of-00002.json can't be locked (No locks available): make sure that no other"
    assert any(words in line for line in said)


def test_pixels_of_parts_are_read_from_a_bucket(run, whole, tmp_path, server):
    for number in range(3):
        run(*RAW, f"--part={number}/3")
    run(*RAW, "--join")
    for path in (tmp_path / "dst").iterdir():
        server.put(server.bucket, f"d/{path.name}", path.read_bytes())
    assert_same_records(f"raw:gs://{server.bucket}/d", f"raw:{whole[str(RAW)]}")
