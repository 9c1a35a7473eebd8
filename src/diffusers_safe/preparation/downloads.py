"""Loads the bytes of images from URLs, folders and tar files."""

import asyncio
import ipaddress
import socket
import urllib.request
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from typing import Any

from huggingface_hub.utils import httpx  # httpx or httpx2, whichever its version uses

from ..arguments import option, typed
from .filters import Dropped
from .table import Row


MAX_BYTES = 50 * 2**20  # per image
MAX_REDIRECTS = 5
MAX_WAIT = 30.0  # seconds between attempts, even if Retry-After asks for more
TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses of temporary errors
PRIVATE = "private address"
UNREACHABLE = ("no connection", "slow answer")  # reasons that a network failure causes as well
NOT_FOR_TRAINING = {"noai", "noimageai"}  # values of X-Robots-Tag
_NAT64 = int(ipaddress.IPv6Address("64:ff9b::")) >> 32


@typed
@dataclass(frozen=True)
class DownloadSettings:
    """How images are downloaded. These settings do not change the shards, unless a server is slow or fails.

    Args:
        timeout (`float`, defaults to 10): Seconds for a whole answer, redirects included.
        retries (`int`, defaults to 2): Number of further attempts if a server is slow, busy or closes the connection.
            The waits are 1, 2, 4, ... seconds, or the value of `Retry-After`, at most `MAX_WAIT`.
        concurrency (`int`, defaults to 32): Number of simultaneous downloads.
        user_agent (`str`, *optional*): The `User-Agent` header; name and version of this package by default.
        allow_private_addresses (`bool`, defaults to `False`): Whether to download from this computer and from private
            networks (loopback, link-local, private and reserved addresses). A table from an untrusted source could
            reach services there that are not reachable from the internet.
    """

    timeout: float = option(10.0, "Maximum seconds per download.", above=0)
    retries: int = option(2, "Number of further attempts if a server is slow or busy.", at_least=0)
    concurrency: int = option(32, "Number of simultaneous downloads.", at_least=1)
    user_agent: str | None = option(None, "User-Agent header. Default: name and version of this package.")
    allow_private_addresses: bool = option(
        False,
        "Also download from this computer and from private networks (loopback, link-local, private addresses). By"
        " default such rows are dropped.",
    )

    def __post_init__(self):
        if self.user_agent is not None and not (self.user_agent.isascii() and self.user_agent.isprintable()):
            raise ValueError(f"user_agent {self.user_agent!r}: must be one line of ASCII")


class _TemporaryError(Dropped):
    """A reason that may be temporary, and the number of seconds after which the server allows another attempt."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Fetcher:
    """Loads the bytes of images; used as an `async with` block."""

    def __init__(self, settings: DownloadSettings):
        self.settings = settings
        self._client = httpx.AsyncClient(
            headers={
                "User-Agent": settings.user_agent or f"diffusers-safe/{version('diffusers-safe')} prepare-data",
                "Accept": "image/*, */*;q=0.1",
                "Accept-Encoding": "identity",
            },
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # answers must not depend on each other
            event_hooks={"request": [_check_port]},
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=None,  # httpx would apply it to each read; `fetch` applies it to the whole answer
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
        )
        if not settings.allow_private_addresses:
            pool = self._client._transport._pool  # httpx has no public option for the network backend
            pool._network_backend = _PublicNetwork(pool._network_backend)
            if urllib.request.getproxies().keys() - {"no"}:  # proxies open the connections themselves
                self._client.event_hooks = {"request": [_check_port, _check_host]}

    async def __aenter__(self) -> "Fetcher":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error) -> None:
        await self._client.__aexit__(*error)

    async def fetch(self, row: Row) -> tuple[bytes, tuple[str, ...]]:
        """Loads an image.

        Returns:
            `tuple[bytes, tuple[str, ...]]`: The bytes, and `("redirected",)` if the URL was redirected.

        Raises:
            [`Dropped`]: If the image cannot be loaded.
        """
        if row.folder is not None:
            return await asyncio.to_thread(_read, row), ()
        for attempt in range(self.settings.retries + 1):
            try:
                return await asyncio.wait_for(self._download(row.address), self.settings.timeout)
            except asyncio.TimeoutError:
                problem = _TemporaryError("slow answer")
            except _TemporaryError as error:
                problem = error
            if attempt < self.settings.retries:
                wait = 2.0**attempt if problem.retry_after is None else problem.retry_after
                await asyncio.sleep(min(wait, MAX_WAIT))
        raise problem

    async def _download(self, address: str) -> tuple[bytes, tuple[str, ...]]:
        try:
            async with self._client.stream("GET", address) as answer:
                if answer.status_code in TRANSIENT:
                    raise _TemporaryError(f"HTTP {answer.status_code}", _seconds(answer.headers.get("Retry-After")))
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
            raise _TemporaryError("no connection") from None
        except httpx.HTTPError:  # an incomplete answer, or one that is not HTTP
            raise _TemporaryError("broken answer") from None


class _PublicNetwork:
    """Network backend of httpcore that connects to public addresses only.

    A host name is resolved once, and the connection uses the checked address. Redirects and DNS answers that change
    between the check and the connection (DNS rebinding) can therefore not reach private addresses.
    """

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def connect_tcp(self, host: str, port: int, **arguments: Any) -> Any:
        addresses = await public_addresses(host, port)
        for address in addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, **arguments)
            except Exception:  # any error of httpcore; the last address below raises it
                continue
        return await self._backend.connect_tcp(addresses[-1], port, **arguments)


async def _check_port(request: httpx.Request) -> None:
    if request.url.port is not None and not 0 <= request.url.port < 2**16:  # httpx accepts any number
        raise Dropped("no address")


async def _check_host(request: httpx.Request) -> None:
    try:
        await public_addresses(request.url.host, request.url.port)
    except _TemporaryError:
        return  # a host name that only the proxy can resolve


async def public_addresses(host: str, port: int | None) -> list[str]:
    """Resolves a host name to its IP addresses, in the order in which to try them.

    Raises:
        [`Dropped`]: If an address is not public, or there is none.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _TemporaryError("no connection") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not all(map(is_public, addresses)):
        raise Dropped(PRIVATE)
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is public. For an IPv6 address that embeds an IPv4 address, the latter is checked."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        number = int(ip)
        embedded = ip.ipv4_mapped or ip.sixtofour
        if number >> 32 == 0 or number >> 32 == _NAT64:
            embedded = ipaddress.IPv4Address(number & 0xFFFFFFFF)
        ip = embedded or ip
    return ip.is_global and not ip.is_multicast


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds. Its other form, a date, is not supported."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else None


def _read(row: Row) -> bytes:
    start, size = row.place or (0, MAX_BYTES + 1)
    path = row.folder / row.address
    try:
        if row.place is not None:
            path = next(part for part in reversed(path.parents) if part.is_file())  # the tar file
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(min(size, MAX_BYTES + 1))
    except (OSError, ValueError):  # ValueError: not a valid file name
        raise Dropped("no such file") from None
    if len(data) > MAX_BYTES:
        raise Dropped(f"more than {MAX_BYTES // 2**20} MB")
    return data
