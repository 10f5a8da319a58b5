"""Decoding in child processes: what a child does to itself is a refused image. FUZZ_SECONDS=300 runs the large form."""

import asyncio
import contextlib
import io
import os
import random
import secrets
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from app.core import image_process
from app.core.errors import ImageRefused, Overloaded
from app.core.image_process import ImageProcesses
from app.core.images import clean_image
from tests.unit.test_images import bomb_png, chunk, encoded, picture, png

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", secrets.randbits(32)))


def run(talk, **options):
    """Run `talk(images)` against child processes, none of which is left over."""

    async def main():
        images = ImageProcesses(**options)
        try:
            return await talk(images)
        finally:
            await images.close()

    return asyncio.run(main())


def child_that(code):
    """A child that reads an upload of four bytes and then does what `code` says."""
    return sys.executable, "-I", "-c", f"import os, sys, time\nsys.stdin.buffer.read(8)\n{code}"


def resident(pid):
    """The most memory a process has held, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_child_gives_what_the_same_code_gives_here(kind):
    upload = encoded(picture(), kind)
    assert run(lambda images: images.clean(upload)) == clean_image(upload)


def test_a_refusal_comes_with_its_reason_and_the_child_lives_on():
    async def talk(images):
        for upload, reason in [(b"GIF89a", "neither PNG"), (bomb_png(9000), "pixels"), (b"", "neither PNG")]:
            with pytest.raises(ImageRefused, match=reason):
                await images.clean(upload)
        await images.clean(encoded(picture()))
        return len(images._idle)

    assert run(talk) == 1


@pytest.mark.parametrize(
    "code",
    [
        "os._exit(1)",
        "os.kill(os.getpid(), 9)",
        "os.abort()",
        "print('no reply of ours')",
        "time.sleep(60)",
        "while 1: 0",
    ],
)
def test_a_child_that_dies_hangs_or_babbles_is_a_refused_image(code):
    async def talk(images):
        began = time.monotonic()
        with pytest.raises(ImageRefused, match="within the limits"):
            await images.clean(b"four")
        assert time.monotonic() - began < 3
        assert images._idle == []

    run(talk, command=child_that(code), patience=0.5)


def test_a_reply_larger_than_any_picture_is_not_read():
    code = f"sys.stdout.buffer.write({struct.pack('>cIII', b'+', 1, 1, 2**31)!r}); sys.stdout.flush(); time.sleep(60)"

    async def talk(images):
        with pytest.raises(ImageRefused):
            await images.clean(b"four")

    run(talk, command=child_that(code))


def test_after_a_child_was_killed_the_next_image_gets_another():
    async def talk(images):
        upload = encoded(picture())
        await images.clean(upload)
        [child] = images._idle
        os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
        await images.clean(upload)
        assert images._idle != [child]

    run(talk)


def test_a_caller_that_hangs_up_leaves_no_reply_for_the_next():
    async def talk(images):
        task = asyncio.create_task(images.clean(encoded(picture(600, 600))))
        await asyncio.sleep(0.3)  # the child is up, or about to be
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        clean = await images.clean(encoded(picture(8, 4)))
        assert (clean.width, clean.height) == (8, 4)

    run(talk, children=1)


def outcome(code):
    """The return code of a process that runs `code` within a child's limits; negative: the signal that ended it."""
    start = "import os\nfrom app.core import image_child as child\nchild.CPU_SECONDS = 1\nchild._limit()\n"
    command = [sys.executable, "-I", "-c", start + code]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL, timeout=20).returncode


def test_memory_and_time_of_a_child_are_bounded_by_the_system():
    assert outcome("try: bytearray(700 * 2**20)\nexcept MemoryError: os._exit(3)") == 3
    assert outcome("while 1: 0") in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_child_has_no_environment_and_may_write_no_file(tmp_path):
    seen = tmp_path / "seen"

    async def talk(images):
        with pytest.raises(ImageRefused):
            await images.clean(b"four")

    run(talk, command=child_that(f"open({str(seen)!r}, 'w').write(repr(dict(os.environ)))"))
    assert set(eval(seen.read_text())) <= {"MALLOC_ARENA_MAX", "LC_CTYPE"}
    assert outcome(f"os.write(os.open({str(seen)!r}, os.O_WRONLY | os.O_TRUNC), b'x')") == 1
    assert seen.read_text() == ""


