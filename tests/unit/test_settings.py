"""Settings: what follows from them."""

import ipaddress
from urllib.parse import urlsplit

import pytest

from app.core.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_links_name_the_machine_where_it_listens_on_all_addresses(host):
    found = urlsplit(Settings(host=host, port=8123).base_url)
    assert not ipaddress.ip_address(found.hostname).is_unspecified
    assert found.port == 8123


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"host": "0.0.0.0", "public_url": "https://pictures.example/"}, "https://pictures.example"),
        ({"host": "10.1.2.3"}, "http://10.1.2.3:8000"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"host": "localhost"}, "http://localhost:8000"),
    ],
)
def test_links_begin_with_the_public_url_or_the_one_address(settings, url):
    assert Settings(**settings).base_url == url
