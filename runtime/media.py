"""What a message names by URL, as bytes: the only code of the package that connects, or opens a file, for a caller.

Whoever may write messages may try to make this process fetch what only it can reach. Hence: nothing is fetched unless
`MediaPolicy` names the host; http and https only; a name is resolved once, every address it has must be public, and the
connection goes to one of those, with the name in TLS and in the Host header; the same again after every redirect; no
proxy of the environment, no cookies, no credentials; bytes and time are bounded for all media of a request together.
Errors have fixed texts: nothing that a socket, a resolver, a server or a decoder said is repeated.

The Content-Type of an answer is not looked at: what an image is, its bytes say (`image.py`).
"""

import io
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

from .errors import ConfigError, InvalidRequestError
from .image import data_url_bytes

_HOST = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
_DOMAIN = re.compile(rf"(\*\.)?{_HOST}(:[1-9][0-9]{{0,4}})?")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_URL_LENGTH = 8192
_AT_ONCE = 8  # fetches of one request
_CHUNK = 2**16
_URL_SAFE = "/%:@!$&'()*+,;=~-._"  # what a path may hold as it is, escapes included
# Mapped and NAT64 addresses lead to the IPv4 address in their last 32 bits, which is then what counts.
_EMBEDDED_IPV4 = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("3fff::/20"))  # 6to4, and documentation


@dataclass(frozen=True)
class MediaPolicy:
    """What messages may name. The defaults let in data URLs and nothing else.

    allowed_domains: `example.org` is that host on the port of its scheme, `*.example.org` every host below it and not
    itself, `example.org:8443` that port alone. allowed_local_path: the folder below which `file://` URLs and paths may
    lie. max_bytes, timeout_s: of all media of one request together. Raises `ConfigError`.
    """

    allowed_domains: tuple[str, ...] = ()
    allowed_local_path: Path | None = None
    max_bytes: int = 48 * 2**20  # 64 Mi characters of base64
    timeout_s: float = 10.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.allowed_domains, list | tuple):
            raise ConfigError(f"allowed_media_domains must be a list of host names, not {self.allowed_domains!r}")
        for entry in self.allowed_domains:
            if not isinstance(entry, str) or not _DOMAIN.fullmatch(entry.lower()):
                raise ConfigError(
                    f"allowed_media_domains: {entry!r} is not like example.org, *.example.org or example.org:8443"
                )
        object.__setattr__(self, "allowed_domains", tuple(entry.lower() for entry in self.allowed_domains))
        if self.allowed_local_path is not None:
            folder = Path(self.allowed_local_path)
            if not folder.is_dir():
                raise ConfigError(f"allowed_local_media_path: {str(folder)!r} is not a folder")
            object.__setattr__(self, "allowed_local_path", folder.resolve())
        if self.max_bytes < 1 or not self.timeout_s > 0 or self.max_redirects < 0:
            raise ConfigError("the limits of media must be positive")

    def allows(self, scheme: str, host: str, port: int) -> bool:
        """Whether a host, in lower case, may be asked."""
        for entry in self.allowed_domains:
            name, _, own_port = entry.partition(":")
            matches = host.endswith(name[1:]) if name.startswith("*.") else host == name
            if matches and port == (int(own_port) if own_port else _PORTS[scheme]):
                return True
        return False


def fetch(url: str, policy: MediaPolicy, where: str) -> bytes:
    """The bytes that a data, http or https URL, a `file://` URL or a path stands for.

    Blocks. Raises `InvalidRequestError` with a fixed text that begins with `where`.
    """
    return fetch_all([(url, where)], policy)[0]


