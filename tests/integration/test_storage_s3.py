"""One contract, kept by the disk and by a real S3 server."""

import asyncio
import socket
import time

import httpx2
import pytest

from app.core.errors import NotFound, StorageUnavailable
from app.core.storage import BucketStorage, job_prefix, object_key, open_storage
from tests.servers import S3_ENVIRONMENT, free_port, s3_server, s3rver

KEY = "jobs/job_abc/1/0.png"


CALLS = {
    "put": lambda storage: storage.put(KEY, b"image", "image/png"),
    "get": lambda storage: storage.get(KEY),
    "get_async": lambda storage: asyncio.run(storage.get_async(KEY)),
    "head": lambda storage: storage.head(KEY),
    "list": lambda storage: list(storage.list()),
    "delete": lambda storage: storage.delete(KEY),
    "delete_prefix": lambda storage: storage.delete_prefix("jobs/job_abc"),
    "delete_prefix_async": lambda storage: asyncio.run(storage.delete_prefix_async("jobs/job_abc")),
    "ping": lambda storage: storage.ping(),
    "ping_async": lambda storage: asyncio.run(storage.ping_async()),
}


def opened(url):
    return open_storage(url, public_url="http://127.0.0.1:8000", secret=b"secret")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in S3_ENVIRONMENT.items():
            patch.setenv(name, value)
        server.make_bucket("images")
        yield server


@pytest.fixture
def bucket(s3, tmp_path):
    return opened(s3.storage_url("images", tmp_path.name))


@pytest.fixture(params=["disk", "bucket"])
def storage(request, tmp_path):
    if request.param == "disk":
        return opened(f"file://{tmp_path}/objects")
    return request.getfixturevalue("bucket")


def test_an_object_comes_back_as_it_went(storage):
    body = bytes(range(256)) * 100
    storage.put(KEY, body, "image/png")
    assert storage.get(KEY) == body
    assert asyncio.run(storage.get_async(KEY)) == body
    assert (storage.head(KEY).key, storage.head(KEY).size) == (KEY, len(body))


def test_an_object_larger_than_one_part_goes_up_whole(storage):
    body = b"x" * (12 * 2**20)
    storage.put(KEY, body, "image/png")
    assert storage.head(KEY).size == len(body)


def test_an_empty_object_is_an_object(storage):
    storage.put(KEY, b"", "image/png")
    assert storage.get(KEY) == b""


def test_a_put_on_the_same_key_replaces(storage):
    storage.put(KEY, b"first, and longer", "image/png")
    storage.put(KEY, b"second", "image/png")
    assert storage.get(KEY) == b"second"


def test_what_is_not_there_is_not_found(storage):
    with pytest.raises(NotFound):
        storage.get(KEY)
    with pytest.raises(NotFound):
        storage.head(KEY)
    with pytest.raises(NotFound):
        asyncio.run(storage.get_async(KEY))


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(storage):
    storage.put(KEY, b"image", "image/png")
    storage.delete(KEY)
    storage.delete(KEY)
    with pytest.raises(NotFound):
        storage.head(KEY)


def test_deleting_a_job_takes_all_its_attempts_and_no_other_job(storage):
    kept = object_key("job_abcd", 1, 0, "png")
    for key in (KEY, object_key("job_abc", 1, 1, "webp"), object_key("job_abc", 2, 0, "jpg"), kept):
        storage.put(key, b"image", "image/png")
    storage.delete_prefix(job_prefix("job_abc"))
    assert [stored.key for stored in storage.list()] == [kept]
    storage.delete_prefix(job_prefix("job_abc"))


def test_deleting_one_attempt_leaves_the_others(storage):
    kept = object_key("job_abc", 2, 0, "png")
    for key in (KEY, kept):
        storage.put(key, b"image", "image/png")
    asyncio.run(storage.delete_prefix_async("jobs/job_abc/1/"))
    assert [stored.key for stored in storage.list(job_prefix("job_abc"))] == [kept]


def test_more_objects_than_one_listing_holds_are_all_deleted(bucket, s3):
    import boto3

    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    prefix = bucket._store.prefix
    for index in range(1001):
        client.put_object(Bucket="images", Key=f"{prefix}/jobs/job_abc/1/{index}.png", Body=b"")
    client.close()
    assert sum(1 for _ in bucket.list()) == 1001
    bucket.delete_prefix(job_prefix("job_abc"))
    assert list(bucket.list()) == []


def test_a_store_that_answers_is_ready(storage):
    storage.ping()
    asyncio.run(storage.ping_async())


def test_a_presigned_url_gives_the_object_with_its_content_type(bucket):
    bucket.put(KEY, b"image", "image/png")
    reply = httpx2.get(bucket.sign(KEY, 60), trust_env=False)
    assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b"image", "image/png")


def test_a_presigned_url_that_has_expired_gives_nothing(tmp_path, monkeypatch):
    with s3rver(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("images")
        bucket = opened(server.storage_url("images", "safelight"))
        bucket.put(KEY, b"image", "image/png")
        soon, later = bucket.sign(KEY, 1), bucket.sign(KEY, 60)
        time.sleep(2.1)  # signed times are whole seconds
        assert httpx2.get(later, trust_env=False).content == b"image"
        refused = httpx2.get(soon, trust_env=False)
        assert (refused.status_code, b"expired" in refused.content) == (403, True)


def test_the_prefix_keeps_two_services_apart_in_one_bucket(bucket, s3):
    bucket.put(KEY, b"image", "image/png")
    assert list(opened(s3.storage_url("images", "another")).list()) == []


def test_a_bucket_that_does_not_exist_is_unavailable(s3):
    lost = opened(s3.storage_url("nowhere"))
    for call in (lost.ping, lambda: lost.put(KEY, b"image", "image/png"), lambda: lost.delete_prefix("jobs/job_abc")):
        with pytest.raises(StorageUnavailable):
            call()


@pytest.fixture
def unreachable(s3):
    return opened(f"s3://images?endpoint=http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_server_that_is_away_is_unavailable_and_the_message_holds_no_address(unreachable, call):
    began = time.monotonic()
    with pytest.raises(StorageUnavailable) as refused:
        call(unreachable)
    assert time.monotonic() - began < 15
    assert "127.0.0.1" not in refused.value.message


def test_a_server_that_hangs_is_unavailable_within_the_bound(s3):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = opened(f"s3://images?endpoint=http://127.0.0.1:{silent.getsockname()[1]}")
        assert isinstance(hanging, BucketStorage)
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            hanging.put(KEY, b"image", "image/png")
        assert time.monotonic() - began < 16
