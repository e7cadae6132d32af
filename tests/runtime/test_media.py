"""Fetching for callers: who may be asked, which addresses, how much and how long, and that nothing else fetches.

The servers listen on loopback, which no policy allows: the tests put their own resolver and their own idea of a public
address in the places of the real ones.
"""

import ast
import base64
import os
import socket
import ssl
import subprocess
import threading
import time
from itertools import chain
from pathlib import Path

import pytest

from vitrail.runtime import Runtime, media
from vitrail.runtime.errors import ConfigError, InvalidRequestError
from vitrail.runtime.media import MediaPolicy, fetch, fetch_all, is_public, resolve

from ..media_site import BODY, Site, serve

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def servers():
    with serve(Site()) as one, serve(Site()) as other:
        yield [one, other]


@pytest.fixture
def site(servers, monkeypatch):
    """The port of a server that `pictures.example` leads to, as public as any."""
    for server in servers:
        server.seen.clear()
        server.hung_up.clear()
    monkeypatch.setattr(media, "resolve", lambda host, port, timeout_s: ["127.0.0.1"])
    monkeypatch.setattr(media, "is_public", lambda address: True)
    return servers[0]


def policy_for(*servers, **limits):
    return MediaPolicy(tuple(f"pictures.example:{server.port}" for server in servers), **limits)


def url_of(server, path="picture"):
    return f"http://pictures.example:{server.port}/{path}"


def refusal(url, policy, where="message 1, part 2"):
    with pytest.raises(InvalidRequestError) as caught:
        fetch(url, policy, where)
    text = str(caught.value)
    assert text.startswith(f"{where}: ")
    assert "\n" not in text
    assert "secret" not in text
    assert "127.0.0.1" not in text
    assert "rrno" not in text
    return text.removeprefix(f"{where}: ")


# --- who may be asked ---


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org", "ftp://x/y", "gopher://x:70/_a"])
def test_nothing_is_fetched_unless_domains_are_named(monkeypatch, url):
    monkeypatch.setattr(media, "resolve", lambda *_: pytest.fail("a name was resolved"))
    assert refusal(url, MediaPolicy()) == "URLs are not fetched; pass a data URL"


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("example.org", "http://example.org/", True),
        ("Example.ORG", "https://EXAMPLE.org/", True),
        ("example.org", "http://www.example.org/", False),
        ("example.org", "http://notexample.org/", False),
        ("example.org", "http://example.org.evil.net/", False),
        ("example.org", "http://example.org./", False),
        ("example.org", "http://example.org:8080/", False),
        ("example.org", "https://example.org:443/", True),
        ("example.org", "https://example.org:80/", False),
        ("example.org:8080", "http://example.org:8080/", True),
        ("example.org:8080", "http://example.org/", False),
        ("*.example.org", "http://a.b.example.org/", True),
        ("*.example.org", "http://example.org/", False),
        ("*.example.org", "http://badexample.org/", False),
        ("93.184.216.34", "http://93.184.216.34/", True),
    ],
)
def test_a_domain_allows_its_host_and_a_star_the_hosts_below(monkeypatch, entry, url, allowed):
    asked = []
    monkeypatch.setattr(media, "resolve", lambda host, *_: asked.append(host) or [])
    expected = (
        "cannot fetch: the host has no address, or one that is not public"
        if allowed
        else "the host is not in allowed_media_domains"
    )
    assert refusal(url, MediaPolicy((entry,))) == expected
    assert bool(asked) is allowed


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org\\@evil.net/",
        "http://evil.net\\.example.org/",
        "http://exa mple.org/",
        "http://example.org/\r\nHost: evil.net",
        "http://example.org/\tx",
        "http://example.org:http/",
        "http://example.org:99999/",
        "http://[::1",
        "http://" + "a" * 9000,
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://example.org@evil.net/",
        "http:///etc/passwd",
        "http://:80/",
        "ftp://example.org/a",
        "FILE://example.org/a",
        "http://[::1]/",
        "http://example\uff0eorg/",
        "http://2130706433/",
        "http://0x7f.1/",
    ],
)
def test_odd_urls_lead_nowhere(monkeypatch, url):
    monkeypatch.setattr(media, "resolve", lambda *_: pytest.fail("a name was resolved"))
    assert refusal(url, MediaPolicy(("example.org",))) in (
        "not a usable URL",
        "a URL with a user name is not fetched",
        "only http and https URLs are fetched",
        "the host is not in allowed_media_domains",
    )


@pytest.mark.parametrize("entry", ["*", "", "*.", "http://example.org", "exam ple.org", "a.org/x", "a.org:0", "-a.org"])
def test_a_domain_that_is_no_host_is_a_mistake_of_the_configuration(entry):
    with pytest.raises(ConfigError, match="is not like"):
        MediaPolicy((entry,))


