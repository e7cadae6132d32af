"""Servers of tiny models, each in a thread of this process, on a port of its own."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.options import read_media
from vitrail.runtime.server.app import create_app
from vitrail.runtime.server.service import Service
from vitrail.runtime.server.settings import Settings

from ..runtime.conftest import sentencepiece_folder  # noqa: F401 - a fixture
from ..runtime.tiny_contrastive import write_tiny_contrastive
from ..runtime.tiny_model import assert_idle, check_integrity, picture, write_tiny_model

ROWS = 4


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = 20) -> None:
    """Return when `condition` holds; fail if it does not within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.002)


def data_url(width: int = 90, height: int = 90, seed: int = 0, form: str = "PNG") -> str:
    """Noise as the data URL of an image."""
    buffer = io.BytesIO()
    Image.fromarray(picture(width, height, seed)).save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(text: str = "What is the total?", *images: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content: Any = [*parts, {"type": "text", "text": text}] if images else text
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


class LiveServer:
    """A server in a thread, the clients to ask it, and what is inside it."""

    def __init__(self, runtime: Runtime | Callable[[], Runtime], settings: Settings) -> None:
        self.settings = settings
        app = create_app(runtime, settings)
        self.service: Service = app.state.service
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self.service.on_end = self.end
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        wait_until(lambda: self._server.started, "the server starts")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def end(self) -> None:
        self._server.should_exit = True

    def call_soon(self, call: Callable[[], None]) -> None:
        """Have the event loop of the server call something."""
        self.service._loop.call_soon_threadsafe(call)

    @property
    def engine(self) -> Engine:
        return self.service.runtime.engine

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def chat(self, *arguments: str, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", ask(*arguments, **fields))

    def assert_nothing_is_held(self) -> None:
        """No call is in flight, and the engine has no request, block, row or turn."""
        wait_until(lambda: not self.service.flights, "calls leave")
        if self.service.chats:
            wait_until(lambda: not self.engine._requests and self.engine.turns.idle, "the engine is idle")
            assert_idle(self.engine)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self.end()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def tiny_runtime(sentencepiece_folder: Any) -> Callable[..., Runtime]:  # noqa: F811
    """`make(**options)`: a Runtime of a tiny chat model."""
    loaded = Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32", device="cpu")
    parts = loaded.model, loaded.tokenizer

    def make(**options: Any) -> Runtime:
        return Runtime(*parts, **{"max_num_seqs": ROWS, **options})

    return make


@pytest.fixture(scope="session")
def tiny_contrastive(sentencepiece_folder: Any) -> Callable[..., Runtime]:  # noqa: F811
    """`make()`: a Runtime of a tiny InternVL-C/G."""
    loaded = Runtime.from_pretrained(write_tiny_contrastive(sentencepiece_folder()), dtype="float32", device="cpu")
    parts = loaded.model, loaded.tokenizer
    return lambda: Runtime(*parts)


@pytest.fixture
def make_server(tiny_runtime: Callable[..., Runtime]) -> Iterator[Callable[..., LiveServer]]:
    """`make(options={...}, runtime=None, **settings)`: a server, whose engine is checked at every step."""
    made: list[LiveServer] = []

    def checked(self: Engine, step: Callable[[Engine], None] = Engine._step) -> None:
        step(self)
        check_integrity(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_step", checked)

        def make(options: dict[str, Any] | None = None, runtime: Any = None, **settings: Any) -> LiveServer:
            chosen = Settings(**{"served_model_name": "tiny", "max_num_seqs": ROWS, **settings})
            media = read_media(chosen.allowed_media_domains, chosen.allowed_local_media_path)
            options = {"max_num_seqs": chosen.max_num_seqs, "media": media, **(options or {})}
            server = LiveServer(runtime or tiny_runtime(**options), chosen)
            made.append(server)
            if runtime is None:
                wait_until(lambda: server.http.get("/health").json() == {"status": "ready"}, "the server is ready")
            return server

        yield make
        for server in made:
            server.close()


@pytest.fixture(scope="module")
def server(tiny_runtime: Callable[..., Runtime]) -> Iterator[LiveServer]:
    """One server for the tests of a file, found idle at the end."""
    server = LiveServer(tiny_runtime(), Settings(served_model_name="tiny", max_num_seqs=ROWS))
    with closing(server):
        wait_until(lambda: server.http.get("/health").json() == {"status": "ready"}, "the server is ready")
        yield server
        server.assert_nothing_is_held()
