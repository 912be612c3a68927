# SPDX-License-Identifier: Apache-2.0
"""Odd, broken and hostile image files."""

import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data.ops import decode
from vit_jax.data.ops.decode import MAX_PIXELS, ImageError, decode_image, read_header
from vit_jax.data.ops.transforms import apply, resize_image
from vit_jax.data.preprocess import parse_preprocess

ROOT = Path(__file__).parents[3]


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


# Values of 16 bits, and the upper 8 of them.
RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 100
UPPER = (RAMP >> 8).astype(np.uint8)


def tiff(values, *, bits, white_is_zero=False, sample_format=1):
    """A TIFF of one grey channel, uncompressed, of `values` as they are to be stored."""
    height, width = 16, 16
    content = values if isinstance(values, bytes) else values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero)}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height, 279: len(content), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def twelve_bits(values):
    """The upper 12 bits of values, two in three bytes."""
    a, b = (values >> 4).reshape(-1, 2).astype(np.uint32).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()


SIXTEEN_BITS = {
    "grey png": save(Image.fromarray(RAMP), "PNG"),
    "grey tiff": save(Image.fromarray(RAMP), "TIFF"),
    "compressed tiff": save(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": save(
        Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"
    ),
    "colour tiff": cv2.imencode(".tiff", RAMP[..., None].repeat(3, 2))[1].tobytes(),
    "tiff whose white is zero": tiff(65535 - RAMP, bits=16, white_is_zero=True),
    "tiff of 12 bits": tiff(twelve_bits(RAMP), bits=12),
    "jpeg 2000": save(Image.fromarray(RAMP), "JPEG2000"),
    "pgm": b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    "pgm of 12 bits": b"P5 16 16 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_of_sixteen_bits_the_upper_eight_are_used(name):
    want = UPPER[..., None].repeat(3, 2)
    np.testing.assert_array_equal(decode_image(SIXTEEN_BITS[name]), want)


FLOATS = (RAMP / 65535).astype(np.float32)


@pytest.mark.parametrize(
    ("encoded", "kind"),
    [
        (save(Image.fromarray(FLOATS), "TIFF"), "floats"),
        (b"Pf 16 16 -1.0\n" + FLOATS.tobytes(), "floats"),
        (save(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit or signed integers"),
        (tiff(RAMP.astype(np.uint32), bits=32), "32-bit or signed integers"),
        (tiff(RAMP.astype(np.int16), bits=16, sample_format=2), "32-bit or signed integers"),
        (tiff(UPPER.astype(np.int8), bits=8, sample_format=2), "signed integers"),
    ],
)
def test_pixels_of_unknown_range_are_refused(encoded, kind):
    with pytest.raises(ImageError, match=f"pixels that are {kind}.*integers of 8 or 16 bits"):
        decode_image(encoded)


def test_sixteen_bits_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x112] = 6
    encoded = save(Image.fromarray(RAMP), "TIFF", exif=exif)
    np.testing.assert_array_equal(decode_image(encoded, orient=True)[..., 0], np.rot90(UPPER, -1))


def test_colours_of_five_bits_are_scaled_to_eight():
    white_and_red = np.array([0x7FFF, 0x7C00], "<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    encoded = b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + header + white_and_red
    np.testing.assert_array_equal(decode_image(encoded), [[[255, 255, 255], [255, 0, 0]]])


GREY = Image.fromarray(UPPER)
ALPHA = Image.fromarray(UPPER.T.copy())
MODES = {
    "1": GREY.convert("1"),
    "L": GREY,
    "LA": Image.merge("LA", (GREY, ALPHA)),
    "P": GREY.quantize(256),
    "RGBA": Image.merge("RGBA", (GREY, GREY, GREY, ALPHA)),
    "CMYK": GREY.convert("RGB").convert("CMYK"),
    "YCbCr": GREY.convert("RGB").convert("YCbCr"),
}
SAVED = [
    *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA")),
    *(("TIFF", mode) for mode in MODES),
    *(("JPEG2000", mode) for mode in ("L", "LA", "RGBA")),
    *(("GIF", mode) for mode in ("1", "L", "P")),
    *(("BMP", mode) for mode in ("1", "L", "P", "RGBA")),
]


@pytest.mark.parametrize(("kind", "mode"), SAVED)
def test_every_mode_keeps_its_values(kind, mode):
    options = {"transparency": bytes(range(256))} if (kind, mode) == ("PNG", "P") else {}
    decoded = decode_image(save(MODES[mode], kind, **options)).astype(int)
    want = np.asarray(MODES["1"].convert("L")) if mode == "1" else UPPER
    # Colour transforms round.
    assert np.abs(decoded - want[..., None]).max() <= (1 if mode == "YCbCr" else 0)


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


# What cameras and editors append: videos, gain maps, further views, and padding of a block.
TRAILERS = {
    "zeros": bytes(5000),
    "a video": b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(1 << 20),
    "a gain map": save(picture(seed=90), "JPEG"),
    "half a gain map": save(picture(seed=90), "JPEG")[:400],
    "end markers": b"\xff\xd9" * 9 + b"\xff",
    "a scan without an end": b"\xff\xda\0\x08\1\1\0\0\x3f\0 and pixels",
}
JPEGS = {name: FILES[name] for name in FILES if name.endswith("jpeg")}
JPEGS["jpeg with restarts"] = cv2.imencode(
    ".jpg", np.asarray(picture()), [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
)[1].tobytes()


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("name", JPEGS)
def test_the_end_of_a_jpeg_is_its_own_and_not_that_of_the_file(name, trailer):
    whole, extra = JPEGS[name], TRAILERS[trailer]
    np.testing.assert_array_equal(decode_image(whole + extra), decode_image(whole))
    # Entropy-coded data of an image that is cut off go on, until a marker that they can't have.
    start = whole.rindex(b"\xff\xda") + 16
    for cut in range(start, len(whole) - 2, 37):
        if trailer in ("zeros", "a gain map", "half a gain map"):
            with pytest.raises(ImageError, match="the end is missing"):
                decode_image(whole[:cut] + extra)


@pytest.mark.skipif(decode.extension is None, reason="vit_jax.data._jpeg was not built")
def test_what_libjpeg_warns_of_is_not_printed(capfd):
    whole = FILES["jpeg"]
    start = whole.index(b"\xff\xda") + 100
    files = [
        whole,
        whole[:-2] + bytes(3) + whole[-2:],
        whole[:start] + bytes(40) + whole[start + 40 :],
        whole[:start] + whole[-2:],
    ]
    native = [decode_image(file) for file in files]
    assert capfd.readouterr() == ("", "")
    for file, image in zip(files, native, strict=True):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        np.testing.assert_array_equal(image, cv2.imdecode(np.frombuffer(file, np.uint8), flags))


def chunk(name, content):
    return (
        struct.pack(">I4s", len(content), name)
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


@pytest.mark.parametrize("orient", [False, True])
def test_odd_parts_of_a_png_change_nothing_and_are_not_printed(orient, capfd):
    png = FILES["png"]
    want = decode_image(png)
    parts = [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile")),
        chunk(b"bKGD", b"x"),
        chunk(b"tRNS", b"x"),
        chunk(b"sBIT", b"\x09\x09\x09"),
        chunk(b"eXIf", b"none"),
        chunk(b"zTXt", b"comment\0\0none"),
        chunk(b"abCd", b"unknown"),
        chunk(b"iCCP", b"damaged")[:-1] + b"?",
        # An animation that ends before its first frame.
        chunk(b"acTL", struct.pack(">II", 10, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)),
    ]
    for part in parts:
        odd = png[:33] + part + png[33:]
        np.testing.assert_array_equal(decode_image(odd, orient=orient), want)
    grey = save(picture().convert("L"), "PNG")
    with_palette = grey[:33] + chunk(b"PLTE", bytes(30)) + grey[33:]
    np.testing.assert_array_equal(decode_image(with_palette), decode_image(grey))
    place = png.index(b"IDAT") + 40
    damaged = png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :]
    for broken in (damaged, png[:12] + b"CgBI" + png[16:], png[:-4], png[:-20]):
        with pytest.raises(ImageError):
            decode_image(broken)
    assert capfd.readouterr() == ("", "")


def test_a_png_without_its_palette_is_refused_and_not_black(capfd):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 3, 0, 0, 0))
    colors = chunk(b"PLTE", bytes(range(10, 19)))
    pixels, end = chunk(b"IDAT", zlib.compress(b"\0\0\1\2")), chunk(b"IEND", b"")
    start = FILES["png"][:8]
    whole = decode_image(start + header + colors + pixels + end)
    assert whole.tolist() == [[[10, 11, 12], [13, 14, 15], [16, 17, 18]]]
    twice = start + header + colors + chunk(b"PLTE", bytes(9)) + pixels + end
    np.testing.assert_array_equal(decode_image(twice), whole)
    for parts, lost in (((pixels,), "PLTE"), ((pixels, colors), "PLTE"), ((colors,), "IDAT")):
        with pytest.raises(ImageError, match=f"not a readable image: {lost} is missing"):
            decode_image(start + header + b"".join(parts) + end)
    assert capfd.readouterr() == ("", "")


PIXELS = b"".join(b"\0" + bytes(range(9)) for _ in range(2))
STREAM = zlib.compress(PIXELS)


def png(*, header=(), pixels=PIXELS, stream=None, palette=None, parts=b"", end=b""):
    """A PNG of 3x2 pixels with right checksums of its parts, and other values in its header."""
    fields = {"width": 3, "height": 2, "depth": 8, "color": 2, "compression": 0, "filter": 0}
    fields |= {"interlace": 0} | dict(header)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *fields.values()))
    colors = b"" if palette is None else chunk(b"PLTE", palette)
    data = chunk(b"IDAT", zlib.compress(pixels) if stream is None else stream)
    return FILES["png"][:8] + head + colors + data + parts + chunk(b"IEND", end)


