"""Tasks that run as long as their process, and how they end."""

import asyncio

import structlog

log = structlog.get_logger()
AGAIN_SECONDS = 0.5


async def stop(*tasks: "asyncio.Task[None]") -> None:
    """Cancel tasks and wait for their end; what one had failed of is logged, so that the others are ended too.

    A library's timeout that passes at the same moment may swallow a cancellation (asyncio.wait_for of Python 3.11
    does): it is repeated.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            log.error("chore.failed", chore=task.get_name(), exc_info=error)
