# SPDX-License-Identifier: Apache-2.0
"""The native code for JPEGs gives what the operations give, bit by bit, and survives any file."""

import dataclasses
import io
import itertools
import resource
import shutil
import struct
import subprocess
import sysconfig

import cv2
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.ops import fused
from vit_jax.data.ops.decode import ImageError, has_jpeg_end
from vit_jax.data.ops.fused import Fused, fuse
from vit_jax.data.ops.transforms import apply
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.preprocess import parse_preprocess

LINES = (
    "decode|inception_crop(56)|flip_lr",
    "decode|inception_crop(32, area_min=1)",
    "decode|inception_crop(32, variant='tensorflow')|flip_lr",
    "decode|resize(40, 56)|flip_lr",
    "decode|resize_small(50)|central_crop(48, 40)|flip_lr",
    "decode|resize_small(40)|central_crop(40)",
    "decode|resize_small(41, rounding='down')|central_crop(38, 34, rounding='nearest')",
)
SAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
SIZES = ((120, 160), (97, 131), (61, 5), (279, 3), (3, 90), (1, 1), (16, 16), (17, 200))


@pytest.fixture(autouse=True)
def operations_use_opencv(monkeypatch):
    """The operations decode without the extension, which is compared with them."""
    monkeypatch.setattr("vit_jax.data.ops.decode.extension", None)


needs_extension = pytest.mark.skipif(
    fused.extension is None, reason="vit_jax.data._jpeg was not built"
)


def picture(height, width, seed=0):
    """Large and small structures in all colours, uint8 [height, width, 3]."""
    rng = np.random.default_rng((height, width, seed))
    coarse = cv2.resize(rng.uniform(0, 255, (5, 5, 3)), (width, height))
    return np.clip(coarse + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(image, *, sampling="4:2:0", quality=90, progressive=False, restart=0):
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality,
        cv2.IMWRITE_JPEG_PROGRESSIVE: int(progressive),
        cv2.IMWRITE_JPEG_RST_INTERVAL: restart,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: SAMPLINGS[sampling],
    }
    return cv2.imencode(".jpg", image, list(itertools.chain(*options.items())))[1].tobytes()


def save(image, kind="JPEG", mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **options)
    return file.getvalue()


def run(ops, encoded, seed):
    """The image, and a number drawn after it; None for an image that can't be read."""
    rng = np.random.Generator(np.random.Philox(seed))
    try:
        return apply(ops, {"image": encoded, "label": 3}, rng)["image"], rng.random()
    except ImageError:
        return None


def operations(line):
    """Of a line: as they are, and fused."""
    ops = parse_preprocess(line, key="data.preprocess")
    return ops, fuse(ops)


def refuse(*_):
    raise AssertionError("the operations themselves ran")


def assert_native_and_equal(encoded, monkeypatch, *, lines=LINES, seeds=3):
    for line, seed in itertools.product(lines, range(seeds)):
        ops, (native,) = operations(line)
        want = run(ops, encoded, seed)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "apply", refuse)
            rng = np.random.Generator(np.random.Philox(seed))
            image = native({"image": encoded}, rng)["image"]
        np.testing.assert_array_equal(image, want[0], err_msg=f"{line} {seed}")
        assert rng.random() == want[1]


def can_build():
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    include = f"-I{sysconfig.get_path('include')}"
    program = "#include <Python.h>\n#include <stdio.h>\n#include <jpeglib.h>\n"
    if compiler is None or fused.extension is not None:
        return compiler is not None
    done = subprocess.run(
        [compiler, include, "-fsyntax-only", "-xc", "-"], input=program.encode(), check=False
    )
    return done.returncode == 0


def test_the_extension_is_there_where_it_can_be_built():
    if can_build():
        assert fused.extension is not None, "run: python setup.py build_ext --inplace"


@needs_extension
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pixels_and_draws_are_those_of_the_operations(sampling, progressive, monkeypatch):
    for number, size in enumerate(SIZES):
        encoded = encode(
            picture(*size),
            sampling=sampling,
            quality=(30, 90, 100)[number % 3],
            progressive=progressive,
            restart=number % 2,
        )
        assert_native_and_equal(encoded, monkeypatch)


@needs_extension
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_images_are_read_natively_too(progressive, monkeypatch):
    for size in SIZES:
        encoded = save(picture(*size)[..., 0], progressive=progressive)
        assert_native_and_equal(encoded, monkeypatch)


@needs_extension
@pytest.mark.parametrize("progressive", [False, True])
def test_a_whole_image_of_the_same_size_is_equal(progressive, monkeypatch):
    for height, width in SIZES:
        encoded = encode(picture(height, width), progressive=progressive)
        lines = [f"decode|resize({height}, {width})", f"decode|resize({height}, {width})|flip_lr"]
        if min(height, width) >= 16:
            lines += [
                f"decode|resize_small({min(height, width)})|central_crop({height - 7}, {width})",
                f"decode|resize_small({min(height, width)})|central_crop({height}, {width - 7})",
            ]
        assert_native_and_equal(encoded, monkeypatch, lines=lines, seeds=2)
        assert_native_and_equal(picture(height, width), monkeypatch, lines=lines, seeds=2)


