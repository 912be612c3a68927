# SPDX-License-Identifier: Apache-2.0
"""The server of a trained model."""

import asyncio
import base64
import html.parser
import io
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.browser import Browser
from tests.trained import MIXER, write_images, write_model
from vit_jax.inference.model import load_model
from vit_jax.serve.__main__ import main
from vit_jax.serve.app import Limits, make_app
from vit_jax.serve.batches import Batcher
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "<b>cat</b>"]
HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, the names of their classes, and an image."""
    folder = tmp_path_factory.mktemp("serve")
    write_model(folder / "vit.npz")
    write_model(folder / "mixer.npz", MIXER)
    write_images(folder / "images", 2)
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "vit.npz", class_names=NAMES)


@pytest.fixture(scope="module")
def photo(place):
    """The bytes of an image of 8x8."""
    return (place / "images" / "00.png").read_bytes()


@pytest.fixture(scope="module")
def client(model):
    limits = Limits(bytes=2000, pixels=10_000)
    with TestClient(make_app(model, limits=limits), base_url=HERE) as client:
        yield client


def encode(width, height, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, kind)
    return stream.getvalue()


def claim_size(width, height):
    """A PNG of a few bytes that says that it is of some size."""
    start, rest = encode(1, 1)[:12], encode(1, 1)[33:]
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return start + header + struct.pack(">I", zlib.crc32(header)) + rest


def test_an_image_gets_its_most_probable_classes(client, model, photo):
    reply = client.post("/v1/predict?top_k=2", content=photo)
    assert reply.status_code == 200
    found = reply.json()
    expected = model(model.preprocess(photo))
    labels = expected.top(2)[0].tolist()
    assert [one["label"] for one in found["predictions"]] == labels
    assert [one["class"] for one in found["predictions"]] == [NAMES[label] for label in labels]
    probabilities = [one["probability"] for one in found["predictions"]]
    np.testing.assert_allclose(probabilities, expected.probabilities[0, labels], atol=1e-6)
    assert found["overlay"] is None


def test_the_overlay_is_a_picture_and_null_of_a_model_without_attention(client, place, photo):
    overlay = client.post("/v1/predict?overlay=true", content=photo).json()["overlay"]
    start, _, data = overlay.partition(",")
    assert start == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (448, 448)
    app = make_app(load_model(place / "mixer.npz"))
    with TestClient(app, base_url=HERE) as other:
        assert other.post("/v1/predict?overlay=true", content=photo).json()["overlay"] is None


@pytest.mark.parametrize(
    ("path", "content", "code", "message"),
    [
        ("?top_k=0", b"", 400, "top_k='0': expected 1 to 3"),
        ("?top_k=4", b"", 400, "top_k='4': expected 1 to 3"),
        ("?top_k=²", b"", 400, "top_k='²': expected 1 to 3"),
        (f"?top_k={'9' * 4000}", b"", 400, "top_k='99999999999999999999': expected 1 to 3"),
        (f"?top_k={'9' * 40_000}", b"", 400, "top_k='99999999999999999999': expected 1 to 3"),
        (f"?top_k=-{'0' * 9000}1", b"", 400, "top_k='-0000000000000000000': expected 1 to 3"),
        (f"?top_k={'0' * 9000}1", b"", 400, "top_k='00000000000000000000': expected 1 to 3"),
        ("?top_k=1.0", b"", 400, "top_k='1.0': expected 1 to 3"),
        ("?top_k=1_0", b"", 400, "top_k='1_0': expected 1 to 3"),
        (f"?{'x' * 9000}=1", b"", 400, "'xxxxxxxxxxxxxxxxxxxx' is unknown; expected top_k or over"),
        ("?overlay=1", b"", 400, "overlay='1': expected true or false"),
        ("?topk=1", b"", 400, "'topk' is unknown; expected top_k or overlay"),
        ("", b"", 415, "the body is empty: expected the bytes of an image"),
        ("", b"none", 415, "not an image that can be read"),
        ("", encode(8, 8)[:-20], 415, "not an image that can be read"),
        ("", encode(101, 100), 413, "the image has 101x100 pixels: expected 10,000 at most"),
        ("", claim_size(60_000, 60_000), 413, "the image has far too many pixels: ex"),
        ("", b"x" * 2001, 413, "the image has more than 2,000 bytes"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_in_one_line(client, path, content, code, message):
    reply = client.post(f"/v1/predict{path}", content=content)
    assert reply.status_code == code
    assert reply.json()["error"].startswith(message)


def test_a_form_is_answered_as_the_bytes_of_its_file(client, photo):
    file = {"file": ("a.png", photo, "image/png")}
    expected = client.post("/v1/predict?top_k=2", content=photo).json()["predictions"]
    reply = client.post("/v1/predict", files=file, data={"top_k": "2"})
    assert reply.json()["predictions"] == expected
    assert client.post("/v1/predict?top_k=2", files=file).json()["predictions"] == expected


def test_an_image_that_curl_sent_as_text_is_refused_with_what_to_type(client, photo):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # Of --data-binary too.
    assert client.post("/v1/predict", content=photo, headers=headers).status_code == 200
    torn = photo.replace(b"\r", b"").replace(b"\n", b"")
    reply = client.post("/v1/predict", content=torn, headers=headers)
    assert reply.status_code == 415
    assert reply.json()["error"].endswith("use --data-binary @FILE or -F file=@FILE")


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b"file=photo.jpg", True),
        (b"photo.jpg", True),
        (b"two\nlines", False),  # Not of curl -d, which leaves out the line break.
        (b"\x00\x01\x02", False),
        (b"\x89PNG\r\n\x1a\n cut", False),
    ],
)
def test_what_to_type_is_said_only_where_a_body_is_text(client, body, hint):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = client.post("/v1/predict", content=body, headers=headers)
    assert reply.status_code == 415
    assert ("curl" in reply.json()["error"]) == hint


@pytest.mark.parametrize(
    ("path", "files", "fields", "code", "message"),
    [
        ("", [b"none"], {}, 415, "not an image that can be read"),
        ("", [b""], {}, 415, "the file in the form is empty"),
        ("", [b"x" * 2000], {}, 415, "not an image that can be read"),
        ("", [b"x" * 2001], {}, 413, "the image has more than 2,000 bytes"),
        ("", [b"x" * 20_000], {}, 413, "the image has more than 2,000 bytes"),
        ("", [b"a", b"b"], {}, 400, "the form has 2 files: expected one image"),
        ("", [b"a"], {"top_k": "4"}, 400, "top_k='4': expected 1 to 3"),
        ("", [b"a"], {"k": "4"}, 400, "'k' is unknown; expected top_k or overlay"),
        ("?top_k=1", [b"a"], {"top_k": "1"}, 400, "top_k is given 2 times"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(client, path, files, fields, code, message):
    parts = [(f"file{i}", (f"{i}.png", content)) for i, content in enumerate(files)]
    reply = client.post(f"/v1/predict{path}", files=parts, data=fields)
    assert (reply.status_code, reply.json()["error"][: len(message)]) == (code, message)


@pytest.mark.parametrize(("name", "hint"), [(None, True), ("a.png", False)])
def test_a_form_without_a_file_is_refused_with_what_to_type(client, name, hint):
    reply = client.post("/v1/predict", files={"file": (name, b"photo.jpg")})
    assert reply.status_code == 415
    assert reply.json()["error"].endswith("as curl -F file=@FILE sends it") == hint


def test_a_request_leaves_the_filters_of_warnings_alone(client, photo, monkeypatch):
    assert client.post("/v1/predict", content=photo).status_code == 200
    monkeypatch.setattr(warnings, "catch_warnings", None)  # All threads share what it changes.
    assert client.post("/v1/predict", content=photo).status_code == 200


def test_other_ways_and_other_names_of_the_server_are_refused(client, photo):
    reply = client.get("/v1/predict")
    assert (reply.status_code, reply.json()) == (405, {"error": "GET /v1/predict: expected POST"})
    reply = client.post("/predict", content=photo)
    assert reply.status_code == 404
    assert reply.json()["error"].startswith("there is no /predict: expected /v1/predict;")
    # A page of another site, under whose name an attacker lets this machine be found.
    assert client.get("/healthz", headers={"Host": "evil.test"}).status_code == 400


def test_more_requests_than_are_allowed_are_sent_away(model, photo):
    with TestClient(make_app(model, limits=Limits(requests=0)), base_url=HERE) as client:
        reply = client.post("/v1/predict", content=photo)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json() == {"error": "too many requests at a time"}


def test_a_head_request_gets_the_headers_alone(client):
    for path in ("/", "/healthz", "/openapi.json"):
        reply = client.head(path)
        assert (reply.status_code, reply.content) == (200, b"")


def test_no_page_loads_anything_from_another_host(client):
    # Those of FastAPI's own documentation do.
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_rows_that_come_while_one_is_computed_are_one_batch():
    sizes = []

    def compute(rows):
        sizes.append(len(rows))
        if rows.max() > 5:
            raise ValueError("six")
        return rows * 2

    async def run():
        batcher = Batcher(compute, max_rows=4)
        async with batcher.running():
            found = await asyncio.gather(*(batcher(np.full(2, i)) for i in range(6)))
            with pytest.raises(ValueError, match="six"):
                await batcher(np.full(2, 6))
            # One that fails does no harm to the next, nor does one who has gone away.
            gone = asyncio.ensure_future(batcher(np.full(2, 1)))
            await asyncio.sleep(0)
            gone.cancel()
            return found, await batcher(np.full(2, 5))

    found, last = asyncio.run(run())
    assert [row.tolist() for row in found] == [[2 * i, 2 * i] for i in range(6)]
    assert last.tolist() == [10, 10]
    assert sizes == [4, 2, 1, 1]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_suits_dark_and_narrow_screens(client, model):
    reply = client.get("/")
    page = Page(reply.text)
    assert page.links == ["/openapi.json"]
    assert f"{model.source}: 3 classes, images of 8×8" in page.text
    assert not re.search(r"%[A-Z]+%", reply.text)
    assert not re.search(r"https?://", reply.text)
    assert "prefers-color-scheme: dark" in reply.text
    assert 'name="viewport"' in reply.text
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]


def fits(value, schema, described):
    """Whether a value has a schema of the description; covers the part of JSON Schema it uses."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        return fits(value, described["components"]["schemas"][name], described)
    if "anyOf" in schema:
        return any(fits(value, one, described) for one in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    kinds["number"] = (int, float)
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict):
        known = schema["properties"]
        assert not schema["additionalProperties"]
        assert schema["required"] == list(known)
        return value.keys() == known.keys() and all(
            fits(value[k], known[k], described) for k in known
        )
    if isinstance(value, list):
        in_bounds = schema["minItems"] <= len(value) <= schema["maxItems"]
        return in_bounds and all(fits(item, schema["items"], described) for item in value)
    if isinstance(value, int | float):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