def test_the_largest_picture_that_is_accepted_fits_and_its_memory_is_given_back():
    upload = encoded(Image.effect_noise((4000, 4000), 30).convert("RGBA"), "WEBP", quality=60, method=0)

    async def talk(images):
        clean = await images.clean(upload)
        assert (clean.width, clean.height) == (4000, 4000)
        return resident(images._idle[0].pid)

    kept = run(talk)
    print(f"a child that waits holds {kept} KiB after {len(upload)} bytes of 16 million pixels")
    assert kept < 60_000


def test_more_uploads_than_may_wait_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(image_process, "WAITING", 2)

    async def talk(images):
        calls = [images.clean(encoded(picture())) for _ in range(6)]
        return await asyncio.gather(*calls, return_exceptions=True)

    replies = run(talk, children=1)
    assert sum(isinstance(reply, Overloaded) for reply in replies) == 3
    assert sum(isinstance(reply, image_process.CleanImage) for reply in replies) == 3


def seeds():
    """Real files of all kinds that Pillow writes, and files made to hurt."""
    found = []
    image = picture(40, 30)
    Image.init()
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK"):
            with contextlib.suppress(Exception):
                found.append(encoded(image.convert(mode), kind))
    exif = Image.Exif()
    exif[0x0112] = 6
    found += [encoded(image, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")]
    found += [encoded(image, "PNG") + b"PK\x03\x04", b"\x89PNG\r\n\x1a\n" + encoded(image, "GIF"), bomb_png(9000)]
    found += [png(2**31 - 1, 1, chunk(b"IDAT", zlib.compress(b""))), png(1, 1), b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"]
    return found


def spoiled(rng, upload, others):
    """The upload, with a few things done to it that files suffer and attackers do."""
    data = bytearray(upload)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[rng.randrange(len(data) + 1) :][: rng.randrange(64)]
            case 3:
                data[place : place + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0"]
                )
            case 4:
                data[place:] = rng.choice(others)[rng.randrange(64) :]
            case 5:
                _with_true_sums(data)
    return bytes(data[: 2**20])


def _with_true_sums(data):
    """Right the checksums of a PNG's chunks, so that what was changed is read."""
    place = 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + size
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4


@pytest.mark.timeout(120 + 2 * FUZZ_SECONDS)
def test_whatever_is_uploaded_comes_out_clean_or_is_refused_in_bounded_memory():
    print(f"FUZZ_SEED={SEED}")
    rng, files = random.Random(SEED), seeds()
    counts, most, lost = {"clean": 0, "refused": 0}, 0, 0

    async def one(images, upload):
        nonlocal lost
        try:
            clean = await images.clean(upload)
        except ImageRefused as error:
            counts["refused"] += 1
            lost += "within the limits" in error.message
        else:
            counts["clean"] += 1
            image = Image.open(io.BytesIO(clean.body))
            image.load()
            assert (image.format, image.size, image.info) == ("PNG", (clean.width, clean.height), {})

    async def talk(images):
        nonlocal most
        for upload in files:
            await one(images, upload)
        until = time.monotonic() + FUZZ_SECONDS
        while time.monotonic() < until:
            batch = [spoiled(rng, rng.choice(files), files) for _ in range(16)]
            await asyncio.gather(*(one(images, upload) for upload in batch))
            most = max([most, *(resident(child.pid) for child in images._idle)])

    run(talk)
    print(
        f"{len(files)} files and their spoiled copies in {FUZZ_SECONDS:.0f} s: {counts}, {lost} children lost,", end=" "
    )
    print(f"a child that waits held {most} KiB at most")
    assert counts["clean"] >= 8
    assert counts["refused"] >= 50
    assert most < 60_000
