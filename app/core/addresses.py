"""The guard: which URLs of callers' we may call, and the client that calls nothing else.

A URL is looked at twice. `AddressGuard.check_url` reads it, when it is handed in and again at each call. What a name
resolves to is decided when we connect, once, and the connection goes to the very address that was approved: a name that
changes its mind in between (DNS rebinding) gains nothing.
"""

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpcore2
import httpx2

from app.core.errors import AddressRefused, TooLarge

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]

# Special-purpose IPv4 (IANA's registry, 2026). `ipaddress.is_global` calls several of them global.
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers; 100.100.100.200 is Alibaba's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's wire server, on a public address
        "169.254.0.0/16",  # link local; 169.254.169.254 is most clouds' metadata service
        "172.16.0.0/12",
        "192.0.0.0/24",  # IETF protocols; 192.0.0.192 is Oracle's metadata service
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All of public IPv6 lies in 2000::/3. Outside it are loopback, ::/96 and ::ffff:0:0/96 (IPv4 inside), 64:ff9b::/96 and
# 64:ff9b:1::/48 (NAT64: IPv4 again), fc00::/7, fe80::/10, fec0::/10, ff00::/8 and what no one has been given.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocols, Teredo (IPv4 inside), benchmarks, ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4: IPv4 inside
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
# Ports from 1024 that the Fetch standard blocks, since other protocols listen there and may take our words for theirs.
_REFUSED_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080)
)
_MAX_URL = 2048  # characters
_lookups = threading.BoundedSemaphore(256)  # names being looked up at once
_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
# The URL standard's rule: a host whose last label is a number, also 0x.., is an IPv4 address in some spelling.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


