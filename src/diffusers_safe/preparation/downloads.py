"""Bytes of pictures from the web or from a folder."""

import asyncio
import ipaddress
import socket
import urllib.request
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from typing import Any

from huggingface_hub.utils import httpx  # httpx or httpx2, whichever its version uses

from ..arguments import typed
from .filters import Dropped
from .table import Row


MAX_BYTES = 50 * 2**20  # of one picture
MAX_REDIRECTS = 5
MAX_WAIT = 30.0  # seconds before another attempt, whatever Retry-After asks for
TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses that may pass
PRIVATE = "private address"  # the reason of what would be fetched from this computer or a private network
_NAT64 = int(ipaddress.IPv6Address("64:ff9b::")) >> 32
UNREACHABLE = ("no connection", "slow answer")  # what a network that is down looks like, too
# What a server says in X-Robots-Tag of a picture that is not for training.
NOT_FOR_TRAINING = {"noai", "noimageai"}


@typed
@dataclass(frozen=True)
class DownloadSettings:
    """How pictures are fetched from the web. None of it changes what is in a shard, unless a server is slow or fails.

    Attributes:
        timeout (`float`, defaults to 10): Seconds for the whole of one answer, redirects included.
        retries (`int`, defaults to 2): Further attempts where a server is slow, busy or cuts the connection, after 1,
            2, 4, ... seconds or what its `Retry-After` says, at most [`MAX_WAIT`].
        concurrency (`int`, defaults to 32): Pictures under way at once.
        user_agent (`str`, *optional*): What servers are told; the name and version of this package by default.
        allow_private_addresses (`bool`, defaults to `False`): Fetch from this computer and from private networks, too
            (loopback, link-local, private and reserved addresses). A table from others could reach services there
            that the internet cannot.
    """

    timeout: float = 10.0
    retries: int = 2
    concurrency: int = 32
    user_agent: str | None = None
    allow_private_addresses: bool = False

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"timeout {self.timeout}: must be above 0 seconds")
        if self.retries < 0:
            raise ValueError(f"retries {self.retries}: must be at least 0")
        if self.concurrency < 1:
            raise ValueError(f"concurrency {self.concurrency}: must be at least 1")
        if self.user_agent is not None and not (self.user_agent.isascii() and self.user_agent.isprintable()):
            raise ValueError(f"user_agent {self.user_agent!r}: must be one line of ASCII")


class _TryAgain(Dropped):
    """A reason that may pass, and after how many seconds the server asks to come back."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Fetcher:
    """Fetches pictures while its `async with` block lasts."""

    def __init__(self, settings: DownloadSettings):
        self.settings = settings
        self._client = httpx.AsyncClient(
            headers={
                "User-Agent": settings.user_agent or f"diffusers-safe/{version('diffusers-safe')} prepare-data",
                "Accept": "image/*, */*;q=0.1",
                "Accept-Encoding": "identity",
            },
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # no answer may depend on another
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=None,  # each step would have it to itself
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
        )
        if not settings.allow_private_addresses:
            pool = self._client._transport._pool  # httpx has no public way to say how connections are made
            pool._network_backend = _PublicNetwork(pool._network_backend)
            if urllib.request.getproxies().keys() - {"no"}:  # which make the connections for us
                self._client.event_hooks = {"request": [_check_host]}

    async def __aenter__(self) -> "Fetcher":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self._client.__aexit__(*error)

    async def fetch(self, row: Row) -> tuple[bytes, tuple[str, ...]]:
        """A picture's bytes, and how they came if it was not straight.

        Raises:
            [`Dropped`]: If there are none.
        """
        if row.folder is not None:
            return await asyncio.to_thread(_read, row), ()
        for attempt in range(self.settings.retries + 1):
            try:
                return await asyncio.wait_for(self._download(row.address), self.settings.timeout)
            except asyncio.TimeoutError:
                problem = _TryAgain("slow answer")
            except _TryAgain as error:
                problem = error
            if attempt < self.settings.retries:
                wait = 2.0**attempt if problem.retry_after is None else problem.retry_after
                await asyncio.sleep(min(wait, MAX_WAIT))
        raise problem

    async def _download(self, address: str) -> tuple[bytes, tuple[str, ...]]:
        try:
            async with self._client.stream("GET", address) as answer:
                if answer.status_code in TRANSIENT:
                    raise _TryAgain(f"HTTP {answer.status_code}", _seconds(answer.headers.get("Retry-After")))
                if answer.status_code != 200:
                    raise Dropped(f"HTTP {answer.status_code}")
                robots = answer.headers.get("X-Robots-Tag", "").lower().replace(",", " ").split()
                if NOT_FOR_TRAINING.intersection(robots):
                    raise Dropped("not for training (X-Robots-Tag)")
                data = bytearray()
                async for chunk in answer.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise Dropped(f"more than {MAX_BYTES // 2**20} MB")
                return bytes(data), (("redirected",) if answer.history else ())
        except httpx.TooManyRedirects:
            raise Dropped("too many redirects") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise Dropped("no address") from None
        except httpx.ConnectError:
            raise _TryAgain("no connection") from None
        except httpx.HTTPError:  # cut off, or no HTTP
            raise _TryAgain("broken answer") from None


class _PublicNetwork:
    """Makes connections to public addresses only: a name is looked up once, and what was checked is connected to, so
    redirects and names that change do not lead elsewhere."""

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def connect_tcp(self, host: str, port: int, **arguments: Any) -> Any:
        addresses = await public_addresses(host, port)
        for address in addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, **arguments)
            except Exception:  # httpcore's own kinds; the last address tells
                continue
        return await self._backend.connect_tcp(addresses[-1], port, **arguments)


async def _check_host(request: httpx.Request) -> None:
    try:
        await public_addresses(request.url.host, request.url.port)
    except _TryAgain:
        return  # a name that only the proxy knows


async def public_addresses(host: str, port: int | None) -> list[str]:
    """The addresses of a host, in the order in which they are to be tried.

    Raises:
        [`Dropped`]: If one of them is not public, or there is none.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _TryAgain("no connection") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not all(map(is_public, addresses)):
        raise Dropped(PRIVATE)
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet; of an IPv6 address that stands for an IPv4 address, that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        number = int(ip)
        embedded = ip.ipv4_mapped or ip.sixtofour
        if number >> 32 == 0 or number >> 32 == _NAT64:
            embedded = ipaddress.IPv4Address(number & 0xFFFFFFFF)
        ip = embedded or ip
    return ip.is_global and not ip.is_multicast


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; its other form, a date, is not read."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else None


def _read(row: Row) -> bytes:
    start, size = row.place or (0, MAX_BYTES + 1)
    file_name = row.address if row.place is None else row.address.partition(".tar/")[0] + ".tar"
    try:
        with (row.folder / file_name).open("rb") as file:
            file.seek(start)
            data = file.read(min(size, MAX_BYTES + 1))
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise Dropped("no such file") from None
    if len(data) > MAX_BYTES:
        raise Dropped(f"more than {MAX_BYTES // 2**20} MB")
    return data
