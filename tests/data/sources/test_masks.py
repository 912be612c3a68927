# SPDX-License-Identifier: Apache-2.0
"""Images with masks: folders, manifests, Parquet files and scenes that are drawn."""

import csv
import io
import logging
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import pack
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.sources.files import manifest_dataset
from vit_jax.data.sources.label_maps import decode_depth, decode_mask, make_values
from vit_jax.data.sources.masks import masks_dataset
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.data.sources.scenes import scenes_dataset
from vit_jax.utils.errors import UserError

VALUES = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
# The first line is no class, so that the others are numbered from 0.
LINES = "ignored\nsky\ntree\ncar\n"
CLASSES = np.array([[255, 0, 1], [2, 255, 0]], np.uint8)


def encode(values, mode="L"):
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("P")
        image.putdata(values.ravel().tolist())
        image.putpalette([7 * i % 256 for i in range(768)])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def encode_bits(rows, bits, kind):
    """A file in gray whose pixels have fewer than 8 bits."""
    height, width = len(rows), len(rows[0])
    packed = [np.unpackbits(np.array(row, np.uint8)[:, None], axis=1)[:, -bits:] for row in rows]
    lines = [np.packbits(line.ravel()).tobytes() for line in packed]
    if kind == "pgm":
        header = f"P5 {width} {height} {2**bits - 1} ".encode()
        return header + np.array(rows, np.uint8).tobytes()
    if kind == "tiff":
        data = b"".join(lines)
        tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 278: height}
        tags[279] = len(data)
        fields = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
        count = struct.pack("<H", len(fields))
        directory = count + b"".join(fields) + bytes(4)
        return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x))
        for name, x in chunks.items()
    )


def write(root, names=("a", "b", "c"), *, masks="masks", lines=LINES, below=""):
    for folder in ("images", masks):
        (root / folder / below).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.full((*VALUES.shape, 3), number, np.uint8)
        Image.fromarray(pixels).save(root / "images" / below / f"{name}.png")
        mask = encode(VALUES, "P" if number % 2 else "L")
        (root / masks / below / f"{name}.png").write_bytes(mask)
    if lines:
        (root / "classes.txt").write_text(lines)
    return root


def rows_of(dataset, split="all", key="data.split"):
    source = dataset.open(split, key=key)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("masks", ["masks", "annotations"])
def test_a_folder_of_images_and_one_of_masks_give_label_maps(tmp_path, masks):
    dataset = masks_dataset(str(write(tmp_path, masks=masks)))
    assert dataset.info.pixel_classes == ("sky", "tree", "car")
    assert dataset.info.num_classes == 0
    rows = rows_of(dataset, "train+validation+test")
    assert len(rows) == 3
    for row in rows:
        np.testing.assert_array_equal(row["label_map"], CLASSES)
        assert "label" not in row


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_splits_are_folders_outside_or_inside_of_images_and_masks(tmp_path, outside):
    for split, names in (("training", "ab"), ("val", "c")):
        if outside:
            write(tmp_path / split, names, lines=None)
        else:
            write(tmp_path, names, below=split)
    (tmp_path / "classes.txt").write_text(LINES)
    assert masks_dataset(str(tmp_path)).lengths == {"train": 2, "validation": 1}


def test_images_without_masks_and_masks_without_images_are_logged(tmp_path, caplog):
    write(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "images" / "b.png").unlink()
    with caplog.at_level(logging.INFO):
        dataset = masks_dataset(str(tmp_path))
    assert sum(dataset.lengths.values()) == 1
    assert "left out 1 images without a mask: images/a.png" in caplog.text
    assert "left out 1 masks without an image: masks/b.png" in caplog.text


def _no_classes(root):
    (root / "classes.txt").unlink()


def _no_masks(root):
    shutil.rmtree(root / "masks")


def _other_names(root):
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"mask_{path.name}"))


def _twice(root):
    (root / "masks" / "a.bmp").write_bytes(b"")


def _names_twice(root):
    (root / "classes.txt").write_text("sky\nsky\n")


