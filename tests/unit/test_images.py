import io
import resource
import struct
import time
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from app.core.errors import ImageRefused
from app.core.images import MAX_BYTES, clean_image

FORMATS = ["PNG", "JPEG", "WEBP"]


def picture(width=48, height=32, mode="RGB"):
    noise = Image.effect_noise((width, height), 80)
    return noise.convert(mode)


def encoded(image, kind="PNG", **options):
    body = io.BytesIO()
    image.save(body, kind, **options)
    return body.getvalue()


def decoded(clean):
    image = Image.open(io.BytesIO(clean.body))
    image.load()
    return image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def bomb_png(side):
    squeeze = zlib.compressobj(9)
    row = b"\0" * (3 * side + 1)
    data = b"".join([squeeze.compress(row) for _ in range(side)]) + squeeze.flush()
    return png(side, side, chunk(b"IDAT", data))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_ordinary_picture_comes_out_as_an_rgb_png_of_its_size(kind):
    clean = clean_image(encoded(picture(), kind))
    image = decoded(clean)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 32))
    assert (clean.width, clean.height) == (48, 32)


def test_a_lossless_picture_keeps_every_pixel():
    image = picture()
    assert decoded(clean_image(encoded(image))).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_of_png_becomes_rgb_or_rgba(mode):
    image = Image.new("I;16", (8, 8), 40_000) if mode == "I;16" else picture(8, 8).convert(mode)
    assert decoded(clean_image(encoded(image))).mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")


def test_a_cmyk_jpeg_becomes_rgb():
    assert decoded(clean_image(encoded(picture(mode="CMYK"), "JPEG"))).mode == "RGB"


def test_a_picture_lying_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    clean = clean_image(encoded(picture(48, 32), "JPEG", exif=exif))
    assert (clean.width, clean.height) == (32, 48)


@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_and_profiles_do_not_come_through(kind):
    exif = Image.Exif()
    exif[0x010E] = "SECRET-PLACE"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    upload = encoded(picture(), kind, exif=exif, icc_profile=profile)
    assert b"SECRET-PLACE" in upload
    image = decoded(clean_image(upload))
    assert b"SECRET-PLACE" not in clean_image(upload).body
    assert image.info == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tail", [b"<script>alert(1)</script>", b"PK\x03\x04 a zip begins here", b"%PDF-1.7"])
def test_what_hangs_behind_a_picture_does_not_come_through(kind, tail):
    upload = encoded(picture(), kind) + tail
    assert tail not in clean_image(upload).body


@pytest.mark.parametrize(
    "upload",
    [
        b"",
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"8BPS\x00\x01",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"II*\x00",
        b"<html>\x89PNG\r\n\x1a\n",
        b"RIFF\x00\x00\x00\x00AVI ",
    ],
)
def test_another_format_is_refused(upload):
    with pytest.raises(ImageRefused, match="neither PNG, JPEG nor WebP"):
        clean_image(upload)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_a_real_picture_of_another_format_is_refused(kind):
    with pytest.raises(ImageRefused):
        clean_image(encoded(picture(), kind))


def test_no_other_format_that_pillow_reads_is_ever_opened(monkeypatch):
    Image.init()
    others = sorted(set(Image.OPEN) - {"PNG", "JPEG", "MPO", "WEBP"})
    assert len(others) > 35
    opened, files = [], []
    for kind in others:
        for mode in ("RGB", "P", "1"):
            with suppress(Exception):  # not every format is written, or in every mode
                files.append(encoded(picture(mode=mode), kind))
    assert len(files) > 30
    for kind in others:
        monkeypatch.setitem(Image.OPEN, kind, (lambda *_, kind=kind: opened.append(kind), None))
    for upload in files:
        for magic in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"):
            with pytest.raises(ImageRefused):
                clean_image(magic + upload)
    assert opened == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_under_another_formats_name_is_refused(kind):
    magic = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF\x00\x00\x00\x00WEBP"}[kind]
    with pytest.raises(ImageRefused):
        clean_image(magic + encoded(picture(), "GIF"))


@pytest.mark.parametrize("side", [9000, 13000])
def test_a_bomb_is_refused_by_its_header(side):
    upload = bomb_png(side)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ImageRefused, match="pixels"):
        clean_image(upload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; decoded it would be 240 MB
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (8193, 1), (1, 8193), (4001, 4000)])
def test_a_header_of_too_many_pixels_is_refused(size):
    with pytest.raises(ImageRefused):
        clean_image(png(*size, chunk(b"IDAT", zlib.compress(b""))))


def test_a_webp_bomb_of_a_few_bytes_is_refused():
    upload = encoded(Image.new("RGB", (8000, 8000)), "WEBP", lossless=True, method=0)
    assert len(upload) < 100
    with pytest.raises(ImageRefused, match="pixels"):
        clean_image(upload)


def test_a_file_of_too_many_bytes_is_refused_unread():
    with pytest.raises(ImageRefused, match="bytes"):
        clean_image(b"\x89PNG\r\n\x1a\n" + bytes(MAX_BYTES))


def test_a_text_chunk_that_inflates_without_end_is_refused():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 * 2**20), 9))
    row = zlib.compress(b"\0" * 4)
    with pytest.raises(ImageRefused):
        clean_image(png(1, 1, text, chunk(b"IDAT", row)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind):
    frames = [picture(), picture()]
    with pytest.raises(ImageRefused, match="animated"):
        clean_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_phones_jpeg_of_several_pictures_gives_its_first():
    upload = encoded(picture(48, 32), "MPO", save_all=True, append_images=[picture(16, 16)])
    assert (clean_image(upload).width, clean_image(upload).height) == (48, 32)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused(kind, share):
    upload = encoded(picture(200, 200), kind)
    with pytest.raises(ImageRefused):
        clean_image(upload[: int(len(upload) * share)])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FORMATS), st.data())
def test_a_picture_with_bytes_changed_is_decoded_or_refused_and_nothing_else(kind, data):
    upload = bytearray(encoded(Image.radial_gradient("L").resize((24, 24)), kind))
    for place in data.draw(st.lists(st.integers(12, len(upload) - 1), min_size=1, max_size=8)):
        upload[place] = data.draw(st.integers(0, 255))
    try:
        clean = clean_image(bytes(upload))
    except ImageRefused:
        return
    assert decoded(clean).size == (clean.width, clean.height)
