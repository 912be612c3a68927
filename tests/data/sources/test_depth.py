# SPDX-License-Identifier: Apache-2.0
"""Images with depths: folders, manifests, Parquet files and scenes that are drawn."""

import csv
import dataclasses
import io
import logging

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import pack
from vit_jax.data.check import inspect_record, report
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.ops.transforms import apply
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources.files import manifest_dataset
from vit_jax.data.sources.label_maps import decode_depth
from vit_jax.data.sources.masks import depth_dataset
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.data.sources.scenes import depth_scenes_dataset
from vit_jax.utils.errors import UserError

METRES = np.array([[0.5, 0, 2.25], [4, 8.125, 0]], np.float32)


def encode(values, kind="png"):
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, values)
    elif kind == "npz":
        np.savez(stream, depth=values)
    else:
        Image.fromarray(values).save(stream, "TIFF" if kind == "tif" else "PNG")
    return stream.getvalue()


MILLIMETRES = encode((METRES * 1000).astype(np.uint16))


def write(root, scale="1000\n"):
    for folder in ("images", "depth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate("abcd"):
        pixels = np.full((*METRES.shape, 3), number, np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    (root / "depth" / "a.png").write_bytes(MILLIMETRES)
    (root / "depth" / "b.npy").write_bytes(encode(METRES, "npy"))
    (root / "depth" / "c.npz").write_bytes(encode(METRES.astype(np.float64), "npz"))
    (root / "depth" / "d.tif").write_bytes(encode(METRES, "tif"))
    if scale:
        (root / "depth_scale.txt").write_text(scale)
    return root


def rows_of(dataset, split):
    source = dataset.open(split, key="data.split")
    return [source[i] for i in range(len(source))]


def test_a_folder_of_images_and_one_of_depths_give_metres(tmp_path):
    dataset = depth_dataset(str(write(tmp_path)))
    assert dataset.info.pixel_depth
    assert dataset.info.pixel_classes is None
    rows = rows_of(dataset, "train+validation+test")
    assert len(rows) == 4
    for row in rows:
        assert row["label_map"].dtype == np.float32
        np.testing.assert_array_equal(row["label_map"], METRES)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, r"depth/a.png has integers, and there is no file .*depth_scale.txt: expected one"),
        ("-1", "depth_scale.txt reads '-1': expected the number that is one metre"),
        ("mm", "depth_scale.txt can't be read"),
    ],
)
def test_a_scale_that_is_missing_or_none_is_refused_in_one_line(tmp_path, scale, message):
    with pytest.raises(UserError, match=message) as error:
        depth_dataset(str(write(tmp_path, scale)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["b.npy", "c.npz", "d.tif"])
def test_arrays_of_integers_need_a_scale_too(tmp_path, name):
    root = write(tmp_path, scale=None)
    (root / "depth/a.png").unlink()
    depth_dataset.cache_clear()
    assert depth_dataset(str(root)).info.pixel_depth
    millimetres = (1000 * METRES).astype(np.uint16)
    (root / "depth" / name).write_bytes(encode(millimetres, name[2:]))
    depth_dataset.cache_clear()
    with pytest.raises(UserError, match=f"depth/{name} has integers, and there is no file"):
        depth_dataset(str(root))


def test_the_check_of_data_prints_the_range_of_depths(tmp_path):
    root = write(tmp_path)
    dataset = depth_dataset(str(root))
    source = dataset.open("train+validation+test", key="split")
    findings = [inspect_record(source, index) for index in range(4)]
    known = METRES[METRES > 0]
    line = f"depths: {known.min():.3g} to {known.max():.3g} m, of {known.size / METRES.size:.1%} "
    assert f"{line}of the pixels" in report(findings, dataset)
    none = [dataclasses.replace(finding, depths=(np.nan, np.nan, 0.0)) for finding in findings]
    assert "  images without any: 3" in report([findings[0], *none[1:]], dataset)
    assert any(line.startswith("depths: no pixel") for line in report(none, dataset))


def test_values_that_are_no_depth_are_not_known():
    values = np.array([[np.nan, np.inf, -1, 0, 3]])
    np.testing.assert_array_equal(decode_depth(encode(values, "npy"), None), [[0, 0, 0, 0, 3]])
    np.testing.assert_array_equal(decode_depth(encode(values[..., None], "npy"), None)[0, 4], 3)
    # A larger number than a float32 holds.
    np.testing.assert_array_equal(decode_depth(encode(np.array([[1e300]]), "npy"), None), [[0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(np.zeros((2, 2, 3), np.uint8)), r"has colours \(RGB\)"),
        (encode(np.zeros(4), "npy"), r"of the shape \(4,\)"),
        (encode(np.zeros((2, 2), np.int32), "npy"), "has integers: expected a file depth_scale"),
        (encode(np.zeros((2, 2), bool), "npy"), "of bool: expected integers or floats"),
        (encode(np.array([[None]]), "npy"), "can't be read|claims to be"),
        (encode(np.zeros((2, 2)), "npy").replace(b"(2, 2)", b"(9, 9)"), "claims to be float64"),
        (b"\x89PNG\r\n\x1a\n", "depth can't be read"),
        (b"PK\3\4", "depth can't be read"),
        (b"text", "depth can't be read: 4 bytes that are no PNG or TIFF image"),
    ],
)
def test_what_is_no_depth_image_is_an_error_of_the_image(content, message):
    with pytest.raises(ImageError, match=message) as error:
        decode_depth(content, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "inception_crop(6)|flip_lr",
        "random_scale(9, 0.5, 2)|pad_to(20)|random_crop(8)",
        "resize(5, 11)|random_shift(2)|color_jitter(0.2)",
    ],
)
def test_depths_move_with_their_image_without_interpolation(line):
    values = np.arange(1, 241, dtype=np.uint8).reshape(12, 20)
    features = {"image": np.repeat(values[..., None], 3, -1), "label_map": values / np.float32(16)}
    line = line.replace("resize(5, 11)", "resize(5, 11, 'nearest')")
    for seed in range(3):
        found = apply(parse_preprocess(line, key="k"), features, np.random.default_rng(seed))
        label_map = found["label_map"]
        assert label_map.shape == found["image"].shape[:2]
        assert label_map.dtype == np.float32
        assert set(np.unique(label_map)) <= {0, *np.unique(features["label_map"])}


