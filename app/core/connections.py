"""Redis clients: short timeouts and no automatic retries, because redis-py repeats writes whose reply was lost."""

from typing import Any

import structlog
from redis import Redis
from redis.asyncio import BlockingConnectionPool as AsyncBlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from app.core.errors import ConfigError

log = structlog.get_logger()
TIMEOUT = 5.0  # seconds a command may take
POOL = 64
# A managed Redis' word of its maintenance. With it on, redis-py does not look whether an idle connection is still open,
# so after a restart of Redis each one fails a command.
NO_MAINTENANCE = MaintNotificationsConfig(enabled=False)


def connect(url: str, *, timeout: float = TIMEOUT, decode: bool = True) -> Redis:
    """A synchronous client of its own pool; strings are decoded unless RQ is to use it."""
    return Redis.from_url(
        url,
        decode_responses=decode,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=15,
        maint_notifications_config=NO_MAINTENANCE,
    )


def connect_async(url: str, *, timeout: float = TIMEOUT) -> AsyncRedis:
    """An asynchronous client; a caller waits at most a second for a free connection."""
    pool = AsyncBlockingConnectionPool.from_url(
        url,
        max_connections=POOL,
        timeout=1,
        decode_responses=True,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=AsyncRetry(NoBackoff(), 0),
        health_check_interval=15,
        maint_notifications_config=NO_MAINTENANCE,
    )
    pool.connection_class = _steady(pool.connection_class)
    return AsyncRedis.from_pool(pool)  # so that closing the client closes the pool


def _steady(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    """The class, with its one gap closed: uvloop raises RuntimeError from a write to what was closed just before."""

    class Steady(connection_class):  # type: ignore[valid-type, misc]  # redis-py picks the class by the URL
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:
                raise RedisConnectionError("the connection was closed") from error

    return Steady


def check_server(redis: Redis) -> None:
    """Say what a server cannot keep. Raises ConfigError for one that may forget jobs, and what redis-py raises."""
    # INFO, not CONFIG: managed servers forbid that one.
    info: Any = redis.info("default")
    if int(info["redis_version"].partition(".")[0]) < 7:
        raise ConfigError(f"SAFELIGHT_REDIS_URL: it is Redis {info['redis_version']}; Safelight needs 7.0 or newer")
    if (policy := info["maxmemory_policy"]) != "noeviction":
        raise ConfigError(
            f"SAFELIGHT_REDIS_URL: its maxmemory-policy is {policy}, which throws jobs away; set it to noeviction"
        )
    if not info["aof_enabled"]:
        log.warning(
            "redis.not_durable", remedy="set appendonly yes and appendfsync always: a crash loses accepted jobs"
        )
    if not info["maxmemory"]:
        log.warning(
            "redis.unbounded", remedy="set maxmemory: only from it are new jobs refused before the memory is full"
        )
