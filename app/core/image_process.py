"""ImageProcesses: what strangers send is decoded in child processes with bounded memory and time, never in this one.

A child that dies or hangs is an image that is refused. The children have no environment, no open files but their pipes,
and may write none; image_child.py sets their limits.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Final

import structlog

from app.core.errors import ImageRefused, Overloaded
from app.core.image_child import OK, REPLY, REQUEST, WALL_SECONDS
from app.core.images import MAX_BYTES, CleanImage

log = structlog.get_logger()

CHILDREN: Final = 2
WAITING: Final = 32  # uploads that may wait for a child; they lie in memory
PATIENCE_SECONDS: Final = WALL_SECONDS + 5.0  # the child ends itself first
MAX_REPLY: Final = 80 * 2**20  # bytes: the PNG of the largest picture that is accepted has 64 MiB
COMMAND: Final = (sys.executable, "-I", "-m", "app.core.image_child")


class ImageProcesses:
    """A few child processes that decode uploads; each is started when it is needed, and again when it has died."""

    def __init__(
        self, children: int = CHILDREN, *, patience: float = PATIENCE_SECONDS, command: tuple[str, ...] = COMMAND
    ) -> None:
        self._places = asyncio.Semaphore(children)
        self._waiting = 0
        self._idle: list[Process] = []
        self._patience = patience  # seconds
        self._command = command

    async def clean(self, body: bytes) -> CleanImage:
        """The upload decoded and encoded anew, as `images.clean_image` does. Raises ImageRefused, Overloaded."""
        if len(body) > MAX_BYTES:
            raise ImageRefused(f"The image has {len(body)} bytes; at most {MAX_BYTES} are accepted.")
        if self._waiting >= WAITING:
            raise Overloaded("too many images wait to be decoded; try again", retry_after=2)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            return await self._clean(body)
        finally:
            self._places.release()

    async def close(self) -> None:
        """End the children; those at work too."""
        while self._idle:
            await _end(self._idle.pop())

    async def _clean(self, body: bytes) -> CleanImage:
        child = await self._child()
        is_whole = False
        try:
            async with asyncio.timeout(self._patience):
                mark, width, height, reply = await _ask(child, body)
            is_whole = True
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            log.warning("image.child_lost", error=type(error).__name__, bytes=len(body))
            raise ImageRefused("The image could not be decoded within the limits of time and memory.") from error
        finally:
            # Also where the caller hung up in the middle: what is still in the pipes is nobody else's.
            if is_whole:
                self._idle.append(child)
            else:
                await asyncio.shield(_end(child))
        if mark != OK:
            raise ImageRefused(reply.decode(errors="replace"))
        return CleanImage(reply, width, height)

    async def _child(self) -> Process:
        while self._idle:
            child = self._idle.pop()
            if child.returncode is None:
                return child
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={"MALLOC_ARENA_MAX": "1"},  # none of our secrets
                start_new_session=True,  # it is ended together with what it forked, and by nobody's Ctrl-C
            )
        except OSError as error:
            raise Overloaded("no process can be started to decode the image; try again", retry_after=2) from error


async def _ask(child: Process, body: bytes) -> tuple[bytes, int, int, bytes]:
    """Mark, width, height and body of the child's reply. Raises what a child that died leaves of its pipes."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(REQUEST.pack(len(body)))
    child.stdin.write(body)
    await child.stdin.drain()
    mark, width, height, size = REPLY.unpack(await child.stdout.readexactly(REPLY.size))
    if size > MAX_REPLY:
        raise ValueError(f"a reply of {size} bytes")
    return mark, width, height, await child.stdout.readexactly(size)


async def _end(child: Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.communicate()  # its pipes too are at their end: a loop that is closed with them open fails