def fetch_all(references: Sequence[tuple[str, str]], policy: MediaPolicy) -> list[bytes]:
    """`fetch` of several (url, where), in order, some at a time, within the bytes and the time of one request."""
    budget = _Budget(policy)

    def one(reference: tuple[str, str]) -> bytes:
        try:
            return _fetch(*reference, policy, budget)
        except BaseException:
            budget.end = 0.0  # the others need not go on
            raise

    if len(references) < 2 or not policy.allowed_domains:
        return [one(reference) for reference in references]
    with ThreadPoolExecutor(min(_AT_ONCE, len(references)), thread_name_prefix="vitrail-media") as pool:
        fetched = [pool.submit(one, reference) for reference in references]
    errors = [error for error in (future.exception() for future in fetched) if error is not None]
    if errors:  # the one that made the others stop, rather than theirs
        raise min(errors, key=lambda error: isinstance(error, _OutOfTimeError))
    return [future.result() for future in fetched]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host of the public internet, by what it leads to where it is translated."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _EMBEDDED_IPV4):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _UNICAST or any(ip in network for network in _NOT_PUBLIC):
            return False
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """The addresses of a host; none if it has none. A resolver cannot be interrupted: it is left behind when late."""
    answer: SimpleQueue[list[str]] = SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answer.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))

    Thread(target=ask, name="vitrail-resolver", daemon=True).start()
    try:
        return answer.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError from None


class _RefusedError(Exception):
    """A fixed text that says why."""


class _OutOfTimeError(InvalidRequestError):
    """Time is up for a request, be it that another of its media failed."""


class _Budget:
    """The bytes and the time that are left to a request."""

    def __init__(self, policy: MediaPolicy) -> None:
        self.end = monotonic() + policy.timeout_s
        self.max_bytes = self._bytes = policy.max_bytes
        self._lock = Lock()

    def seconds(self) -> float:
        left = self.end - monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def take(self, count: int) -> None:
        with self._lock:
            self._bytes -= count
            if self._bytes < 0:
                raise _RefusedError(f"the media of a request exceed the limit of {self.max_bytes} bytes")


