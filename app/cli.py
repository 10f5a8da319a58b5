"""`safelight ...`: one command for the whole service, one for each process, and the API keys."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import click
from redis import Redis
from redis.exceptions import RedisError

from app.core import api_keys, logs
from app.core.api_keys import ApiKey, Scope, check_tenant
from app.core.connections import connect
from app.core.errors import ConfigError, QueueUnavailable, SafelightError
from app.core.limits import set_limits
from app.core.pages import huge_pages
from app.core.settings import Settings, load_settings
from app.embedded_redis import find
from app.models_cli import models
from app.supervisor import CONFIG_EXIT
from app.supervisor import up as supervise


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("safelight"), message="safelight %(version)s")
def commands() -> None:
    """Pictures from diffusion models, on machines of your own. Settings are SAFELIGHT_* in the environment."""


@commands.command()
def up() -> None:
    """Run the whole service in the foreground, by default with a Redis and an object store of its own."""
    sys.exit(supervise(load_settings()))


@commands.command()
def api() -> None:
    """Run the HTTP API."""
    # Imported here: where only the sender is installed there is no FastAPI, and no app.main.
    from app.main import serve  # noqa: PLC0415

    settings = load_settings()
    logs.configure(settings.log_format, "api")
    serve(settings)


@commands.command()
def worker() -> None:
    """Run a worker, which makes the pictures."""
    load_settings()
    # app never imports worker
    os.execve(sys.executable, [sys.executable, "-m", "worker.main"], huge_pages(os.environ))  # noqa: S606


@commands.command()
def sender() -> None:
    """Run the sender, which delivers webhooks."""
    from app.sender import run  # noqa: PLC0415  # the other commands need no HTTP client

    settings = load_settings()
    logs.configure(settings.log_format, "sender")
    run(settings)


@commands.group()
def keys() -> None:
    """Make, list and revoke API keys. Without any, the API is open, and listens on this machine only."""


@keys.command()
@click.option("--name", required=True, help="What the list shows it by.")
@click.option("--tenant", default=api_keys.DEFAULT_TENANT, show_default=True, help="Whose jobs it opens.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may do; may be given again. By default submit and read.",
)
@click.option("--expires-days", type=click.IntRange(1, 3650), help="By default it does not expire.")
def create(name: str, tenant: str, scopes: tuple[str, ...], expires_days: int | None) -> None:
    """Make a key and print it, this once."""
    expires_at = time.time() + expires_days * 86400 if expires_days else None
    with _redis(load_settings()) as redis:
        key, secret = api_keys.create(redis, name, tenant, map(Scope, scopes), expires_at)
    click.echo(secret)
    click.echo(f"key {key.id} ({name}) of tenant {tenant}; it is not shown again", err=True)


@keys.command("list")
def list_() -> None:
    """List all keys, oldest first."""
    with _redis(load_settings()) as redis:
        found, uses = api_keys.list_keys(redis), api_keys.last_uses(redis)
    for key in found:
        used = f"used {_date(uses[key.id])}" if key.id in uses else "never used"
        scopes = ",".join(key.scopes)
        click.echo(f"{key.id}  {_date(key.created_at)}  {_state(key)}  {used}  {key.tenant}  {scopes}  {key.name}")


@keys.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Make a key useless, within a second."""
    with _redis(load_settings()) as redis:
        key = api_keys.revoke(redis, key_id)
    click.echo(f"key {key.id} ({key.name}) is revoked")


commands.add_command(models)


@commands.group()
def limits() -> None:
    """Set and show what a tenant may hand in and have made; without its own the SAFELIGHT_TENANT_* settings hold."""


class _Limit(click.ParamType[float | str]):
    """A number of a kind and within bounds, or the word default."""

    def __init__(self, kind: type[float], least: float = 0, most: float = 1e9) -> None:
        self._kind, self._least, self._most = kind, least, most
        self.name = f"{'WHOLE ' if kind is int else ''}NUMBER|default"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "default":
            return "default"
        try:
            number = self._kind(value)
        except ValueError:
            number = math.nan
        if not self._least <= number <= self._most:
            kind = "whole number" if self._kind is int else "number"
            self.fail(f"{value!r} is neither a {kind} from {self._least:g} to {self._most:g} nor default", param, ctx)
        return number


@limits.command("set")
@click.argument("tenant")
@click.option("--rate", type=_Limit(float), help="Denoiser-seconds it may hand in, a second.")
@click.option("--burst", type=_Limit(float), help="Denoiser-seconds at once; 0: a minute of the rate.")
@click.option("--max-running", type=_Limit(int), help="Jobs in the making.")
@click.option("--max-waiting", type=_Limit(int), help="Jobs that wait.")
@click.option("--max-streams", type=_Limit(int), help="Event streams at each process of the API.")
@click.option("--weight", type=_Limit(float, 0.01, 1000), help="Of its share where several tenants' jobs wait.")
def set_(tenant: str, **given: float | str | None) -> None:
    """Give TENANT limits of its own, at once; `default` takes one back, 0 is no limit."""
    check_tenant(tenant)
    changes = {name: None if value == "default" else float(value) for name, value in given.items() if value is not None}
    with _redis(load_settings()) as redis:
        click.echo(json.dumps(set_limits(redis, tenant, changes)))


@limits.command()
@click.argument("tenant")
def show(tenant: str) -> None:
    """Show the limits that are TENANT's own, as JSON."""
    check_tenant(tenant)
    with _redis(load_settings()) as redis:
        click.echo(json.dumps(set_limits(redis, tenant, {})))


@contextmanager
def _redis(settings: Settings) -> Iterator[Redis]:
    url = settings.redis_url or find(settings.data)
    if not url:
        raise ConfigError(
            f"no Redis runs on {settings.data.resolve()}; start `safelight up` (make run) there first, or set "
            "SAFELIGHT_DATA or SAFELIGHT_REDIS_URL to those of the service"
        )
    try:
        with connect(url) as redis:
            yield redis
    except RedisError as error:
        raise QueueUnavailable("Redis does not answer; check that the service runs") from error


def _state(key: ApiKey) -> str:
    if key.revoked_at:
        return f"revoked {_date(key.revoked_at)}"
    if key.expires_at:
        return f"{'good until' if key.is_good else 'expired'} {_date(key.expires_at)}"
    return "good"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def main() -> None:
    """Run a command; what is wrong goes to stderr in one sentence, with exit code 2 for a setting and 1 otherwise."""
    try:
        commands()
    except ConfigError as error:
        click.echo(f"safelight: {error.message}", err=True)
        sys.exit(CONFIG_EXIT)
    except SafelightError as error:
        click.echo(f"safelight: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