INDEXED = {"header": {"color": 3}, "pixels": bytes(8)}
WRONG = {
    "wrong adler": ("IDAT", png(stream=STREAM[:-1] + bytes([STREAM[-1] ^ 1]))),
    "no adler": ("IDAT", png(stream=STREAM[:-4])),
    "part of a row is missing": ("IDAT", png(pixels=PIXELS[:-3])),
    "rows are missing": ("IDAT", png(pixels=PIXELS[:10])),
    "no stream": ("IDAT", png(stream=b"")),
    "garbage": ("IDAT", png(stream=b"garbage!")),
    "dictionary": ("IDAT", png(stream=b"\x78\xbb" + STREAM[2:])),
    "bomb": ("IDAT", png(pixels=PIXELS + bytes(2**21))),
    "unknown filter": ("IDAT", png(pixels=b"\5" + PIXELS[1:])),
    "unknown filter of the second row": ("IDAT", png(pixels=PIXELS[:10] + b"\xff" + bytes(9))),
    "unknown interlacing": ("IHDR", png(header={"interlace": 2})),
    "unknown compression": ("IHDR", png(header={"compression": 1})),
    "unknown set of filters": ("IHDR", png(header={"filter": 1})),
    "unknown depth": ("IHDR", png(header={"depth": 3})),
    "depth of another colour": ("IHDR", png(header={"depth": 4})),
    "unknown colour": ("IHDR", png(header={"color": 5})),
    "long header": ("IHDR", png()[:8] + chunk(b"IHDR", png()[16:29] + b"\0") + png()[33:]),
    "empty palette": ("PLTE", png(**INDEXED, palette=b"")),
    "palette of ten bytes": ("PLTE", png(**INDEXED, palette=bytes(10))),
    "palette of 300 colours": ("PLTE", png(**INDEXED, palette=bytes(900))),
}  # fmt: skip