def test_options_of_the_runtime_are_read_before_weights(tmp_path):
    for options in (
        {"allowed_media_domains": "example.org"},
        {"allowed_media_domains": ["*"]},
        {"allowed_local_media_path": tmp_path / "nowhere"},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Runtime.from_pretrained("/nowhere", **options)
    with pytest.raises(ConfigError, match="positive"):
        MediaPolicy(timeout_s=0)


# --- which addresses ---


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::200e")),
        *((address, True) for address in ("::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((address, False) for address in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.5.4")),
        *((address, False) for address in ("192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1")),
        *((address, False) for address in ("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((address, False) for address in ("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254")),
        *((address, False) for address in ("ff02::1", "ff0e::1", "fec0::1", "2001:db8::1", "3fff::1", "5f00::1")),
        *((address, False) for address in ("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808")),
        *((address, False) for address in ("2002:7f00:1::", "2002:808:808::", "2001:0:808:808::1")),
    ],
)
def test_an_address_is_public_by_what_it_leads_to(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:10.0.0.1"], []])
def test_one_address_that_is_not_public_refuses_the_host(monkeypatch, addresses):
    monkeypatch.setattr(media, "resolve", lambda *_: addresses)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert "one that is not public" in refusal("http://example.org/", MediaPolicy(("example.org",)))


def test_loopback_is_refused_by_the_real_resolver():
    assert "127.0.0.1" in resolve("localhost", 80, 5)
    assert resolve("no-such-host.invalid", 80, 30) == []
    assert "one that is not public" in refusal("http://localhost/", MediaPolicy(("localhost",)))


def test_a_name_is_resolved_once_and_that_address_is_asked(site, monkeypatch):
    """A resolver that answers otherwise a second time gets no second time."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    monkeypatch.setattr(media, "resolve", lambda *_: next(answers))
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.1")
    asked = []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, **options: asked.append(address) or connect(address, **options)
    )
    assert fetch(url_of(site), policy_for(site), "x") == BODY
    assert asked == [("127.0.0.1", site.port)]
    assert "one that is not public" in refusal(url_of(site), policy_for(site))
    assert len(site.seen) == 1


def test_the_next_address_is_asked_where_one_does_not_answer(site, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", site.port))  # bound and not listening
        monkeypatch.setattr(media, "resolve", lambda *_: ["127.0.0.2", "127.0.0.1"])
        assert fetch(url_of(site), policy_for(site), "x") == BODY
        monkeypatch.setattr(media, "resolve", lambda *_: ["127.0.0.2"])
        assert refusal(url_of(site), policy_for(site)) == "cannot fetch: the connection failed"


def test_a_resolver_that_hangs_is_left_behind(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: gate.wait(5) and [])
    start = time.monotonic()
    found = refusal("http://example.org/", MediaPolicy(("example.org",), timeout_s=0.2))
    gate.set()
    assert found == "cannot fetch: not there within 0.2 s"
    assert time.monotonic() - start < 2


# --- redirects ---


def test_redirects_are_followed_three_times(site):
    assert fetch(url_of(site, "hops2"), policy_for(site), "x") == BODY
    assert len(site.seen) == 4
    assert refusal(url_of(site, "hops3"), policy_for(site)) == "cannot fetch: redirected more than 3 times"
    assert refusal(url_of(site, "hops0"), policy_for(site, max_redirects=0)).endswith("more than 0 times")


def test_every_redirect_is_looked_at_anew(site, servers, monkeypatch):
    """A host that may be asked sends to one that may not, and to one whose address may not."""
    other = servers[1]
    far = url_of(site, f"elsewhere?{url_of(other)}")
    assert refusal(far, policy_for(site)) == "the host is not in allowed_media_domains"
    assert other.seen == []
    monkeypatch.setattr(media, "is_public", lambda address: not site.seen)  # as if the name had moved meanwhile
    site.seen.clear()
    assert "one that is not public" in refusal(far, policy_for(site, other))
    assert other.seen == []
    monkeypatch.setattr(media, "is_public", lambda address: True)
    assert fetch(far, policy_for(site, other), "x") == BODY
    assert len(other.seen) == 1


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://pictures.example/a", "only http and https"),
        ("http://169.254.169.254/latest/meta-data", "not in allowed_media_domains"),
        ("http://user@pictures.example/", "user name"),
        ("//evil.example/", "not in allowed_media_domains"),
        ("data:image/png;base64,AAAA", "only http and https"),
        ("", "redirected more than 3 times"),
    ],
)
def test_a_redirect_leads_to_no_other_scheme_or_host(site, location, found):
    assert found in refusal(url_of(site, f"elsewhere?{location}"), policy_for(site))


# --- how much and how long ---


def test_bytes_come_as_they_are_whatever_type_they_claim(site):
    assert fetch(url_of(site, "a%20b/ü?q=1&r=[2]#end"), policy_for(site), "x") == BODY
    ((path, headers),) = site.seen
    assert path == "/a%20b/%C3%BC?q=1&r=[2]"
    assert headers["Host"] == f"pictures.example:{site.port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Proxy-Authorization", "Referer"} & set(headers)
    assert fetch(url_of(site, "chunked"), policy_for(site), "x") == BODY


@pytest.mark.parametrize(
    ("path", "found"),
    [
        *(
            (status, f"cannot fetch: the server answers with status {status}")
            for status in ("401", "404", "206", "500")
        ),
        ("packed", "cannot fetch: the answer is compressed"),
        ("cut", "cannot fetch: the connection failed"),
        ("nonsense", "cannot fetch: the connection failed"),
        ("huge", "the media of a request exceed the limit of 10000 bytes"),
        ("endless", "the media of a request exceed the limit of 10000 bytes"),
        ("drip", "cannot fetch: not there within 0.4 s"),
        ("drip-head", "cannot fetch: not there within 0.4 s"),
    ],
)
def test_an_answer_that_will_not_do_ends_in_a_fixed_text(site, path, found):
    start = time.monotonic()
    assert refusal(url_of(site, path), policy_for(site, max_bytes=10_000, timeout_s=0.4)) == found
    assert time.monotonic() - start < 2
    if path in ("endless", "drip", "drip-head"):
        assert site.hung_up.wait(5)
    assert fetch(url_of(site), policy_for(site), "x") == BODY


def test_proxies_of_the_environment_are_not_asked(site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(url_of(site), policy_for(site), "x") == BODY


def test_several_are_fetched_side_by_side_and_in_order(site, servers):
    policy = policy_for(*servers)
    data = f"data:x/y;base64,{base64.b64encode(b'here').decode()}"
    references = [(url_of(site), "a"), (data, "b"), (url_of(servers[1], "chunked"), "c")]
    assert fetch_all(references, policy) == [BODY, b"here", BODY]
    assert fetch_all([], policy) == []


def test_the_first_failure_ends_the_others_and_is_the_one_told(site):
    start = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"^b: cannot fetch: the server answers with status 404"):
        fetch_all([(url_of(site, "drip"), "a"), (url_of(site, "404"), "b")], policy_for(site, timeout_s=20))
    assert time.monotonic() - start < 5


def test_bytes_are_counted_over_all_media_of_a_request(site):
    references = [(url_of(site), "a"), (url_of(site), "b"), (f"data:x;base64,{base64.b64encode(BODY).decode()}", "c")]
    assert fetch_all(references, policy_for(site, max_bytes=3 * len(BODY))) == [BODY] * 3
    with pytest.raises(InvalidRequestError, match="exceed the limit"):
        fetch_all(references, policy_for(site, max_bytes=3 * len(BODY) - 1))


def test_a_data_url_is_measured_before_it_is_decoded(monkeypatch):
    url = f"data:image/png;base64,{base64.b64encode(bytes(300)).decode()}"
    assert fetch(url, MediaPolicy(), "x") == bytes(300)
    assert fetch(url, MediaPolicy(max_bytes=330), "x") == bytes(300)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    assert refusal(url, MediaPolicy(max_bytes=250)) == "data URL of 422 characters exceeds the limit of 336"


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pictures.example"
    options = [
        "-addext",
        "subjectAltName=DNS:pictures.example",
        "-keyout",
        folder / "key.pem",
        "-out",
        folder / "c.pem",
    ]
    try:
        subprocess.run([*command.split(), *options], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("the openssl command is not installed")
    return folder


def test_tls_knows_the_name_and_checks_the_certificate(site, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "c.pem", certificate / "key.pem")
    names = []
    context.sni_callback = lambda connection, name, context: names.append(name)
    with serve(Site(context)) as server:
        url, policy = url_of(server).replace("http:", "https:"), policy_for(server, site)
        assert refusal(url, policy) == "cannot fetch: the connection failed"  # nobody vouches for the certificate
        trusting = ssl.create_default_context(cafile=certificate / "c.pem")
        monkeypatch.setattr(media, "_tls", lambda: trusting)
        assert fetch(url, policy, "x") == BODY
        assert names == ["pictures.example"] * 2
        elsewhere = MediaPolicy((f"other.example:{server.port}",))
        assert refusal(f"https://other.example:{server.port}/", elsewhere) == "cannot fetch: the connection failed"
        down = url_of(server, f"elsewhere?{url_of(site)}").replace("http:", "https:", 1)
        assert refusal(down, policy) == "cannot fetch: redirected from https to http"
        assert site.seen == []


# --- local files ---


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a b.bin").write_bytes(BODY)
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "media"


def test_a_file_below_the_folder_is_read_within_the_bytes_allowed(folder):
    policy = MediaPolicy(allowed_local_path=folder)
    for url in (f"{folder}/a b.bin", f"file://{folder}/a%20b.bin", f"{folder}/../media/a b.bin"):
        assert fetch(url, policy, "x") == BODY
    assert "exceed the limit of 100 bytes" in refusal(f"{folder}/a b.bin", MediaPolicy((), folder, max_bytes=100))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{0}/../secret", "the file lies outside allowed_local_media_path"),
        ("file://{0}/%2e%2e/secret", "the file lies outside allowed_local_media_path"),
        ("{0}/../nothing", "the file lies outside allowed_local_media_path"),
        ("{0}x/y", "the file lies outside allowed_local_media_path"),
        ("/proc/self/environ", "the file lies outside allowed_local_media_path"),
        ("file://localhost/etc/passwd", "the file lies outside allowed_local_media_path"),
        ("{0}/nothing", "no such file, or it cannot be read"),
        ("{0}/" + "n" * 300, "no such file, or it cannot be read"),
        ("{0}", "not a regular file"),
        ("{0}/pipe", "not a regular file"),
        ("{0}/link", "the file lies outside allowed_local_media_path"),
        ("{0}/nul\0", "not a usable path"),
    ],
)
def test_files_elsewhere_and_what_is_no_file_are_refused(folder, path, found):
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder.parent / "secret")
    assert refusal(path.format(folder), MediaPolicy(allowed_local_path=folder)) == found


def test_a_path_swapped_after_it_was_looked_at_opens_nothing_outside(folder, monkeypatch):
    """Between the look at the name and the opening, a file and then its folder become links that lead out."""
    (folder / "sub").mkdir()
    (folder / "sub" / "secret").write_bytes(BODY)
    policy = MediaPolicy(allowed_local_path=folder)
    opening = media.os.open

    def swap_file(path, flags):
        Path(path).unlink()
        Path(path).symlink_to(folder.parent / "secret")
        return opening(path, flags)

    def swap_folder(path, flags):
        (folder / "sub").rename(folder / "was")
        (folder / "sub").symlink_to(folder.parent)
        return opening(path, flags)

    monkeypatch.setattr(media.os, "open", swap_folder)
    assert refusal(f"{folder}/sub/secret", policy) == "the file lies outside allowed_local_media_path"
    monkeypatch.setattr(media.os, "open", swap_file)
    assert refusal(f"{folder}/a b.bin", policy) == "no such file, or it cannot be read"


def test_without_a_folder_no_file_is_read(folder):
    for url in (f"{folder}/a b.bin", f"file://{folder}/a%20b.bin"):
        assert refusal(url, MediaPolicy()) == "local files need allowed_local_media_path"


# --- nothing else fetches ---

# What can open a connection, and who may import it: media for callers, the hub for checkpoints and kernels an operator
# names, OpenTelemetry for the collector that an operator names.
NETWORK = (
    "socket ssl asyncore http urllib.request urllib3 requests httpx httpx2 httpcore aiohttp ftplib smtplib telnetlib"
)
NETWORK += " xmlrpc websockets socketserver huggingface_hub fsspec opentelemetry"
MAY_CONNECT = {
    "runtime/media.py": {"socket", "ssl", "http", "create_connection"},
    "runtime/weights.py": {"huggingface_hub"},
    "runtime/kernel_pack.py": {"huggingface_hub"},
    "runtime/distributed/worker.py": {"socket"},  # a pair without names, between two processes
    "runtime/server/main.py": {"socket"},  # listens
    "runtime/server/tracing.py": {"opentelemetry"},
}
CONNECTING_CALLS = {"open_connection", "create_connection", "urlopen", "urlretrieve", "load_state_dict_from_url"}


def connections(source):
    """The network packages that a module imports anywhere, and calls that connect by way of other packages."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr in CONNECTING_CALLS:
            yield node.attr
            continue
        else:
            continue
        for name, known in ((name, known) for name in names for known in NETWORK.split()):
            if name == known or name.startswith(f"{known}."):
                yield known


def test_no_other_code_of_the_package_connects_to_anything():
    files = chain.from_iterable((ROOT / room).rglob("*.py") for room in ("kernels", "runtime", "export"))
    found = {str(file.relative_to(ROOT)): set(connections(file.read_text("utf-8"))) for file in files}
    assert {name: uses for name, uses in found.items() if not uses <= MAY_CONNECT.get(name, set())} == {}
    assert "socket" in found["runtime/media.py"]


@pytest.mark.parametrize(
    "planted",
    [
        "import httpx",
        "def late():\n    from urllib.request import urlopen",
        "from urllib import request",
        "import http.client as c",
        "async def f():\n    await asyncio.open_connection('h', 1)",
        "import torch\ntorch.hub.load_state_dict_from_url('x')",
    ],
)
def test_a_planted_connection_is_found(planted):
    assert list(connections(planted))