@needs_extension
def test_large_and_small_crops_of_a_large_image_are_equal(monkeypatch):
    encoded = encode(picture(700, 900))
    lines = ("decode|inception_crop(24)", "decode|inception_crop(24, area_min=1, area_max=2)")
    assert_native_and_equal(encoded, monkeypatch, lines=lines, seeds=20)


@needs_extension
@pytest.mark.parametrize(
    "line",
    [
        "decode",
        "decode|flip_lr",
        "decode|inception_crop(32, method='area')",
        "decode|resize(32, method='bicubic')",
        "decode|resize_small(40)|random_crop(32)",
        "decode|central_crop(32)",
    ],
)
def test_other_lines_stay_as_they_are(line):
    ops, same = operations(line)
    assert same == ops


@needs_extension
def test_operations_that_follow_run_after_it():
    ops, (native, *rest) = operations("decode|inception_crop(32)|flip_lr|random_shift(2)|flip_lr")
    assert isinstance(native, Fused)
    assert rest == list(ops[3:])
    encoded = encode(picture(60, 80))
    for seed in range(5):
        a, b = run(ops, encoded, seed), run((native, *rest), encoded, seed)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1] == b[1]


@needs_extension
def test_pixels_in_place_of_a_file_are_resized_natively_too(monkeypatch):
    for size in SIZES:
        pixels = picture(*size)
        pixels.flags.writeable = False
        assert_native_and_equal(pixels, monkeypatch)


def exif(orientation, order="<"):
    """EXIF data of two entries: a description, and the orientation if there is one."""
    entries = [struct.pack(f"{order}HHI4s", 0x10E, 2, 4, b"abc\0")]
    if orientation is not None:
        entries.append(struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0))
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    body = header + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0" + body


@needs_extension
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [None, 1, 0, 9, *range(2, 9)])
def test_images_are_turned_upright_where_that_is_asked_for(orientation, order, monkeypatch):
    encoded = save(picture(60, 80), exif=exif(orientation, order))
    ops, native = operations("decode(orient=True)|resize_small(40)|central_crop(40)")
    want, got = run(ops, encoded, 0), run(native, encoded, 0)
    np.testing.assert_array_equal(got[0], want[0])
    stored = run(operations("decode|resize_small(40)|central_crop(40)")[0], encoded, 0)
    assert np.array_equal(got[0], stored[0]) == (orientation in (None, 0, 1, 9))
    lines = ["decode|inception_crop(32)|flip_lr"]
    if orientation in (None, 1):
        lines.append("decode(orient=True)|inception_crop(32)|flip_lr")
    assert_native_and_equal(encoded, monkeypatch, lines=lines)


@needs_extension
def test_any_exif_data_are_what_the_operations_make_of_them():
    ops, native = operations("decode(orient=True)|resize(24)")
    data, rng = exif(6), np.random.default_rng(0)
    for number in range(300):
        changed = bytearray(data[: rng.integers(6, len(data) + 1)] if number % 2 else data)
        for place in rng.integers(6, max(7, len(changed)), number % 4):
            changed[min(place, len(changed) - 1)] = rng.integers(256)
        encoded = save(picture(20, 30), exif=bytes(changed))
        np.testing.assert_array_equal(run(native, encoded, 0)[0], run(ops, encoded, 0)[0])


@needs_extension
@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_after_the_image_change_nothing(progressive, monkeypatch):
    whole = encode(picture(60, 80), progressive=progressive, restart=int(not progressive))
    for trailer in (bytes(3000), np.random.default_rng(0).bytes(1 << 16), whole[:200], b"\xff"):
        assert_native_and_equal(whole + trailer, monkeypatch, lines=LINES[:3], seeds=1)


@needs_extension
def test_the_end_of_an_image_is_found_as_the_operations_find_it():
    rng = np.random.default_rng(0)
    _, (native,) = operations("decode|resize(8)")
    found = []
    for number in range(400):
        file = encode(picture(40, 50), progressive=bool(number % 2))
        cut = file[: int(rng.integers(2, len(file)))] if number % 3 else file
        # Markers are likely in what follows.
        trailer = rng.choice(np.array([0xFF, 0, 1, 2, 8, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xE1]), 40)
        file = cut + trailer.astype(np.uint8).tobytes()
        ended = has_jpeg_end(file)
        job = native.plan(file, rng)
        if job is not None and fused.decode([job], [np.empty((8, 8, 3), np.uint8)])[0]:
            assert ended
        if not ended:
            assert run([native], file, 0) is None
        found.append(ended)
    assert 140 < sum(found) < 300