def test_a_png_that_is_wrong_behind_right_checksums_is_refused_and_nothing_printed(capfd):
    for name, (part, encoded) in WRONG.items():
        with pytest.raises(ImageError) as error:
            decode_image(encoded)
        want = f"{len(encoded)} bytes that are not a readable image: {part} is damaged"
        assert str(error.value) == want, name
    assert capfd.readouterr() == ("", "")


def test_what_follows_the_pixels_of_a_png_is_not_printed(capfd):
    want = decode_image(png())
    assert want.tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]] * 2
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0")
    first, rest = chunk(b"IDAT", STREAM[:5]), chunk(b"IDAT", STREAM[5:])
    odd = (
        png(pixels=PIXELS + bytes(5)),
        png(stream=STREAM + b"more"),
        png(end=b"more"),
        png(parts=exif),
        png()[:33] + exif + exif + png()[33:],
        png()[:33] + first + exif + rest + chunk(b"IEND", b""),
    )
    for encoded in odd:
        for orient in (False, True):
            np.testing.assert_array_equal(decode_image(encoded, orient=orient), want)
    wide = png(header={"width": 2**20, "height": 1}, pixels=bytes(1 + 3 * 2**20))
    assert decode_image(wide).shape == (1, 2**20, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (20, 17)])
@pytest.mark.parametrize("depth", [1, 8])
def test_an_interlaced_png_is_read(size, depth, capfd):
    width, height = size
    grey = np.random.default_rng(0).integers(0, 2**depth, (height, width), np.uint8)
    # https://www.w3.org/TR/png-3/#8InterlaceMethods
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    pixels = b"".join(
        b"\0" + (np.packbits(row) if depth == 1 else row).tobytes()
        for x, y, dx, dy in [*steps, (0, 1, 1, 2)]
        for row in grey[y::dy, x::dx]
        if len(row)
    )
    header = {"width": width, "height": height, "depth": depth, "color": 0, "interlace": 1}
    got = decode_image(png(header=header, pixels=pixels))
    np.testing.assert_array_equal(
        got, np.repeat(grey[..., None] * (255 if depth == 1 else 1), 3, 2)
    )
    with pytest.raises(ImageError, match="IDAT is damaged"):
        decode_image(png(header=header, pixels=pixels[:-1]))
    assert capfd.readouterr() == ("", "")


