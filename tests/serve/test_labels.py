# SPDX-License-Identifier: Apache-2.0
"""The server with a model of images and texts: the classes of a request are its labels."""

import dataclasses
import html

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.trained import write_images, write_towers
from vit_jax.inference.model import load_model
from vit_jax.serve.app import make_app
from vit_jax.utils.errors import UserError

HERE = "http://127.0.0.1"
LABELS = ["a cat", "a dög", "<b>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve_labels")
    write_towers(folder / "towers.npz")
    write_images(folder, 1)
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "towers.npz")


@pytest.fixture(scope="module")
def photo(place):
    return (place / "00.png").read_bytes()


@pytest.fixture(scope="module")
def client(model):
    with TestClient(make_app(model, templates="my {}"), base_url=HERE) as client:
        yield client


def check(reply, model, photo, labels, **options):
    assert reply.status_code == 200, reply.text
    found = reply.json()["predictions"]
    expected = model(photo, labels=labels, **options)
    assert [one["class"] for one in found] == [name for name, _ in expected.top(len(found))]
    assert [labels[one["label"]] for one in found] == [one["class"] for one in found]
    probabilities = [one["probability"] for one in found]
    np.testing.assert_allclose(probabilities, [p for _, p in expected.top(len(found))], atol=1e-6)
    return found


def test_labels_of_a_request_are_its_classes(client, model, photo):
    query = {"labels": ", ".join(LABELS), "overlay": "true"}
    reply = client.post("/v1/predict", params=query, content=photo)
    assert len(check(reply, model, photo, LABELS, templates="my {}")) == 3
    assert reply.json()["overlay"].startswith("data:image/png;base64,")
    form = {"labels": "b,c", "top_k": "1"}
    reply = client.post("/v1/predict", data=form, files={"file": photo})
    assert len(check(reply, model, photo, ["b", "c"], templates="my {}")) == 1


def test_the_server_may_have_labels_of_its_own(model, photo):
    app = make_app(model, labels=model.embed_labels(LABELS))
    with TestClient(app, base_url=HERE) as client:
        check(client.post("/v1/predict", content=photo), model, photo, LABELS)
        reply = client.post("/v1/predict?labels=x,y", content=photo)
        check(reply, model, photo, ["x", "y"])
        assert client.get("/healthz").json()["classes"] == 3
        page = client.get("/").text
    assert html.escape("a cat, a dög, <b>") in page
    assert "compares images with texts" in page


def test_the_page_and_the_description_have_labels(client):
    assert "<p ><label" in client.get("/").text
    parameters = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["parameters"]
    assert {one["name"] for one in parameters} == {"top_k", "overlay", "labels"}
    assert client.get("/healthz").json()["classes"] == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "labels are missing: expected texts separated by commas"),
        ("?labels=", "labels: text 1 is empty: expected a text"),
        ("?labels=a,,b", "labels: text 2 is empty: expected a text"),
        ("?labels=a,a", "labels: 'a' is given twice: expected each text once"),
        ("?labels=a%0Ab,c", r"labels: text 1, 'a\nb', has line breaks or control characters"),
        (f"?labels={'x' * 30}", f"labels: 'my {'x' * 30}' has more tokens than the 24"),
        (f"?labels={'x' * 16_001}", "labels='xxxxxxxxxxxxxxxxxxxx': expected texts separated by"),
        ("?labels=" + "x," * 1000, "labels: 1,001 texts: expected 1,000 at most"),
        ("?labels=a&labels=b", "labels is given 2 times; expected once"),
        ("?top_k=0&labels=a", "top_k='0': expected 1 to 1000"),
        ("?label=a", "'label' is unknown; expected top_k, overlay or labels"),
    ],
)
def test_wrong_labels_are_refused(query, message, client, photo):
    reply = client.post(f"/v1/predict{query}", content=photo)
    assert reply.status_code == 400
    assert reply.json()["error"].startswith(message)


def test_the_tokenizer_must_be_known(model):
    assert model.texts is not None
    texts = dataclasses.replace(model.texts, tokenizer=None)
    with pytest.raises(UserError, match="the tokenizer of these weights is not known"):
        make_app(dataclasses.replace(model, texts=texts))


def test_templates_are_checked_before_the_first_request(model):
    with pytest.raises(UserError, match=r"templates='my': expected a file, a template with {}"):
        make_app(model, templates="my")
