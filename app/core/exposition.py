"""A process's own metrics port, and the address by which Prometheus reaches it."""

import socket
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, start_http_server

from app.core.errors import ConfigError
from app.core.settings import Settings


def serve_metrics(settings: Settings, registry: CollectorRegistry) -> str:
    """Serve `registry` on SAFELIGHT_METRICS_PORT (0: any free one); its host:port. Raises ConfigError."""
    address = "127.0.0.1" if settings.is_loopback else "0.0.0.0"  # noqa: S104  # containers are scraped from outside
    try:
        server, _ = start_http_server(settings.metrics_port, address, registry)
    except OSError as error:
        raise ConfigError(
            f"SAFELIGHT_METRICS_PORT: cannot listen on {settings.metrics_port} ({error.strerror}); choose another, or 0"
        ) from error
    host = address if settings.is_loopback else _own_address(settings.redis_url or "")
    return f"{host}:{server.server_port}"


def _own_address(redis_url: str) -> str:
    """The address of the interface that leads to Redis: a cluster resolves no host names of its pods."""
    parts = urlsplit(redis_url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname or "localhost", parts.port or 6379))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