def test_every_answer_to_random_requests_is_one_that_is_described(client, photo):
    description = client.get("/openapi.json").json()
    described = description["paths"]["/v1/predict"]["post"]
    assert described["responses"].keys() == {"200", "400", "413", "415", "503", "default"}
    rng = random.Random(0)
    jpeg = encode(8, 8, "JPEG")
    seen = set()
    for _ in range(150):
        content = bytearray(rng.choice([photo, jpeg, encode(120, 90), b"", b"x" * 3000]))
        for _ in range(rng.choice([0, 0, 1, 8]) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = bytes(content[: rng.choice([None, None, rng.randrange(len(content) + 1)])])
        query = {}
        if rng.random() < 0.5:
            query["top_k"] = rng.choice(["1", "2", "3", "4", "-1", "", "1e9", "9" * 5000, "²"])
        if rng.random() < 0.2:
            query["overlay"] = rng.choice(["true", "false", "True", ""])
        reply = client.post("/v1/predict", params=query, content=content)
        answer = described["responses"].get(str(reply.status_code))
        assert answer, (reply.status_code, query, content)
        assert fits(reply.json(), answer["content"]["application/json"]["schema"], description), (
            reply.text
        )
        seen.add(reply.status_code)
    assert seen == {200, 400, 413, 415}
    health = description["paths"]["/healthz"]["get"]["responses"]["200"]
    answer = client.get("/healthz").json()
    assert fits(answer, health["content"]["application/json"]["schema"], description)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=99999"], "--port=99999: expected 0 to 65535"),
        (["--port={taken}"], "--port={taken} of --host=127.0.0.1 can't be used: Address already"),
        (["--port=0", "--host=none.invalid"], "--port=0 of --host=none.invalid can't be used: "),
        (["--max_mib=0"], "--max_mib=0.0: expected more than 0"),
        (["--port=0", "--checkpoint={place}/headless.npz"], "its head is missing"),
    ],
)
def test_bad_input_is_one_line(place, said, arguments, message):
    write_model(place / "headless.npz", classes=0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        known = {"taken": other.getsockname()[1], "place": place}
        with pytest.raises(UserError) as error:
            main([f"--checkpoint={place / 'vit.npz'}", *(a.format(**known) for a in arguments)])
    assert message.format(**known) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_libraries_it_is_said_how_to_install_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs fastapi: pip install 'vit_jax\[serve\]'"):
        main(["--checkpoint=none.npz"])


@pytest.fixture
def running(place):
    """The command in a process of its own, and its address."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "vit_jax.serve",
        "--port=0",
        f"--labels={place}/names.txt",
    ]
    process = subprocess.Popen(
        [*command, f"--checkpoint={place / 'vit.npz'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://\S+", line):
            yield process, found[0]
            break
    else:
        raise AssertionError("".join(lines))
    process.kill()
    process.wait()


def test_the_command_answers_on_this_machine_and_ends_in_order(running, photo):
    process, address = running
    assert address.startswith("http://127.0.0.1:")
    request = urllib.request.Request(f"{address}/v1/predict", data=photo)
    with urllib.request.urlopen(request, timeout=600) as reply:
        assert b'"predictions":' in reply.read()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=600)[0]
    assert (process.returncode, rest) == (0, "stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_browser_shows_the_classes_and_the_attention(running, place, tmp_path, width, dark):
    program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(program).exists():
        pytest.skip(f"{program} is missing: install Chromium, or set CHROMIUM to where it is")
    _, address = running
    with Browser(program, tmp_path / "browser") as browser:
        browser.open(address, width=width, height=800, dark=dark)
        browser.choose_file("#file", place / "images" / "00.png")
        browser.wait_for("/^00.png: \\d+ ms$/.test(document.getElementById('status').textContent)")
        browser.wait_for("document.getElementById('overlay').naturalWidth == 448")
        browser.wait_for("document.getElementById('image').naturalWidth == 8")
        names = "[...document.querySelectorAll('td:first-child')].map((one) => one.textContent)"
        assert sorted(browser.evaluate(names)) == sorted(NAMES)
        # Nothing is wider than the screen, and what is said of errors is seen.
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(20, 20, 22)" if dark else "rgb(252, 252, 251)")
        if folder := os.environ.get("SCREENSHOTS"):
            browser.screenshot(Path(folder) / f"serve_{width}.png")
        browser.choose_file("#file", place / "names.txt")
        browser.wait_for("document.getElementById('status').className == 'bad'")
        assert browser.evaluate("document.getElementById('cards').hidden")