WHOLE = encode(picture(60, 80))
START = WHOLE.index(b"\xff\xda")
FRAME = WHOLE.index(b"\xff\xc0")
ODD = {
    "png": save(picture(60, 80), "PNG"),
    "webp": save(picture(60, 80), "WEBP"),
    "cmyk": save(picture(60, 80), mode="CMYK"),
    "cut off": WHOLE[:-200],
    "bytes at the end": WHOLE + b"\0\0",
    "bytes before the frame": WHOLE[:2] + b"\0\0" + WHOLE[2:],
    "damaged": WHOLE[: START + 300] + bytes(100) + WHOLE[START + 400 :],
    "empty": b"",
    "header only": WHOLE[:FRAME],
    "no image": b"\xff\xd8\xff\xd9",
    "huge": WHOLE[: FRAME + 5] + b"\xff\xdc\xff\xdc" + WHOLE[FRAME + 9 :],
    "no pixels": WHOLE[: FRAME + 5] + bytes(4) + WHOLE[FRAME + 9 :],
    "strip": encode(picture(4000, 1)),
}


@needs_extension
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("line", LINES)
def test_odd_files_are_what_the_operations_make_of_them(name, line):
    ops, native = operations(line)
    want, got = run(ops, ODD[name], 1), run(native, ODD[name], 1)
    assert (got is None) == (want is None)
    if want is not None:
        np.testing.assert_array_equal(got[0], want[0])
        assert got[1] == want[1]


@needs_extension
def test_an_image_smaller_than_the_crop_is_the_error_of_the_operation():
    _, native = operations("decode|resize_small(20)|central_crop(32)")
    with pytest.raises(ImageError, match=r"^central_crop\(32\) of a 20x27 image"):
        apply(native, {"image": WHOLE}, np.random.default_rng(0))


@needs_extension
def test_damaged_files_neither_crash_nor_fill_the_memory():
    rng = np.random.default_rng(0)
    files = [
        encode(picture(60, 80), sampling=sampling, progressive=progressive)
        for sampling in ("4:2:0", "4:4:4")
        for progressive in (False, True)
    ]
    _, native = operations("decode|inception_crop(32)|flip_lr")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(800):
        file = bytearray(files[number % len(files)])
        # Half of the time in the headers, where one byte can change everything.
        end = len(file) if number % 2 else file.index(b"\xff\xda") + 12
        for place in rng.integers(2, end, 1 + number % 5):
            file[place] = rng.integers(256)
        if number % 7 == 0:
            del file[int(rng.integers(2, len(file))) : -2]
        result = run(native, bytes(file), number)
        assert result is None or result[0].shape == (32, 32, 3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_000_000  # KB; a progressive image of 2**26 pixels alone would hold 400 MB


@needs_extension
@pytest.mark.parametrize(
    ("part", "full", "window"),
    [
        ((0, 0, 61, 80), (8, 8), (0, 0, 8, 8)),
        ((-1, 0, 60, 80), (8, 8), (0, 0, 8, 8)),
        ((0, 70, 60, 11), (8, 8), (0, 0, 8, 8)),
        ((0, 0, 0, 80), (8, 8), (0, 0, 8, 8)),
        ((0, 0, 60, 80), (8, 8), (1, 0, 8, 8)),
        ((0, 0, 60, 80), (8, 7), (0, 0, 8, 8)),
        ((2**31 - 1, 0, 2**31 - 1, 80), (8, 8), (0, 0, 8, 8)),
    ],
)
def test_what_lies_outside_of_the_image_is_not_read(part, full, window):
    out = np.zeros((8, 8, 3), np.uint8)
    whole = (WHOLE, out, (0, 0, 60, 80), (8, 8), (0, 0, 8, 8), False)
    outside = (WHOLE, out, part, full, window, False)
    assert fused.extension.decode([whole, outside]) == [True, False]
    with pytest.raises(ValueError, match="another size"):
        fused.extension.decode([whole, (WHOLE, out[:7], part, full, window, False)])


@pytest.fixture
def photos(tmp_path):
    """40 JPEGs, of which one is damaged so that only OpenCV reads it, and a PNG."""
    for number in range(40):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        file = encode(picture(50 + number, 70, number))
        (folder / f"{number}.jpg").write_bytes(ODD["damaged"] if number == 7 else file)
    (folder / "40.png").write_bytes(ODD["png"])
    return DatasetSpec(
        f"folder:{tmp_path}", "train", "decode|inception_crop(32)|flip_lr", 16, None, "data"
    )


def test_batches_are_the_same_without_the_extension(photos, monkeypatch):
    evaluated = dataclasses.replace(photos, preprocess="decode|resize_small(40)|central_crop(32)")

    def load():
        train = itertools.islice(train_batches(photos, seed=3, step=5), 4)
        return [*train, *eval_batches(evaluated)]

    calls = []
    if fused.extension is not None:
        decode = fused.extension.decode

        def count(jobs):
            calls.extend(done := decode(jobs))
            return done

        monkeypatch.setattr(fused.extension, "decode", count)
    fast = load()
    if fused.extension is not None:
        assert len(calls) > 64 + 40  # each example of the first batches, and loading ahead
        assert calls.count(False) < len(calls) / 10
    monkeypatch.setattr(fused, "extension", None)
    for a, b in zip(fast, load(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
