"""The settings: the only reader of the environment. A bad one stops the process, naming the variable and the remedy."""

import ipaddress
import os
import re
import secrets
import socket
import tempfile
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.core.errors import ConfigError

PREFIX = "SAFELIGHT_"
BUNDLED_MODELS = Path(__file__).parents[2] / "models" / "models.toml"


def _is_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    return value.rstrip("/")


def _bytes(value: object) -> object:
    """None for auto; 20GB, 512 MiB or a plain number of bytes."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "auto":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower())
    if not found:
        raise ValueError("must be auto or a size, as 20GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


class Settings(BaseSettings):
    """Everything CONTRACT calls a setting; each field is the variable SAFELIGHT_ + its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    redis_url: str | None = Field(None, description="redis://, rediss:// or unix://; unset: an embedded server in DATA")
    storage_url: str | None = Field(None, description="file:///, s3://, gs:// or az://; unset: a folder in DATA")
    public_url: Annotated[str, AfterValidator(_is_url)] | None = Field(
        None, description="what links and webhooks begin with"
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data: Path = Path("./var")
    models: Path = BUNDLED_MODELS
    serve: Annotated[tuple[str, ...], NoDecode] = Field((), description="the models this worker serves; empty: all")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of a forward; more are slower on shared cores")
    max_batch: int | Literal["auto"] = "auto"
    model_memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None, description="bytes of models in the device's memory, as 20GB; auto: most of what it has"
    )
    host_memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None, description="bytes of models that left a GPU in the host's memory; auto: half of what it has"
    )
    max_runs: int = Field(64, ge=1, le=4096, description="images admitted at once")
    spool_memory: int = Field(64 << 20, ge=0, description="bytes of pictures that wait for the store, in memory")
    spool_disk: int = Field(1 << 30, ge=0, description="bytes of them in files beyond that")
    lease_seconds: float = Field(15, ge=1, le=3600)
    grace_seconds: float = Field(60, ge=0, le=3600)
    retention: float = Field(86400, ge=60, description="seconds until a finished job, its objects and its key go")
    tenant_rate: float = Field(0, ge=0, description="denoiser-seconds a second that a tenant may hand in; 0: any")
    tenant_burst: float = Field(0, ge=0, description="denoiser-seconds it may hand in at once; 0: a minute of the rate")
    tenant_max_running: int = Field(0, ge=0, description="jobs of a tenant in the making; 0: any number")
    tenant_max_waiting: int = Field(0, ge=0, description="jobs of a tenant that wait; 0: any number")
    tenant_max_streams: int = Field(0, ge=0, description="event streams of a tenant at one API process; 0: any number")
    max_wait: float = Field(
        86400, ge=0, description="seconds a new job may be expected to wait before jobs are refused; 0: any time"
    )
    upload_retention: float = Field(86400, ge=60, description="seconds until an upload goes that no job uses")
    image_allow: Annotated[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode] = Field(
        (), description="networks that pictures may be fetched from though they are not public"
    )
    api_key: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    webhook_allow: Annotated[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode] = ()
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    metrics_port: int = Field(0, ge=0, le=65535)
    log_format: Literal["auto", "json", "console"] = "auto"
    failpoints: str = Field("", description="for tests, see core/failpoints.py; leave it unset")
    url: Annotated[str, AfterValidator(_is_url)] = Field(
        "http://127.0.0.1:8000", description="the service the CLI asks"
    )

    @field_validator("serve", "webhook_allow", "image_allow", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("max_batch")
    @classmethod
    def _is_positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be auto or a number of rows from 1")
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        if value and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith("whsec_"):
            raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")
        return value

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        if self.api_key and len(self.api_key.get_secret_value()) < 16:
            raise ValueError("SAFELIGHT_API_KEY must have at least 16 characters")
        return self

    @property
    def base_url(self) -> str:
        """What links begin with: SAFELIGHT_PUBLIC_URL, else the address we listen on; of all, the machine's own."""
        if self.public_url:
            return self.public_url
        host = _own_address() if self.is_unspecified else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def storage(self) -> str:
        """The object store's URL; a folder of DATA by default."""
        return self.storage_url or (self.data.resolve() / "objects").as_uri()

    @property
    def is_loopback(self) -> bool:
        """Whether the API listens for this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """Whether the API listens on all addresses, so that none of them is its own."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    @property
    def retention_ms(self) -> int:
        return int(self.retention * 1000)

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)


@cache
def _own_address() -> str:
    """The address of the interface that leads outside; that of loopback where none does."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing, and nobody has that address (RFC 5737)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def load_settings() -> Settings:
    """Read the environment. Raises ConfigError naming the variable, what is wrong with it and what it may be."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper() if first["loc"] else PREFIX + "*"
        about = Settings.model_fields[str(first["loc"][0])].description if first["loc"] else None
        remedy = f" ({about})" if about else ""
        raise ConfigError(f"{name}: {first['msg']}{remedy}; correct it or unset it") from error


def redis_url(settings: Settings) -> str:
    """Where Redis is. Raises ConfigError where no URL is set: only `safelight up` starts one of its own."""
    if not settings.redis_url:
        raise ConfigError("SAFELIGHT_REDIS_URL is not set; set it, or use `safelight up`, which brings its own Redis")
    return settings.redis_url


def webhook_secret(settings: Settings) -> str:
    """The secret that signs webhooks, `whsec_...`; generated into DATA once if unset."""
    if settings.webhook_secret:
        return settings.webhook_secret.get_secret_value()
    return _kept(settings.data / "webhook_secret", lambda: "whsec_" + b64encode(secrets.token_bytes(32)).decode())


def url_secret(settings: Settings) -> str:
    """The secret that signs the disk store's URLs, generated into its folder once, where all processes find it.

    None other would do: tenants are shown the webhook secret. Empty where the store signs by itself.
    """
    parts = urlsplit(settings.storage)
    if parts.scheme != "file" or not parts.path.startswith("/"):
        return ""
    return _kept(Path(unquote(parts.path)) / ".url_secret", lambda: secrets.token_urlsafe(32), "SAFELIGHT_STORAGE_URL")


def _kept(file: Path, make: Callable[[], str], setting: str = "SAFELIGHT_DATA") -> str:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _write_once(file, make())
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot write {file}: {error.strerror}; name a writable folder") from error


def _write_once(file: Path, text: str) -> None:
    # A link appears whole or not at all, and only for the first of several processes.
    descriptor, part = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text + "\n")
    try:
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        Path(part).unlink()
