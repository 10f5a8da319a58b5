import asyncio
import os
from urllib.parse import parse_qs, urlsplit

import pytest

from app.core.errors import ConfigError, Forbidden, NotFound, StorageUnavailable
from app.core.storage import DiskStorage, digest, is_key, job_prefix, object_key, open_storage

KEY = "jobs/job_abc/3/0.png"


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def disk(tmp_path, clock):
    return open_storage(
        f"file://{tmp_path}/objects",
        public_url="http://127.0.0.1:8000/",
        secret=b"a secret of 32 bytes, or thereby",
        clock=clock,
    )


def opened(url):
    return open_storage(url, public_url="http://127.0.0.1:8000", secret=b"secret")


def token_of(url):
    return parse_qs(urlsplit(url).query)["token"][0]


def test_a_key_is_made_of_ids_and_numbers():
    assert object_key("job_abc", 3, 0, "png") == KEY
    assert KEY.startswith(job_prefix("job_abc") + "/")


@pytest.mark.parametrize("extension", ["svg", "html", "png/../x", ""])
def test_an_extension_that_we_do_not_write_makes_no_key(extension):
    with pytest.raises(AssertionError):
        object_key("job_abc", 3, 0, extension)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/jobs/a/1/0.png",
        "jobs/../1/0.png",
        "jobs/a/1/../0.png",
        "jobs/a/1/0.png/",
        "jobs/a/1/0.png\n",
        "jobs/a/1/0.svg",
        "jobs/a/1/0.PNG",
        "jobs/a/x/0.png",
        "jobs/a/\u0661/0.png",  # an Arabic digit one
        "jobs/\u00e4/1/0.png",
        "jobs//1/0.png",
        "jobs/a%2f/1/0.png",
        "jobs/a/1/0.png\x00",
        "jobs/" + "a" * 65 + "/1/0.png",
        "../secret",
    ],
)
def test_what_is_no_key_of_ours_is_refused(text, disk):
    assert not is_key(text)
    with pytest.raises(Forbidden):
        disk.verify(text, "token")
    with pytest.raises(NotFound):
        disk.get(text)


def test_the_digest_is_the_sha256_in_hex():
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_signed_url_of_the_disk_store_names_our_own_route_and_verifies(disk):
    url = disk.sign(KEY, 900)
    assert url.startswith(f"http://127.0.0.1:8000/v1/files/{KEY}?token=")
    disk.verify(KEY, token_of(url))


def test_a_signed_url_expires(disk, clock):
    token = token_of(disk.sign(KEY, 900))
    clock.now += 899
    disk.verify(KEY, token)
    clock.now += 1
    with pytest.raises(Forbidden):
        disk.verify(KEY, token)


def test_a_token_opens_only_its_own_key(disk):
    with pytest.raises(Forbidden):
        disk.verify("jobs/job_abc/3/1.png", token_of(disk.sign(KEY, 900)))


def test_a_token_changed_at_any_place_is_refused(disk):
    token = token_of(disk.sign(KEY, 900))
    for place, letter in enumerate(token[:-1]):  # the last letter of base64 holds bits that mean nothing
        other = "A" if letter != "A" else "B"
        with pytest.raises(Forbidden):
            disk.verify(KEY, token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize("token", ["", ".", "a.b", "\u00e4.\u00e4", "x" * 10_000])
def test_a_token_of_another_form_is_refused(disk, token):
    with pytest.raises(Forbidden):
        disk.verify(KEY, token)


def test_a_token_of_another_secret_is_refused(disk, tmp_path):
    stranger = DiskStorage(tmp_path / "objects", "http://127.0.0.1:8000", b"another secret", lambda: 1_000_000.0)
    with pytest.raises(Forbidden):
        disk.verify(KEY, token_of(stranger.sign(KEY, 900)))


def test_an_empty_secret_is_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        DiskStorage(tmp_path, "http://127.0.0.1:8000", b"", lambda: 0.0)


def test_a_file_url_may_hold_any_character_of_a_path(tmp_path):
    folder = tmp_path / "my pictures, 100 %"
    opened(folder.as_uri()).put(KEY, b"image", "image/png")
    assert (folder / KEY).read_bytes() == b"image"


def test_deleting_a_job_leaves_no_folder_nor_a_killed_writers_rest(disk, tmp_path):
    disk.put(KEY, b"image", "image/png")
    (tmp_path / "objects" / f"{KEY}#1").write_bytes(b"half an im")  # where obstore writes before it renames
    assert [stored.key for stored in disk.list()] == [KEY]
    disk.delete_prefix(job_prefix("job_abc"))
    assert list((tmp_path / "objects" / "jobs").iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "/", "jobs", "jobs/", "jobs/..", "jobs/a/..", "jobs/a/1/0.png", "../x"])
def test_only_a_job_or_an_attempt_is_deleted_whole(disk, prefix):
    disk.put(KEY, b"image", "image/png")
    with pytest.raises(ValueError, match="prefix"):
        disk.delete_prefix(prefix)
    assert disk.get(KEY) == b"image"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_unavailable(disk, tmp_path):
    (tmp_path / "objects").chmod(0o500)
    try:
        with pytest.raises(StorageUnavailable) as refused:
            disk.put(KEY, b"image", "image/png")
        assert str(tmp_path) not in refused.value.message
        with pytest.raises(StorageUnavailable):
            disk.ping()
    finally:
        (tmp_path / "objects").chmod(0o700)


def test_a_folder_that_vanished_is_unavailable(disk, tmp_path):
    (tmp_path / "objects").rmdir()
    with pytest.raises(StorageUnavailable):
        asyncio.run(disk.ping_async())


def test_a_put_that_meets_a_file_where_a_folder_should_be_is_unavailable(disk, tmp_path):
    (tmp_path / "objects" / "jobs").write_text("in the way")
    with pytest.raises(StorageUnavailable) as refused:
        disk.put(KEY, b"image", "image/png")
    assert str(tmp_path) not in refused.value.message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/safelight",
        "file://relative/path",
        "file:relative",
        "file:///dev/null/objects",
        "file:///tmp/x?endpoint=y",
        "ftp://bucket",
        "s3://",
        "s3:///prefix",
        "s3://bucket with spaces",
        "s3://[bucket",
        "s3://bucket/../up",
        "s3://bucket?endpont=http://127.0.0.1:9000",
        "s3://bucket?endpoint=127.0.0.1:9000",
        "s3://bucket?endpoint=http://127.0.0.1:port",
        "s3://bucket?endpoint=",
        "s3://bucket?public_endpoint=ftp://host",
        "s3://bucket#fragment",
        "gs://bucket?region=us-east-1",
        "az://container",
    ],
)
def test_a_bad_url_stops_the_process_and_names_the_variable(url, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match="SAFELIGHT_STORAGE_URL"):
        opened(url)


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket", "s3://bucket?endpoint=http://key:hunter2@127.0.0.1:9000"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as refused:
        opened(url)
    assert "hunter2" not in refused.value.message


def test_urls_are_signed_for_the_public_endpoint(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://elsewhere.invalid")
    url = opened("s3://bucket/a/b?endpoint=http://minio:9000&public_endpoint=https://files.example.org").sign(KEY, 600)
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.path) == ("https", "files.example.org", f"/bucket/a/b/{KEY}")
    assert parse_qs(parts.query)["X-Amz-Expires"] == ["600"]