def test_batches_pad_with_pixels_of_no_depth(tmp_path, caplog):
    root = write(tmp_path)
    (root / "depth" / "b.npy").write_bytes(encode(METRES.T.copy(), "npy"))
    spec = DatasetSpec(
        name=f"depth:{root}",
        split="train+validation+test",
        preprocess="decode|resize_long(3)|pad_to(4)",
        batch_size=4,
        data_dir=None,
        key="data",
        num_threads=0,
    )
    with caplog.at_level(logging.INFO):
        batch = next(eval_batches(spec))
    assert "its depth has 2x3 pixels, and the image 3x2" in caplog.text
    assert batch["mask"].sum() == 3
    assert batch["label_map"].dtype == np.float32
    for depth in batch["label_map"][batch["mask"] > 0]:
        np.testing.assert_array_equal(depth[1:3, :3], METRES)
        assert depth.sum() == METRES.sum()


def test_manifests_and_parquet_files_have_a_column_of_depths(tmp_path):
    write(tmp_path)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "far", "split"])
        writer.writerows([f"images/{n[0]}.png", f"depth/{n}", "train"] for n in ("a.png", "b.npy"))
    for row in rows_of(manifest_dataset(f"{tmp_path}/list.csv#depth=far"), "train"):
        np.testing.assert_array_equal(row["label_map"], METRES)
    (tmp_path / "both.csv").write_text("image,mask,depth\nimages/a.png,a.png,a.png\n")
    with pytest.raises(UserError, match="labels, or mask, or depth, or captions"):
        manifest_dataset(str(tmp_path / "both.csv"))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    image = encode(np.zeros((*METRES.shape, 3), np.uint8))
    table = {"image": [image] * 2, "depth": [MILLIMETRES, encode(METRES, "npy")]}
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    for row in rows_of(parquet_dataset(str(tmp_path)), "train"):
        np.testing.assert_array_equal(row["label_map"], METRES)
    pq.write_table(pa.table(table | {"label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="both label and depth"):
        parquet_dataset(f"{tmp_path}/*.parquet")


def test_drawn_scenes_have_depths_and_are_the_same_each_time():
    dataset, other = depth_scenes_dataset("24x48"), depth_scenes_dataset.__wrapped__("24x48")
    source, again = dataset.open("test", key="k"), other.open("test", key="k")
    for i in (0, 5):
        image, depth = source[i]["image"], source[i]["label_map"]
        assert image.shape == (24, 48, 3)
        assert depth.shape == (24, 48)
        np.testing.assert_array_equal(depth, again[i]["label_map"])
        np.testing.assert_array_equal(image, again[i]["image"])
        near = depth < 3.001
        assert image[near].mean() > image[~near].mean() + 40
        np.testing.assert_array_equal(depth[-1][~near[-1]], 4)


def test_packing_is_refused_and_training_batches_start_at_any_step(tmp_path):
    with pytest.raises(UserError, match="has depth images, which a pack does not hold"):
        pack.main(["digits_depth:16", str(tmp_path / "packed")])
    spec = DatasetSpec(
        name="digits_depth:24",
        split="train",
        preprocess="decode|inception_crop(16)|flip_lr",
        batch_size=4,
        data_dir=None,
        key="data",
        num_threads=0,
    )
    batches = train_batches(spec, seed=3, step=0)
    _, second = next(batches), next(batches)
    later = next(train_batches(spec, seed=3, step=1))
    np.testing.assert_array_equal(second["label_map"], later["label_map"])
    assert (second["label_map"] > 0).all()
