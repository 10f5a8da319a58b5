import asyncio
import contextlib
import datetime as dt
import gzip
import ipaddress
import socket
import ssl
import threading
import time

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import addresses
from app.core.addresses import AddressGuard, guarded_client, read_limited
from app.core.errors import AddressRefused, TooLarge

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"]
REFUSED = [
    # research/reliability.md 3.1: what other guards let through
    "100.100.100.200",
    "100.64.0.1",
    "192.0.0.192",
    "168.63.129.16",
    "224.0.0.1",
    "ff02::1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "fec0::1",
    "::127.0.0.1",
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "::1",
    "::ffff:127.0.0.1",
    "fd00:ec2::254",
    "64:ff9b::7f00:1",
    # the rest of IANA's special-purpose registries
    "0.0.0.0",
    "127.255.255.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:2::1",
    "2001:10::1",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fe80::1",
    "fe80::1%eth0",
    "4000::1",
]
ODD_SPELLINGS = [
    "2130706433",
    "0177.1",
    "0177.0.0.1",
    "0x7f.1",
    "0x7f000001",
    "0X7F.0.0.1",
    "017700000001",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "127.0.0.01",
    "127.0.0.1..",
    "127\u30020\u30020\u30021",
    "127\uff0e0\uff0e0\uff0e1",
    "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1",
    "[::ffff:7f00:1]",
    "[::ffff:127.0.0.1]",
    "[0:0:0:0:0:ffff:7f00:0001]",
    "[::7f00:1]",
    "[2002:7f00:1::]",
    "[64:ff9b::127.0.0.1]",
    "[fe80::1%25eth0]",
    "[::1%251]",
    "[v1.127]",
    "1.1.1.1.1",
    "256.256.256.256",
    "4294967297",
    "8.8.8.8.0x7f",
    "0x",
    "a.0x",
    "08",
    "%31%32%37.0.0.1",
    "127.0.0.1%00.example.com",
]


def in_url(address):
    return f"https://[{address}]/hook" if ":" in address else f"https://{address}/hook"


def resolver(*answers):
    """Answers each question with the next list; the last one stays."""
    remaining = list(answers)

    async def resolve(host, port):
        resolve.questions += 1
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    resolve.questions = 0
    return resolve


@contextlib.asynccontextmanager
async def server(reply, tls=None):
    """A real HTTP server; `reply(writer)` answers, true to keep the connection. Yields port and heads."""
    heads = []

    async def serve(reader, writer):
        try:
            is_kept = True
            while is_kept:
                heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                is_kept = await reply(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1], heads
    finally:
        listening.close()


def says(text, *, is_kept=False):
    async def reply(writer):
        writer.write(text.encode() if isinstance(text, str) else text)
        await writer.drain()
        return is_kept

    return reply


OK = says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=b\r\n\r\nok", is_kept=True)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_pass(address):
    guard = AddressGuard(resolve=resolver([address]))
    guard.check_url(in_url(address))
    assert asyncio.run(guard.find("receiver.example", 443)) == [ipaddress.ip_address(address)]


@pytest.mark.parametrize("address", REFUSED)
def test_no_special_address_passes_as_a_literal_or_behind_a_name(address):
    guard = AddressGuard(resolve=resolver([address]))
    with pytest.raises(AddressRefused):
        guard.check_url(in_url(address.replace("%", "%25")))
    with pytest.raises(AddressRefused):
        asyncio.run(guard.find("receiver.example", 443))


@pytest.mark.parametrize("host", ODD_SPELLINGS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_odd_spelling_of_an_address_passes(scheme, host):
    with pytest.raises(AddressRefused):
        AddressGuard().check_url(f"{scheme}://{host}/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "javascript:alert(1)",
        "unix:///run/docker.sock",
        "http+unix://%2frun%2fdocker.sock/",
        "https://",
        "https:///path",
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com/a\\b",
        "https://exam\tple.com/",
        "https://example.com/\r\nX-Injected: 1",
        "https://example.com/\x00",
        "https://example.com/\u202e",
        "https://example.com/a b",
        " https://example.com/",
        "https://example.com:0/",
        "https://example.com:22/",
        "https://example.com:25/",
        "https://example.com:6667/",
        "https://example.com:65536/",
        "https://example.com:-1/",
        "https://example.com:80:80/",
        "https://-example.com/",
        "https://a..b/",
        "https://.example.com/",
        "https://" + "a" * 64 + ".com/",
        "https://" + "a." * 127 + "com/",
        "https://exa%6dple.com/",
        "https://exa,mple.com/",
        "https://[::1/",
        "https://example.com/" + "a" * 2048,
    ],
)
def test_a_url_that_could_be_read_in_two_ways_or_is_not_for_us_is_refused(url):
    with pytest.raises(AddressRefused):
        AddressGuard().check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com./hook",
        "HTTPS://EXAMPLE.COM:443/hook?a=b#c",
        "http://example.com:8443/",
        "https://b\u00fccher.example/",
        "https://xn--bcher-kva.example/\u00e4",
        "https://my_service:8080/hook",
        "https://1.example.com/",
    ],
)
def test_ordinary_urls_pass(url):
    AddressGuard().check_url(url)