def _fetch(url: str, where: str, policy: MediaPolicy, budget: _Budget) -> bytes:
    try:
        if url[:5].lower() == "data:":
            data = data_url_bytes(url, 4 * -(-policy.max_bytes // 3), where)
            budget.take(len(data))
            return data
        if "://" in url and not url.startswith("file://"):
            return _read_remote(url, policy, budget)
        return _read_local(url, policy, budget)
    except _RefusedError as refusal:
        raise InvalidRequestError(f"{where}: {refusal}") from None
    except TimeoutError:
        raise _OutOfTimeError(f"{where}: cannot fetch: not there within {policy.timeout_s:g} s") from None
    except (OSError, HTTPException):
        raise InvalidRequestError(f"{where}: cannot fetch: the connection failed") from None


# Local files


def _read_local(url: str, policy: MediaPolicy, budget: _Budget) -> bytes:
    """A regular file below the allowed folder: what was opened is checked, not what its name meant a moment before."""
    if policy.allowed_local_path is None:
        raise _RefusedError("local files need allowed_local_media_path")
    outside = _RefusedError("the file lies outside allowed_local_media_path")
    try:
        path = Path(unquote(url.removeprefix("file://")) if url.startswith("file://") else url).resolve()
    except (OSError, RuntimeError, ValueError):  # a NUL in the name, links that go in circles
        raise _RefusedError("not a usable path") from None
    if not path.is_relative_to(policy.allowed_local_path):
        raise outside
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise _RefusedError("no such file, or it cannot be read") from None
    try:
        opened = Path(f"/proc/self/fd/{descriptor}")  # Linux; elsewhere a folder might be swapped for a link meanwhile
        if opened.is_symlink() and not opened.readlink().is_relative_to(policy.allowed_local_path):
            raise outside
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _RefusedError("not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return _read_all(file, budget)
    finally:
        os.close(descriptor)


def _read_all(file: Any, budget: _Budget) -> bytes:
    chunks = []
    while chunk := file.read1(_CHUNK):
        budget.take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


# Remote files


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def netloc(self) -> str:
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def _read_remote(url: str, policy: MediaPolicy, budget: _Budget) -> bytes:
    if not policy.allowed_domains:
        raise _RefusedError("URLs are not fetched; pass a data URL")
    target = _target(url, policy)
    for _ in range(policy.max_redirects + 1):
        with closing(_Stream(_connect(target, budget), budget)) as stream:
            stream.sendall(_request(target))
            # All it wants of a socket is `makefile`.
            with closing(HTTPResponse(cast(socket.socket, stream), method="GET")) as response:
                response.begin()
                if response.status not in _REDIRECTS:
                    return _read_answer(response, budget)
                location = response.getheader("Location") or ""
        earlier, target = target, _target(urljoin(target.url, location), policy)
        if (earlier.scheme, target.scheme) == ("https", "http"):
            raise _RefusedError("cannot fetch: redirected from https to http")
    raise _RefusedError(f"cannot fetch: redirected more than {policy.max_redirects} times")


def _target(url: str, policy: MediaPolicy) -> _Target:
    """Where a URL leads, if that is allowed. The host that is checked here is the one that is asked."""
    bad = _RefusedError("not a usable URL")
    if len(url) > _MAX_URL_LENGTH or any(character <= " " or character in "\\\x7f" for character in url):
        raise bad
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, (parts.hostname or "").lower(), parts.port
        path = quote(parts.path or "/", safe=_URL_SAFE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_URL_SAFE + "?[]")
    except ValueError:  # a port that is no number, brackets that hold no address, half a surrogate pair
        raise bad from None
    if scheme not in _PORTS:
        raise _RefusedError("only http and https URLs are fetched")
    if "@" in parts.netloc:
        raise _RefusedError("a URL with a user name is not fetched")
    port = _PORTS[scheme] if port is None else port
    if not policy.allows(scheme, host, port):
        raise _RefusedError("the host is not in allowed_media_domains")
    if not re.fullmatch(_HOST, host):
        raise bad
    return _Target(scheme, host, port, path)


def _connect(target: _Target, budget: _Budget) -> socket.socket:
    """A connection to an address of the host that was looked at, encrypted where the scheme says so."""
    addresses = resolve(target.host, target.port, budget.seconds())
    if not addresses or not all(is_public(address) for address in addresses):
        raise _RefusedError("cannot fetch: the host has no address, or one that is not public")
    connection = _first_of(addresses, target.port, budget)
    if target.scheme == "http":
        return connection
    try:
        connection.settimeout(budget.seconds())
        return _tls().wrap_socket(connection, server_hostname=target.host)
    except BaseException:
        connection.close()
        raise


def _first_of(addresses: Sequence[str], port: int, budget: _Budget) -> socket.socket:
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), timeout=budget.seconds() / 2)
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), timeout=budget.seconds())


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request(target: _Target) -> bytes:
    lines = (
        f"GET {target.path} HTTP/1.1",
        f"Host: {target.netloc}",
        "User-Agent: vitrail",
        "Accept: image/*",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii")


def _read_answer(response: HTTPResponse, budget: _Budget) -> bytes:
    if response.status != 200:
        raise _RefusedError(f"cannot fetch: the server answers with status {response.status}")
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise _RefusedError("cannot fetch: the answer is compressed")
    announced = response.length
    if announced is not None and announced > budget.max_bytes:
        raise _RefusedError(f"the media of a request exceed the limit of {budget.max_bytes} bytes")
    data = _read_all(response, budget)
    if announced is not None and len(data) != announced:
        raise HTTPException
    return data


class _Stream(io.RawIOBase):
    """A socket whose every operation ends with the time of the request, however slowly the other side drips."""

    def __init__(self, connection: socket.socket, budget: _Budget) -> None:
        self._connection = connection
        self._budget = budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._budget.seconds())
        return self._connection.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(self._budget.seconds())
        self._connection.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        self._connection.close()
        super().close()