async def resolve(host: str, port: int) -> list[str]:
    """Every address that the system's resolver knows for a name, in its order of preference.

    In a thread of its own, which may stay for as long as the resolver waits for a name server that is silent: in those
    of the event loop, of which there are few, everybody's lookups would wait behind it. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def tell(found: list[str] | Exception) -> None:
        if answer.done():  # nobody waits any longer
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def look_up() -> None:
        found: list[str] | Exception
        try:
            found = [str(to[0]) for *_, to in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            found = OSError(str(error)) if isinstance(error, UnicodeError) else error
        finally:
            _lookups.release()
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, found)

    if not _lookups.acquire(blocking=False):
        raise OSError("too many names are being looked up")
    threading.Thread(target=look_up, name="lookup", daemon=True).start()
    return await answer


class AddressGuard:
    """Lets public addresses through, and the operator's own networks (`allow`). `resolve` finds a name's addresses."""

    def __init__(self, allow: Iterable[Network] = (), resolve: Resolver = resolve) -> None:
        self._allow = tuple(allow)
        self._resolve = resolve

    def check_url(self, url: str) -> None:
        """Return if the URL may be called as far as reading it can tell. Raises AddressRefused."""
        # What two parsers might read differently goes first: backslashes, blanks, control and invisible characters.
        if len(url) > _MAX_URL or "\\" in url or " " in url or not url.isprintable():
            raise AddressRefused(f"A URL has at most {_MAX_URL} characters, all printable, without blank or backslash.")
        try:
            parts = httpx2.URL(url)  # the parser of the client that will call it
        except httpx2.InvalidURL as error:
            raise AddressRefused("This is not a valid URL; write https://host/path.") from error
        if parts.scheme not in ("http", "https"):
            raise AddressRefused("A URL must begin with https:// or http://.")
        if parts.userinfo:
            raise AddressRefused("A URL may not hold a user name or password; our signature says who calls.")
        if not _may_use(parts.port):
            raise AddressRefused("This port is not called; use 443, 80, or one from 1024 that has no other protocol.")
        self._check_host(parts.raw_host.decode("ascii"))

    async def find(self, host: str, port: int) -> list[Address]:
        """The addresses to connect to for a host: all it has, for a single one that is refused spoils it.

        Raises AddressRefused; OSError if the name has none.
        """
        addresses = [ipaddress.ip_address(text) for text in await self._resolve(host, port)]
        if not addresses:
            raise OSError(f"{host} has no address")
        for address in addresses:
            self._check_address(address)
        return addresses

    def _check_host(self, host: str) -> None:
        try:
            literal = ipaddress.ip_address(host)
        except ValueError:
            labels = host.removesuffix(".").split(".")
            if not _NAME.fullmatch(host.removesuffix(".")) or _NUMBER.fullmatch(labels[-1]):
                raise AddressRefused(
                    "The URL's host is not valid; write a name, or an address as in 192.0.2.1."
                ) from None
        else:
            self._check_address(literal)

    def _check_address(self, address: Address) -> None:
        if any(address in network for network in self._allow):
            return
        if isinstance(address, ipaddress.IPv4Address):
            is_refused = any(address in network for network in _REFUSED_V4)
        else:
            is_refused = address not in _PUBLIC_V6 or any(address in network for network in _REFUSED_V6)
        if is_refused:
            # The same words for every address: they must not tell a caller what lies in our network.
            raise AddressRefused("This host may not be called: it is not on a public address.")


def guarded_client(guard: AddressGuard, *, connect_seconds: float = 5, total_seconds: float = 15) -> httpx2.AsyncClient:
    """A client that calls only what the guard lets through: no redirects, no proxies, no cookies, no kept connections.

    `total_seconds` bounds a call from its start to the last byte of the body, however slowly they drip. Raises
    AddressRefused, or httpx2's TransportError and its kin.
    """
    return httpx2.AsyncClient(
        transport=_GuardedTransport(guard, total_seconds),
        timeout=httpx2.Timeout(total_seconds, connect=connect_seconds),
        headers={"Accept-Encoding": "identity", "User-Agent": "Safelight"},
        follow_redirects=False,
        trust_env=False,
    )


async def read_limited(response: httpx2.Response, limit: int) -> bytes:
    """The body of a streamed response, at most `limit` bytes.

    Raises TooLarge, and httpx2's DecodingError for a compressed body, which is not what we asked for and may be a bomb.
    """
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        message = "The reply is compressed, though identity was asked for."
        raise httpx2.DecodingError(message, request=response.request)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"The reply is larger than {limit} bytes.")
    return bytes(body)


class _GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens httpcore's connections: finds and checks a host's addresses, then connects to one of exactly those."""

    def __init__(self, guard: AddressGuard) -> None:
        self._guard = guard
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect within `timeout` seconds, the resolver included. TLS comes after, by httpcore, for the name."""
        error: Exception = httpcore2.ConnectError("no address")
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._guard.find(host, port)
                for address in addresses:
                    try:
                        # A share each, so that an address that swallows packets leaves time for the next one.
                        share = timeout / len(addresses) if timeout else None
                        return await self._backend.connect_tcp(str(address), port, share, local_address, socket_options)
                    except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failure:
                        error = failure
        except TimeoutError as failure:
            raise httpcore2.ConnectTimeout from failure
        except (OSError, UnicodeError) as failure:  # of the resolver
            raise httpcore2.ConnectError from failure
        raise error

    async def connect_unix_socket(self, path: str, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        raise AddressRefused("Sockets of this machine are not called.")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class _GuardedTransport(httpx2.AsyncBaseTransport):
    """httpx's side of httpcore's pool, on our backend.

    httpx's own transport takes no backend, and one slipped into its private pool would be lost, silently, by a rename.
    """

    def __init__(self, guard: AddressGuard, total_seconds: float) -> None:
        self._guard = guard
        self._total_seconds = total_seconds
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(),  # SSL_CERT_FILE is the operator's, for receivers of his own
            network_backend=_GuardedBackend(guard),
            max_connections=None,  # the caller bounds how many calls it makes at once
            max_keepalive_connections=0,  # each call decides anew where a name may lead
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._guard.check_url(str(request.url))
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        deadline = asyncio.get_running_loop().time() + self._total_seconds
        url = httpcore2.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        with _as_httpx_errors(request):
            async with asyncio.timeout_at(deadline):
                reply = await self._pool.handle_async_request(
                    httpcore2.Request(
                        method=request.method,
                        url=url,
                        headers=request.headers.raw,
                        content=request.stream,
                        extensions=request.extensions,
                    )
                )
        return httpx2.Response(
            status_code=reply.status,
            # Receivers of different tenants may share a host: a cookie for one must not travel to the other.
            headers=[(name, value) for name, value in reply.headers if name.lower() != b"set-cookie"],
            stream=_Body(reply, request, deadline),
            extensions=reply.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Body(httpx2.AsyncByteStream):
    """A response's body, chunk by chunk until the deadline of its call."""

    def __init__(self, reply: httpcore2.Response, request: httpx2.Request, deadline: float) -> None:
        self._reply = reply
        self._request = request
        self._deadline = deadline

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._reply.aiter_stream()
        while True:
            with _as_httpx_errors(self._request):
                async with asyncio.timeout_at(self._deadline):
                    chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk

    async def aclose(self) -> None:
        await self._reply.aclose()


@contextmanager
def _as_httpx_errors(request: httpx2.Request) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, httpcore2.TimeoutException) as error:
        raise httpx2.TimeoutException("The call took too long.", request=request) from error
    except httpcore2.NetworkError as error:
        raise httpx2.NetworkError("The connection failed.", request=request) from error
    except httpcore2.ProtocolError as error:
        raise httpx2.ProtocolError("The reply is not HTTP.", request=request) from error


def _may_use(port: int | None) -> bool:
    return port in (None, 80, 443) or (port is not None and 1024 <= port <= 65535 and port not in _REFUSED_PORTS)