@given(
    st.one_of(st.text(), st.text().map(lambda host: f"http://{host}/"), st.from_regex(r"https?://[\[\]0-9a-fx.:%@]*"))
)
def test_any_text_is_accepted_or_refused_and_never_crashes_the_guard(text):
    with contextlib.suppress(AddressRefused):
        AddressGuard().check_url(text)


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_no_address_that_the_standard_library_calls_private_passes(address):
    guard = AddressGuard(resolve=resolver([str(address)]))
    try:
        asyncio.run(guard.find("receiver.example", 443))
    except AddressRefused:
        return
    assert address.is_global


def test_the_refusal_says_the_same_for_every_address():
    messages = set()
    for address in REFUSED:
        with pytest.raises(AddressRefused) as refused:
            asyncio.run(AddressGuard(resolve=resolver([address])).find("receiver.example", 443))
        messages.add(refused.value.message)
    assert len(messages) == 1


def test_one_bad_record_among_good_ones_spoils_a_name():
    with pytest.raises(AddressRefused):
        asyncio.run(AddressGuard(resolve=resolver(["8.8.8.8", "127.0.0.1"])).find("receiver.example", 443))


def test_the_operators_networks_pass_and_no_others():
    guard = AddressGuard([LOOPBACK])
    guard.check_url("http://127.0.0.1:8080/")
    with pytest.raises(AddressRefused):
        guard.check_url("http://10.0.0.1/")
    with pytest.raises(AddressRefused):
        guard.check_url("http://[::ffff:127.0.0.1]/")


def test_a_name_that_turns_to_loopback_after_the_check_reaches_nothing():
    async def walk():
        async with server(OK) as (port, heads):
            guard = AddressGuard(resolve=resolver(["8.8.8.8"], ["127.0.0.1"]))
            assert await guard.find("receiver.example", port) == [ipaddress.ip_address("8.8.8.8")]
            async with guarded_client(guard) as client:
                with pytest.raises(AddressRefused):
                    await client.get(f"http://receiver.example:{port}/")
            assert heads == []

    asyncio.run(walk())


def test_localhost_is_refused_by_the_real_resolver():
    async def walk():
        async with server(OK) as (port, heads), guarded_client(AddressGuard()) as client:
            with pytest.raises(AddressRefused):
                await client.get(f"http://localhost:{port}/")
            assert heads == []

    asyncio.run(walk())


def test_a_call_resolves_once_and_connects_to_that_address_under_the_name():
    async def walk():
        resolve = resolver(["127.0.0.1"], ["10.0.0.1"])
        async with server(OK) as (port, heads), guarded_client(AddressGuard([LOOPBACK], resolve)) as client:
            reply = await client.get(f"http://receiver.example:{port}/hook")
            assert (reply.status_code, reply.content, resolve.questions) == (200, b"ok", 1)
            assert f"Host: receiver.example:{port}\r\n" in heads[0]
            assert "Accept-Encoding: identity\r\n" in heads[0]

    asyncio.run(walk())


def test_each_call_asks_the_resolver_anew():
    async def walk():
        resolve = resolver(["127.0.0.1"], ["10.0.0.1"])
        async with server(OK) as (port, _), guarded_client(AddressGuard([LOOPBACK], resolve)) as client:
            await client.get(f"http://receiver.example:{port}/")
            with pytest.raises(AddressRefused):
                await client.get(f"http://receiver.example:{port}/")

    asyncio.run(walk())


def test_the_client_checks_the_url_itself():
    async def walk():
        async with guarded_client(AddressGuard([LOOPBACK])) as client:
            for url in ("http://user:word@127.0.0.1:8080/", "http://127.0.0.1:22/", "http://127.1/"):
                with pytest.raises(AddressRefused):
                    await client.get(url)

    asyncio.run(walk())


def test_a_redirect_is_not_followed():
    async def walk():
        async with server(OK) as (inner, heads):
            moved = says(f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{inner}/\r\nContent-Length: 0\r\n\r\n")
            async with server(moved) as (port, _), guarded_client(AddressGuard([LOOPBACK])) as client:
                assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 302
            assert heads == []

    asyncio.run(walk())


def test_a_second_address_is_tried_when_the_first_is_dead():
    async def walk():
        guard = AddressGuard([LOOPBACK], resolver(["127.0.0.2", "127.0.0.1"]))
        async with server(OK) as (port, _), guarded_client(guard) as client:
            assert (await client.get(f"http://receiver.example:{port}/")).status_code == 200

    asyncio.run(walk())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    async def walk():
        async with server(OK) as (proxy, heads), server(OK) as (port, _):
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy}")
            monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy}")
            async with guarded_client(AddressGuard([LOOPBACK])) as client:
                await client.get(f"http://127.0.0.1:{port}/")
            assert heads == []

    asyncio.run(walk())


def test_a_cookie_of_one_call_is_not_sent_with_the_next():
    async def walk():
        async with server(OK) as (port, heads), guarded_client(AddressGuard([LOOPBACK])) as client:
            for _ in range(2):
                await client.get(f"http://127.0.0.1:{port}/")
            assert "cookie" not in heads[1].lower()

    asyncio.run(walk())


