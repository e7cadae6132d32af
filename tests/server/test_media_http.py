"""Media over HTTP: odd images are answered, bad ones are 400 in fixed words, URLs are fetched by the policy alone, and
whatever came before, the next request is answered."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitrail.runtime import media

from ..image_corpora import NOISE, bad_images, encoded, odd_images
from ..media_site import BODY, Site, serve
from .conftest import ask, wait_until

ODD, BAD = odd_images(), bad_images()
GOOD = encoded(NOISE, "PNG")


def inline(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def refusal(response):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    for leak in ("object at", "Traceback", "Errno", "127.0.0.1", "PIL", "secret"):
        assert leak not in response.text
    return error["message"]


@pytest.fixture(scope="module")
def answer(server):
    return server.chat("what?", inline(GOOD)).json()["choices"][0]["message"]["content"]


def assert_answers(server, answer):
    response = server.chat("what?", inline(GOOD))
    assert response.json()["choices"][0]["message"]["content"] == answer


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_answered_as_its_pixels_are(server, name):
    data, pixels = ODD[name]
    expected = server.chat("what?", inline(encoded(pixels, "PNG"))).json()
    body = server.chat("what?", inline(data)).json()
    assert body["choices"][0]["message"] == expected["choices"][0]["message"]
    assert body["vitrail"]["images"] == expected["vitrail"]["images"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_in_fixed_words_and_the_next_is_answered(server, answer, name):
    data, text = BAD[name]
    message = refusal(server.chat("what?", inline(GOOD), inline(data)))
    assert message.startswith("image 2: ")
    assert message.endswith(text)
    assert_answers(server, answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_image_is_refused_before_a_stream_begins(server, stream):
    assert refusal(server.chat("what?", inline(BAD["1x20000"][0]), stream=stream)).startswith(
        "image 1: 1x20000 exceeds"
    )


def test_pixels_that_cannot_be_decoded_end_a_stream_with_an_error(server, answer):
    """The header was good, so that the stream may have begun."""
    response = server.chat("what?", inline(BAD["png cut short"][0]), stream=True)
    assert "image 1: cannot decode" in response.text
    assert "[DONE]" not in response.text
    assert_answers(server, answer)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "URLs are not fetched"),
        (
            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
            "URLs are not fetched",
        ),
        (
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            "local files need allowed_local_media_path",
        ),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "local files need allowed_local_media_path"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, "data URL is not valid base64"),
        ({"type": "image", "image": "/etc/passwd"}, ""),
        ({"type": "video", "video": "/etc/passwd"}, ""),
        ({"type": "video", "video": ["/etc/passwd"]}, "local files need allowed_local_media_path"),
        ({"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}, "a video URL must read"),
    ],
)
def test_what_a_part_may_not_name(server, answer, part, text):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]}
    assert text in refusal(server.post("/v1/chat/completions", body))
    assert text in refusal(server.post("/tokenize", body))
    assert_answers(server, answer)


def test_frames_of_a_video_are_a_tile_each(server):
    frames = [base64.b64encode(encoded(NOISE, "JPEG")).decode()] * 3
    parts = [
        {"type": "video", "video": [f"data:image/jpeg;base64,{frame}" for frame in frames]},
        {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(frames)}"}},
    ]
    bodies = []
    for part in parts:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "what happens?"}]}]
        bodies.append(server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4}).json())
    assert [image["tiles"] for image in bodies[0]["vitrail"]["images"]] == [1, 1, 1]
    assert bodies[0]["usage"] == bodies[1]["usage"] | {
        "prompt_tokens_details": bodies[0]["usage"]["prompt_tokens_details"]
    }
    assert bodies[0]["choices"] == bodies[1]["choices"]


@pytest.fixture
def site(monkeypatch):
    """A site that `pictures.example` leads to, as if loopback were public."""
    monkeypatch.setattr(media, "resolve", lambda host, port, timeout_s: ["127.0.0.1"])
    monkeypatch.setattr(media, "is_public", lambda address: True)
    with serve(Site(pages={"good.png": GOOD, "page.png": b"<html>404</html>"})) as one:
        yield one


def test_urls_of_allowed_hosts_are_fetched_and_no_others(make_server, site, monkeypatch):
    server = make_server(allowed_media_domains=[f"pictures.example:{site.port}"], mm_per_request_timeout=1.0)
    host = f"http://pictures.example:{site.port}"
    expected = server.chat("what?", inline(GOOD)).json()["choices"]
    assert server.chat("what?", f"{host}/good.png").json()["choices"] == expected
    assert server.chat("what?", f"{host}/elsewhere?{host}/good.png").json()["choices"] == expected
    [*_, (_, headers)] = site.seen
    assert "Authorization" not in headers
    refused = {
        f"{host}/page.png": "image 1: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
        f"{host}/picture": "image 1: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
        f"{host}/404": "message 1, part 1: cannot fetch: the server answers with status 404",
        f"{host}/hops3": "message 1, part 1: cannot fetch: redirected more than 3 times",
        f"{host}/huge": "message 1, part 1: the media of a request exceed the limit of 50331648 bytes",
        f"{host}/elsewhere?http://10.0.0.1/": "message 1, part 1: the host is not in allowed_media_domains",
        "http://127.0.0.1/": "message 1, part 1: the host is not in allowed_media_domains",
    }
    for url, text in refused.items():
        assert refusal(server.chat("what?", url)) == text
    slow = refusal(server.chat("what?", f"{host}/drip"))
    assert slow in (
        "message 1, part 1: cannot fetch: not there within 1 s",
        "the media took too long to fetch or to read",
    )
    monkeypatch.setattr(media, "is_public", lambda address: False)
    assert "one that is not public" in refusal(server.chat("what?", f"{host}/good.png"))
    assert server.chat("what?", inline(GOOD)).json()["choices"] == expected
    server.assert_nothing_is_held()


def test_slow_sites_hold_up_nobody_else_and_end_in_time(make_server, site):
    """More fetches drip than there are threads that read what others send."""
    server = make_server(allowed_media_domains=[f"pictures.example:{site.port}"], mm_per_request_timeout=3.0)
    expected = server.chat("what?", inline(GOOD)).json()["choices"]
    drip = f"http://pictures.example:{site.port}/drip"
    with ThreadPoolExecutor(10) as others:
        dripping = [others.submit(server.chat, "what?", drip) for _ in range(10)]
        wait_until(lambda: len(site.seen) == 10, "all of them are being fetched")
        assert server.chat("what?", inline(GOOD)).json()["choices"] == expected
        assert server.post("/tokenize", {"messages": ask("what?", inline(GOOD))["messages"]}).status_code == 200
        assert not any(one.done() for one in dripping)
        start = time.monotonic()
        assert [refusal(one.result()) for one in dripping]
        assert time.monotonic() - start < 8
    server.assert_nothing_is_held()


def test_files_below_the_allowed_folder_are_read_and_no_others(make_server, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "good.png").write_bytes(GOOD)
    (tmp_path / "media" / "notes.txt").write_bytes(BODY)
    (tmp_path / "secret.png").write_bytes(GOOD)
    server = make_server(options={}, allowed_local_media_path=tmp_path / "media")
    folder = f"file://{tmp_path}/media"
    expected = server.chat("what?", inline(GOOD)).json()["choices"]
    assert server.chat("what?", f"{folder}/good.png").json()["choices"] == expected
    outside = "message 1, part 1: the file lies outside allowed_local_media_path"
    assert refusal(server.chat("what?", f"{folder}/../secret.png")) == outside
    assert refusal(server.chat("what?", "file:///etc/passwd")) == outside
    assert refusal(server.chat("what?", f"{folder}/notes.txt")).startswith("image 1: cannot decode: not a JPEG")


def test_media_together_are_bounded(make_server):
    server = make_server(max_media_bytes=3 * len(GOOD))
    assert server.chat("what?", *[inline(GOOD)] * 3).status_code == 200
    assert "the media of a request exceed" in refusal(server.chat("what?", *[inline(GOOD)] * 4))


def test_placeholders_that_a_user_typed_stay_text(server):

    def count(text):
        return server.post("/tokenize", {"messages": ask(text, inline(GOOD))["messages"]}).json()

    plain = count("look")
    for text in ("<image>", "<IMG_CONTEXT>", "<img></img>", "<|im_end|>", "<IMG_CONTEXT>" * 8):
        found = count(f"lo{text}ok")
        assert found["image_tokens"] == plain["image_tokens"]
        assert found["images"] == plain["images"]
        assert server.chat(f"lo{text}ok", inline(GOOD)).status_code == 200