def _mixed(root):
    write(root, "d", below="train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_classes, r"no file .*classes\.txt: expected one that names the class of each value"),
        (_no_masks, "has no masks: expected images/x.jpg and masks/x.png in"),
        (_other_names, "none of the same name: .* has images/a.png and masks/mask_a.png"),
        (_twice, "masks/a.bmp and masks/a.png: expected one of them"),
        (_names_twice, "classes.txt names 'sky' twice"),
        (_mixed, "holds train and images/a.png: expected folders of splits alone"),
    ],
)
def test_a_folder_that_is_not_as_expected_is_refused_in_one_line(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        masks_dataset(str(tmp_path))
    assert "\n" not in str(error.value)


def test_values_beyond_the_classes_and_colours_are_errors_of_the_image():
    values = make_values(["sky", "tree"], where="classes.txt")
    with pytest.raises(ImageError, match=r"mask has the value 2: expected 0 to 1, .* or 255"):
        values.find_classes(np.array([[0, 2]], np.uint8))
    with pytest.raises(ImageError, match="mask has the value 300"):
        values.find_classes(np.array([[0, 300]], np.int32))
    with pytest.raises(ImageError, match=r"mask has colours \(RGB\)"):
        decode_mask(encode(np.zeros((2, 2, 3), np.uint8)))
    with pytest.raises(ImageError, match="mask can't be read"):
        decode_mask(b"\x89PNG\r\n\x1a\n")
    # Of 16 bits, all are read.
    np.testing.assert_array_equal(decode_mask(encode(np.array([[300, 1]], np.uint16))), [[300, 1]])


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_of_fewer_than_8_bits_are_read_as_they_are_stored(bits, kind):
    values = np.arange(16).reshape(2, 8) % 2**bits
    mask = decode_mask(encode_bits(values.tolist(), bits, kind))
    np.testing.assert_array_equal(mask, values)
    if bits > 1 and kind != "pgm":
        depth = decode_depth(encode_bits(values.tolist(), bits, kind), 2.0)
        np.testing.assert_array_equal(depth, values / 2)


def test_a_mask_of_another_size_than_its_image_is_counted_as_corrupt(tmp_path, caplog):
    root = write(tmp_path)
    (root / "masks" / "b.png").write_bytes(encode(VALUES.T.copy()))
    spec = DatasetSpec(
        name=f"masks:{root}",
        split="train+validation+test",
        preprocess="decode|resize(4)",
        batch_size=3,
        data_dir=None,
        key="data",
        num_threads=0,
    )
    with caplog.at_level(logging.INFO):
        batch = next(eval_batches(spec))
    assert batch["mask"].sum() == 2
    assert "its mask has 2x3 pixels, and the image 3x2: expected the same" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("label_size", [None, (4, 4)], ids=["resized", "own size"])
def test_a_mask_is_turned_as_its_image_is(tmp_path, orientation, label_size):
    rng = np.random.default_rng(orientation)
    values = rng.integers(0, 3, (3, 4)).astype(np.uint8)
    root = write(tmp_path, "abc", lines="sky\ntree\ncar\n")
    for name in "abc":
        exif = Image.Exif()
        exif[274] = orientation
        image = Image.fromarray(np.repeat(values[..., None], 3, -1))
        image.save(root / "images" / f"{name}.png", exif=exif)
        (root / "masks" / f"{name}.png").write_bytes(encode(values))
    spec = DatasetSpec(
        name=f"masks:{root}",
        split="train",
        preprocess="decode(orient=True)|resize_long(4)|pad_to(4)",
        batch_size=1,
        data_dir=None,
        key="data",
        num_threads=0,
        label_size=label_size,
    )
    batch = next(eval_batches(spec))
    assert batch["mask"].sum() == 1
    label_map, image = batch["label_map"][0], batch["image"][0, ..., 0]
    if label_size is None:
        known = label_map != 255
        assert known.sum() == 12
        np.testing.assert_array_equal(label_map[known], image[known])
    else:
        top, left, height, width, *own = batch["extent"][0]
        assert (height, width) == tuple(own)
        shown = image[top : top + height, left : left + width]
        np.testing.assert_array_equal(label_map[:height, :width], shown)


def test_a_manifest_has_a_column_of_masks(tmp_path):
    write(tmp_path)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "split"])
        writer.writerows([f"images/{n}.png", f"masks/{n}.png", "train"] for n in "ab")
    dataset = manifest_dataset(str(tmp_path / "list.csv"))
    assert dataset.info.pixel_classes == ("sky", "tree", "car")
    for row in rows_of(dataset, "train"):
        np.testing.assert_array_equal(row["label_map"], CLASSES)
    (tmp_path / "both.csv").write_text("image,mask,label\nimages/a.png,masks/a.png,1\n")
    with pytest.raises(UserError, match="expected image, and either label or labels, or mask"):
        manifest_dataset(str(tmp_path / "both.csv"))


