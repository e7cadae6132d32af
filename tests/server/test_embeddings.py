"""Embeddings of texts and images by a contrastive model, as its own calls give them."""

import base64

import numpy as np
import pytest

from .conftest import ask, data_url, wait_until


@pytest.fixture
def server(make_server, tiny_contrastive):
    server = make_server(runtime=tiny_contrastive)
    wait_until(lambda: server.http.get("/ready").status_code == 200, "it is ready")
    return server


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_texts_and_images_stand_in_the_order_of_the_input(server):
    runtime = server.service.runtime
    red, wide = data_url(80, 80, 1), data_url(120, 60, 2)
    inputs = ["a dog", image_part(red), {"type": "text", "text": "a cat"}, image_part(wide)]
    body = server.post("/v1/embeddings", {"input": inputs}).json()
    rows = np.array([one["embedding"] for one in body["data"]], np.float32)
    assert [one["index"] for one in body["data"]] == [0, 1, 2, 3]
    assert np.allclose(rows[[0, 2]], runtime.embed(texts=["a dog", "a cat"]).numpy(), atol=1e-5)
    assert np.allclose(rows[[1, 3]], runtime.embed(images=[red, wide]).numpy(), atol=1e-5)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    grounded = server.post("/v1/embeddings", {"input": [image_part(red)], "mode": "g"}).json()
    assert np.allclose(grounded["data"][0]["embedding"], runtime.embed(images=[red], mode="g").numpy()[0], atol=1e-5)


def test_openais_client_gets_floats_out_of_base64(server):
    found = server.openai.embeddings.create(model="tiny", input=["a dog", "a cat"])
    expected = server.service.runtime.embed(texts=["a dog", "a cat"]).numpy()
    assert np.allclose([one.embedding for one in found.data], expected, atol=1e-5)
    raw = server.post("/v1/embeddings", {"input": "a dog", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [image_part("data:image/png;base64,AAAA")]}, "input"),
        ({"input": [image_part("https://example.org/a.png")]}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "mode": "x"}, "mode"),
        ({"input": [1, 2]}, "input"),
        ({}, "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused(server, fields, param):
    response = server.post("/v1/embeddings", fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200


def test_a_contrastive_model_does_not_chat(server):
    for path, body in [
        ("/v1/chat/completions", ask()),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"messages": ask()["messages"]}),
    ]:
        response = server.post(path, body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported")
    assert server.post("/tokenize", {"prompt": "a dog"}).json()["count"] > 0
    assert server.http.get("/v1/models").json()["data"][0]["kind"] == "contrastive"
    assert "vitrail_embeddings" in server.http.get("/metrics").text
