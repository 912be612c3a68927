# SPDX-License-Identifier: Apache-2.0
"""The server with a model that finds the class of each pixel."""

import base64
import io
from collections import Counter

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.serve.test_serve import fits
from vit_jax.inference.model import load_model
from vit_jax.serve import __main__ as serve
from vit_jax.serve.app import Limits, make_app
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import make_palette

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def model(segment_run):
    return load_model(segment_run)


@pytest.fixture(scope="module")
def client(model):
    app = make_app(model, limits=Limits(pixels=10_000))
    with TestClient(app, base_url=HERE) as client:
        yield client


def encode(height, width, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def read(url, kind="png"):
    start, _, data = url.partition(",")
    assert start == f"data:image/{kind};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(("size", "mode"), [((20, 30), "RGB"), ((33, 7), "L"), ((1, 1), "RGB")])
def test_an_image_gets_its_mask_and_the_shares_of_its_classes(client, model, size, mode):
    photo = encode(*size, mode)
    found = client.post("/v1/predict", content=photo).json()
    mask = read(found["mask"])
    classes = np.asarray(mask)
    assert (mask.mode, classes.shape, found["overlay"]) == ("P", size, None)
    np.testing.assert_array_equal(classes, model(photo).classes)
    counts = Counter(classes.ravel().tolist())
    assert {one["label"]: one["share"] for one in found["predictions"]} == {
        label: pytest.approx(count / classes.size) for label, count in counts.items()
    }
    shares = [one["share"] for one in found["predictions"]]
    assert shares == sorted(shares, reverse=True)
    for one in found["predictions"]:
        red, green, blue = make_palette()[one["label"]]
        assert one["class"] == model.segmentation.classes[one["label"]]
        assert one["color"] == f"#{red:02x}{green:02x}{blue:02x}"


def test_the_overlay_mixes_the_image_with_the_colors(client, model):
    photo = encode(20, 30)
    file = {"file": ("a.png", photo, "image/png")}
    found = client.post("/v1/predict", files=file, data={"overlay": "true"}).json()
    image = np.asarray(Image.open(io.BytesIO(photo)), np.float64)
    expected = 0.45 * image + 0.55 * np.asarray(read(found["mask"]).convert("RGB"))
    np.testing.assert_allclose(model(photo).overlay(), expected, atol=1)
    overlay = read(found["overlay"], "jpeg")
    # The compression of noise takes away much of its detail, and keeps the mean of each colour.
    np.testing.assert_allclose(np.mean(overlay, axis=(0, 1)), expected.mean(axis=(0, 1)), atol=2)
    assert overlay.size == (30, 20)


@pytest.mark.parametrize(
    ("query", "content", "code", "message"),
    [
        ("?top_k=1", b"", 400, "'top_k' is unknown; expected overlay"),
        ("?labels=a,b", b"", 400, "'labels' is unknown; expected overlay"),
        ("?overlay=1", b"", 400, "overlay='1': expected true or false"),
        ("", b"none", 415, "not an image that can be read"),
        ("", encode(8, 8)[:-40], 415, "not an image that can be read"),
        ("", encode(100, 101), 413, "the image has 101x100 pixels: expected 10,000 at most"),
    ],
)
def test_what_does_not_apply_is_refused_in_one_line(client, query, content, code, message):
    reply = client.post(f"/v1/predict{query}", content=content)
    assert (reply.status_code, reply.json()["error"][: len(message)]) == (code, message)


def test_the_answer_is_the_one_that_is_described(client):
    description = client.get("/openapi.json").json()
    described = description["paths"]["/v1/predict"]["post"]
    assert [one["name"] for one in described["parameters"]] == ["overlay"]
    schema = described["responses"]["200"]["content"]["application/json"]["schema"]
    for overlay in ("true", "false"):
        reply = client.post(f"/v1/predict?overlay={overlay}", content=encode(9, 9))
        assert fits(reply.json(), schema, description)
    assert client.get("/healthz").json()["classes"] == 11


def test_the_page_has_a_legend_in_place_of_attention(client):
    page = client.get("/").text
    assert "11 classes of pixels, images of 16×16" in page
    assert "<h3>Mask</h3>" in page
    assert "Attention" not in page
    assert "one.color" in page


def test_prompts_are_refused(segment_run, said):
    with pytest.raises(UserError, match=r"--templates=.* has no text tower: leave it out"):
        serve.main([f"--workdir={segment_run}", "--port=0", "--templates=my {}"])