@pytest.mark.parametrize("length", ["Content-Length: 10485760\r\n", ""])
def test_a_body_of_ten_megabytes_is_cut_at_the_limit(length):
    sent = 0

    async def reply(writer):
        nonlocal sent
        writer.write(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        for _ in range(160):
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async def walk():
        async with (
            server(reply) as (port, _),
            guarded_client(AddressGuard([LOOPBACK])) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/") as response,
        ):
            with pytest.raises(TooLarge):
                await read_limited(response, 65536)

    asyncio.run(walk())
    assert sent < 10 * 2**20


def test_a_body_within_the_limit_is_read_whole():
    async def walk():
        async with (
            server(OK) as (port, _),
            guarded_client(AddressGuard([LOOPBACK])) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/") as response,
        ):
            assert await read_limited(response, 2) == b"ok"

    asyncio.run(walk())


def test_a_compressed_body_is_refused_unread():
    body = gzip.compress(b"\0" * 2**20)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"

    async def walk():
        async with (
            server(says(head.encode() + body)) as (port, _),
            guarded_client(AddressGuard([LOOPBACK])) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/") as response,
        ):
            with pytest.raises(httpx2.DecodingError):
                await read_limited(response, 2**30)

    asyncio.run(walk())


async def hang(writer):
    await asyncio.sleep(30)


async def drip_head(writer):
    for letter in "HTTP/1.1 200 OK\r\nX-Long: " + "x" * 1000:
        writer.write(letter.encode())
        await writer.drain()
        await asyncio.sleep(0.05)


async def drip_body(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("reply", [hang, drip_head, drip_body])
def test_a_slow_server_ends_within_the_total_time(reply):
    async def walk():
        guard = AddressGuard([LOOPBACK])
        async with server(reply) as (port, _), guarded_client(guard, total_seconds=0.5) as client:
            with pytest.raises(httpx2.TimeoutException):
                await client.get(f"http://127.0.0.1:{port}/")

    began = time.monotonic()
    asyncio.run(walk())
    assert time.monotonic() - began < 3


def test_a_slow_resolver_ends_within_the_time_to_connect():
    async def resolve(host, port):
        await asyncio.sleep(30)

    async def walk():
        async with guarded_client(AddressGuard(resolve=resolve), connect_seconds=0.2) as client:
            with pytest.raises(httpx2.TimeoutException):
                await client.get("http://receiver.example/")

    asyncio.run(walk())


def test_names_whose_servers_are_silent_keep_nobody_elses_lookups_and_threads_waiting(monkeypatch):
    real, is_over = socket.getaddrinfo, threading.Event()

    def look_up(host, port, **options):
        if host.endswith(".example"):
            is_over.wait(30)
            raise OSError("no answer")
        return real(host, port, **options)

    async def walk():
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        hanging = [asyncio.create_task(addresses.resolve(f"{n}.example", 80)) for n in range(200)]
        await asyncio.sleep(0)
        began = time.monotonic()
        assert "127.0.0.1" in await addresses.resolve("localhost", 80)
        await asyncio.to_thread(time.sleep, 0)
        assert time.monotonic() - began < 2
        for task in hanging:
            task.cancel()
        more = [asyncio.create_task(addresses.resolve(f"{n}.example", 80)) for n in range(100)]
        refused = await asyncio.wait_for(asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED), 5)
        assert all("too many" in str(task.exception()) for task in refused[0])
        is_over.set()
        await asyncio.gather(*more, return_exceptions=True)

    asyncio.run(walk())


@pytest.mark.parametrize("answer", [[], OSError("no such name"), UnicodeError("label too long")])
def test_a_name_without_an_address_is_a_failed_connection(answer):
    async def resolve(host, port):
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def walk():
        async with guarded_client(AddressGuard(resolve=resolve)) as client:
            with pytest.raises(httpx2.NetworkError):
                await client.get("http://receiver.example/")

    asyncio.run(walk())


@pytest.mark.parametrize("text", ["", "SSH-2.0-OpenSSH_9.2\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"])
def test_a_reply_that_is_not_http_is_an_error_of_the_transport(text):
    async def walk():
        async with server(says(text)) as (port, _), guarded_client(AddressGuard([LOOPBACK])) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get(f"http://127.0.0.1:{port}/")

    asyncio.run(walk())


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for receiver.example."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "receiver.example")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("receiver.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + made.public_bytes(encoding))
    return path


def test_tls_is_for_the_name_though_the_connection_goes_to_the_address(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    names = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.sni_callback = lambda _socket, name, _context: names.append(name)

    async def walk():
        guard = AddressGuard([LOOPBACK], resolver(["127.0.0.1"]))
        async with server(OK, tls) as (port, _), guarded_client(guard) as client:
            assert (await client.get(f"https://receiver.example:{port}/")).status_code == 200
            assert names == ["receiver.example"]
            with pytest.raises(httpx2.NetworkError):
                await client.get(f"https://another.example:{port}/")

    asyncio.run(walk())
