# SPDX-License-Identifier: Apache-2.0
"""Odd, broken and hostile image files."""

import io
import resource
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.ops.decode import MAX_PIXELS, ImageError, decode_image, read_header
from vit_jax.data.ops.transforms import apply, resize_image
from vit_jax.data.preprocess import parse_preprocess


def picture(height=40, width=50, seed=0):
    """Smooth, so that formats with losses keep it."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y * 3 + seed, x * 4, 255 - y - x], -1)
    return Image.fromarray((image % 256).astype(np.uint8))


def save(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_pillow(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)


FRAMES = {"save_all": True, "append_images": [picture(seed=90), picture(seed=180)]}
FILES = {
    "jpeg": save(picture(), "JPEG"),
    "progressive jpeg": save(picture(), "JPEG", progressive=True),
    "cmyk jpeg": save(picture().convert("CMYK"), "JPEG"),
    "grey jpeg": save(picture().convert("L"), "JPEG"),
    "png": save(picture(), "PNG"),
    "palette png with alpha": save(picture().quantize(17), "PNG", transparency=3),
    "one bit png": save(picture().convert("1"), "PNG"),
    "webp": save(picture(), "WEBP", lossless=True),
    "lossy webp": save(picture(), "WEBP"),
    "animated webp": save(picture(), "WEBP", lossless=True, **FRAMES),
    "gif": save(picture(), "GIF"),
    "animated gif": save(picture(), "GIF", **FRAMES),
    "bmp": save(picture(), "BMP"),
    "tiff": save(picture(), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_as_its_first_frame_in_rgb(name):
    decoded = decode_image(FILES[name])
    assert (decoded.dtype, decoded.shape) == (np.uint8, (40, 50, 3))
    # Decoders round the colours of JPEG, CMYK and lossy WebP in ways of their own.
    assert np.abs(decoded - as_pillow(FILES[name])).mean() <= 1


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"tiff"}))
def test_format_and_size_stand_in_the_header(name):
    kind, size = read_header(FILES[name])
    assert kind == name.split(" with")[0].split()[-1].upper()
    assert size == (50, 40)


def test_sixteen_bits_become_eight():
    image = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    decoded = decode_image(cv2.imencode(".png", image)[1].tobytes())
    np.testing.assert_array_equal(decoded, (image >> 8).astype(np.uint8)[..., ::-1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 30000), (30000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_extreme_sides_are_read(shape, kind):
    image = Image.fromarray(np.full((*shape, 3), 200, np.uint8))
    assert decode_image(save(image, kind)).shape == (*shape, 3)


def test_a_strip_is_not_blown_up_without_limit():
    strip = {"image": save(Image.fromarray(np.zeros((1, 30000, 3), np.uint8)), "PNG")}
    ops = parse_preprocess("decode|resize_small(256)|central_crop(224)", key="data.preprocess")
    with pytest.raises(ImageError, match="7680000x256"):
        apply(ops, strip, np.random.default_rng(0))
    assert resize_image(np.zeros((1, 3000, 3), np.uint8), 16, 48000).shape == (16, 48000, 3)


def png_header(width, height):
    """A PNG of nothing that says it has this size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        out += struct.pack(">I", len(data)) + kind + data + crc
    return out


def jpeg_header(width, height):
    jpeg = bytearray(FILES["jpeg"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(jpeg)


BOMBS = {
    "png": png_header(50_000, 50_000),
    "jpeg": jpeg_header(65_000, 65_000),
    "gif": FILES["gif"][:6] + struct.pack("<HH", 65_000, 65_000) + FILES["gif"][10:],
    "bmp": FILES["bmp"][:18] + struct.pack("<ii", 60_000, -60_000) + FILES["bmp"][26:],
    "webp": FILES["animated webp"][:24] + b"\xff\xff\x00" * 2 + FILES["animated webp"][30:],
    "tiff": save(picture(1, 1), "TIFF"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name, monkeypatch):
    if name == "tiff":  # a real one would be large
        monkeypatch.setattr("vit_jax.data.ops.decode.MAX_PIXELS", 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=r"an image of \d+x\d+ pixels"):
        decode_image(BOMBS[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_the_limit_is_what_it_says():
    assert MAX_PIXELS == 134_217_728
    with pytest.raises(ImageError, match="1 to 134,217,728"):
        decode_image(png_header(2**14, 2**13 + 1))


# Half of an animated GIF holds its first frame.
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"animated gif"}))
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_files_that_are_cut_off_are_refused(name, share):
    with pytest.raises(ImageError):
        decode_image(FILES[name][: int(share * len(FILES[name]))])


def test_a_jpeg_without_its_end_is_refused():
    with pytest.raises(ImageError, match="the end is missing"):
        decode_image(FILES["jpeg"][:-2])
    thumbnail = save(picture(8, 8), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = FILES["jpeg"][:2] + segment + FILES["jpeg"][2:]
    assert decode_image(whole).shape == (40, 50, 3)
    with pytest.raises(ImageError, match="the end is missing"):
        decode_image(whole[:-2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_heeded_where_asked_for(kind):
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was held on its side
    encoded = save(picture(), kind, exif=exif)
    stored, upright = (
        apply(parse_preprocess(text, key="k"), {"image": encoded}, np.random.default_rng(0))
        for text in ("decode", "decode(orient=True)")
    )
    assert stored["image"].shape == (40, 50, 3)
    np.testing.assert_array_equal(upright["image"], np.rot90(stored["image"], -1))


def mutate(data, rng):
    """Some bytes changed, some lost or doubled, or the end lost."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        data[rng.integers(len(data))] = rng.integers(256)
    start, stop = sorted(rng.integers(len(data), size=2))
    return bytes(
        [
            data,
            data[:stop],
            data[:start] + data[stop:],
            data[:stop] + data[start:],
        ][rng.integers(4)]
    )


@pytest.mark.parametrize("name", FILES)
def test_random_damage_gives_an_image_or_a_value_error(name):
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(60):
        damaged = mutate(FILES[name], rng)
        start = time.process_time()
        try:
            decoded = decode_image(damaged)
            assert decoded.dtype == np.uint8
            assert decoded.ndim == 3
        except ValueError:
            refused += 1
        assert time.process_time() - start < 2
    assert refused
    # KiB: no more than the largest image that is allowed takes, and its copies.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * 3 * MAX_PIXELS / 1024
