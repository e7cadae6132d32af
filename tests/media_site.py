"""A web site on loopback that does what sites do to those who fetch: redirects, drips, lies and never ends."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 16


class Page(BaseHTTPRequestHandler):
    """A path is what it says; every request is written down."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        name = self.path.partition("?")[0].strip("/")
        if name.startswith("hops"):
            left = int(name[4:])
            self.answer(302, b"", Location=f"/hops{left - 1}" if left else "/picture")
        elif name == "elsewhere":
            self.answer(301, b"", Location=self.path.partition("?")[2])
        elif name == "drip":
            self.answer(200, b"", Content_Length="1000")
            self.drip(b"x", 100)
        elif name == "drip-head":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"y" * 100, 200)
        elif name == "endless":
            self.answer(200, b"", Content_Length=None)
            self.drip(bytes(2**16), 200, pause=0)
        elif name == "chunked":
            self.answer(200, b"", Content_Length=None, Transfer_Encoding="chunked")
            self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:100], BODY[100:], b"")))
        elif name == "huge":
            self.answer(200, b"", Content_Length=str(3 * 2**30))
        elif name == "cut":
            self.answer(200, BODY, Content_Length=str(len(BODY) + 1))
        elif name == "nonsense":
            self.wfile.write(b"\x16\x03\x01 secret of the inside\r\n\r\n")
        elif name == "packed":
            self.answer(200, BODY, Content_Encoding="gzip")
        elif name in ("401", "404", "206", "500"):
            self.answer(int(name), b"secret of the inside")
        elif name in self.server.pages:
            self.answer(200, self.server.pages[name])
        else:
            self.answer(200, BODY, Set_Cookie="session=1", Content_Type="text/html")

    def answer(self, status, body, **headers):
        headers = {"Content_Length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def drip(self, data, count, pause=0.05):
        try:
            for place in range(count):
                self.wfile.write(data if pause == 0 else data[place % len(data) :][:1])
                time.sleep(pause)
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *_):
        pass


class Site(ThreadingHTTPServer):
    """Its `seen` requests, as (path, headers), and whether a client `hung_up` on it. context: for TLS."""

    def __init__(self, context=None, pages=None):
        super().__init__(("127.0.0.1", 0), Page)
        self.pages = pages or {}
        self.seen, self.hung_up = [], threading.Event()
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def port(self):
        return self.server_address[1]

    def handle_error(self, *_):  # clients that leave early are what is tested
        pass


@contextmanager
def serve(site):
    """A site that answers while the block runs."""
    threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