def test_pillow_warns_of_nothing_in_any_thread():
    program = """if True:
        import concurrent.futures, io, sys
        from PIL import Image, ImageOps
        from vit_jax.data.ops.decode import ImageError, decode_image
        Image.MAX_IMAGE_PIXELS = 1000  # as if images were 100,000 times as large
        def encode(size):
            file = io.BytesIO()
            Image.new("RGB", size).save(file, "TIFF")
            return file.getvalue()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert [x.shape for x in pool.map(decode_image, [encode((40, 40))] * 200)]
        try:
            decode_image(encode((50, 50)))
        except ImageError as e:
            print(e)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "an image of 2,500 pixels: expected 1 to 134,217,728\n", done.stderr
    assert done.stderr == ""


def test_photographs_of_phones_in_another_format_are_named_as_such():
    with pytest.raises(ImageError, match="38 bytes that are not a readable image: HEIC or AVIF"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(14))


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_only_where_asked_for(orientation):
    image, exif = picture(), Image.Exif()
    exif[0x112] = orientation
    encoded = save(image, "TIFF", exif=exif)
    np.testing.assert_array_equal(decode_image(encoded), np.asarray(image))
    image.getexif()[0x112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_image(encoded, orient=True), upright)


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


def test_the_number_of_channels_of_a_tiff_file_is_named():
    bands = np.zeros((4, 6, 5), np.uint8).tobytes()
    numbers = {256: 6, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 5, 278: 4}
    tags = [struct.pack("<HHII", key, 4, 1, x) for key, x in (numbers | {279: len(bands)}).items()]
    head = struct.pack("<4sIH", b"II*\0", 8, len(tags))
    with pytest.raises(ImageError, match="a TIFF file of 5 channels; expected grey or RGB"):
        decode_image(b"".join([head, *tags, bytes(4), bands]))