def test_parquet_files_have_a_column_of_masks(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    image = encode(np.zeros((*VALUES.shape, 3), np.uint8))
    table = {"image": [{"bytes": image}] * 2, "mask": [{"bytes": encode(VALUES)}] * 2}
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    (tmp_path / "classes.txt").write_text(LINES)
    dataset = parquet_dataset(str(tmp_path))
    assert dataset.lengths == {"train": 2}
    for row in rows_of(dataset, "train"):
        np.testing.assert_array_equal(row["label_map"], CLASSES)
    pq.write_table(pa.table(table | {"label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="both label and mask"):
        parquet_dataset(f"{tmp_path}/*.parquet")


@pytest.mark.parametrize("text", ["32", "24x48"])
def test_scenes_have_their_size_and_are_the_same_each_time(text):
    height, width = (int(side) for side in (text.split("x") * 2)[:2])
    dataset, other = scenes_dataset(text), scenes_dataset.__wrapped__(text)
    source, again = dataset.open("test", key="k"), other.open("test", key="k")
    for i in (0, 7, len(source) - 1):
        assert source[i]["image"].shape == (height, width, 3)
        np.testing.assert_array_equal(source[i]["image"], again[i]["image"])
        np.testing.assert_array_equal(source[i]["label_map"], again[i]["label_map"])
        # The digit is brighter than the background, which the mask divides.
        image, label_map = source[i]["image"].mean(axis=-1), source[i]["label_map"]
        assert image[label_map > 0].mean() > image[label_map == 0].mean() + 40
    classes = {int(c) for i in range(60) for c in np.unique(source[i]["label_map"])}
    assert classes == set(range(11))


def test_scenes_of_a_split_have_digits_of_that_split():
    dataset = scenes_dataset("32")
    records = dataset.records
    parts = {split: set(records.first[rows]) for split, rows in dataset.splits.items()}
    assert not parts["train"] & (parts["validation"] | parts["test"])
    for split, rows in dataset.splits.items():
        assert set(records.others[rows[0]]) == parts[split]


def test_packing_masks_is_refused(tmp_path):
    with pytest.raises(UserError, match="has masks, which a pack does not hold"):
        pack.main(["digits_masks:16", str(tmp_path / "packed")])
    assert not (tmp_path / "packed").exists()


def test_masks_belong_to_what_identifies_the_data(tmp_path):
    source = masks_dataset(str(write(tmp_path / "a"))).open("train", key="k")
    other = write(tmp_path / "b", lines="sky\nignored\ntree\ncar\n")
    assert fingerprint(source) != fingerprint(masks_dataset(str(other)).open("train", key="k"))


@pytest.mark.parametrize("text", ["", "8", "32x", "32x99999", "a"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="expected digits_masks:SIZE or digits_masks:HEIGHTxWIDTH"):
        scenes_dataset(text)


def test_training_batches_are_the_same_for_any_step_they_start_at():
    spec = DatasetSpec(
        name="digits_masks:24",
        split="train",
        preprocess="decode|inception_crop(16)|flip_lr|color_jitter(0.3)",
        batch_size=4,
        data_dir=None,
        key="data",
        num_threads=0,
    )
    batches = train_batches(spec, seed=3, step=0)
    _, second = next(batches), next(batches)
    later = next(train_batches(spec, seed=3, step=1))
    assert second["label_map"].shape == (4, 16, 16)
    for name in ("image", "label_map"):
        np.testing.assert_array_equal(second[name], later[name])
