"""The process that decodes what strangers sent: it reads an upload, writes a picture, and holds nothing it could lose.

Started by image_process.py. It forks for every upload, so that each begins in a fresh process with its own limits, and
what one upload does to a decoder is gone with it. Over the pipes: four bytes of length and the upload come in; a byte
(`OK` or `REFUSED`), three numbers (width, height, length) and the body, or the reason, go out.
"""

import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from typing import Final

from app.core.errors import ImageRefused
from app.core.images import clean_image, load_decoders

MEMORY_BYTES: Final = 640 * 2**20  # of addresses; the largest picture that is accepted takes 400 MiB with Python's own
CPU_SECONDS: Final = 10  # the largest picture takes 2
WALL_SECONDS: Final = 20
REQUEST: Final = struct.Struct(">I")
REPLY: Final = struct.Struct(">cIII")
OK: Final = b"+"
REFUSED: Final = b"-"


def main() -> None:
    """Serve uploads until stdin ends or a child of ours dies: whoever started us starts another."""
    load_decoders()  # once, before the forks
    while True:
        child = os.fork()
        if child == 0:
            _serve_one()
        _, status = os.waitpid(child, 0)
        if status:
            os._exit(1)


def _serve_one() -> None:
    _limit()
    head = sys.stdin.buffer.read(REQUEST.size)
    if len(head) < REQUEST.size:
        os._exit(1)
    (size,) = REQUEST.unpack(head)
    # Armed only now: until an upload comes one waits for as long as it takes. The default action ends the process.
    signal.alarm(WALL_SECONDS)
    try:
        clean = clean_image(sys.stdin.buffer.read(size))
        reply, body = REPLY.pack(OK, clean.width, clean.height, len(clean.body)), clean.body
    except ImageRefused as error:
        body = error.message.encode()
        reply = REPLY.pack(REFUSED, 0, 0, len(body))
    sys.stdout.buffer.write(reply)
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()
    os._exit(0)


def _limit() -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        with suppress(ValueError, OSError):  # macOS refuses to limit addresses
            resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
