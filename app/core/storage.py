"""Storage: where the bytes of finished images live, an S3-like bucket or the local disk, behind one set of verbs.

Keys are made here from ids and numbers only, never from anything a caller wrote:
`jobs/{job_id}/{attempt}/{index}.{extension}`, `uploads/{upload_id}/{chance}.png`. URLs are signed when asked for, never
stored.
"""

import hashlib
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from asyncio import to_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import obstore
from itsdangerous import BadSignature, URLSafeSerializer
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from app.core.errors import ConfigError, Forbidden, NotFound, SafelightError, StorageUnavailable

if TYPE_CHECKING:  # obstore's type names do not exist at run time
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config

CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}  # by extension

_JOB_ID = r"[A-Za-z0-9_-]{1,64}"
_KEY = re.compile(
    rf"jobs/{_JOB_ID}/[0-9]{{1,19}}/[0-9]{{1,4}}\.({'|'.join(CONTENT_TYPES)})|uploads/{_JOB_ID}/[0-9a-f]{{16}}\.png",
    re.ASCII,
)
_PREFIX = re.compile(rf"jobs/{_JOB_ID}(/[0-9]{{1,19}})?", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", re.ASCII)

# One call ends within 15 s: no retry begins after 5 s, and a try lasts 10 s at most. A hang is not retried, since it
# has used the 5 s up; a refused connection or a 503 is, three times.
_REQUEST_TIMEOUT = timedelta(seconds=10)
_CONNECT_TIMEOUT = timedelta(seconds=3)
_RETRY: "RetryConfig" = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
}
# What obstore raises: its own tree, and Python's FileNotFoundError, NotImplementedError (disk) and ValueError (a path).
_FAILURES = (BaseError, OSError, NotImplementedError, ValueError)

BucketStore = S3Store | GCSStore | AzureStore


@dataclass(frozen=True, slots=True)
class StoredObject:
    key: str
    size: int  # bytes
    modified: datetime


def object_key(job_id: str, attempt: int, index: int, extension: str) -> str:
    """The key of image `index` (0-based) that attempt `attempt` of a job made."""
    key = f"jobs/{job_id}/{attempt}/{index}.{extension}"
    assert is_key(key), f"{key!r} is no storage key"
    return key


def upload_key(upload_id: str, chance: str) -> str:
    """The key of an upload's picture; `chance` is 16 hex digits, so that no object is ever written over."""
    key = f"uploads/{upload_id}/{chance}.png"
    assert is_key(key), f"{key!r} is no storage key"
    return key


def job_prefix(job_id: str) -> str:
    """What the keys of all attempts of a job begin with."""
    return f"jobs/{job_id}"


def attempt_prefix(job_id: str, attempt: int) -> str:
    """What the keys of one attempt begin with."""
    return f"jobs/{job_id}/{attempt}"


def is_key(text: str) -> bool:
    """Whether `text` has exactly a form that we give; anything else names no object of ours."""
    return _KEY.fullmatch(text) is not None


def content_type_of(key: str) -> str:
    return CONTENT_TYPES[key.rpartition(".")[2]]


def digest(body: bytes) -> str:
    """The sha256 of an object, in hex."""
    return hashlib.sha256(body).hexdigest()


class Storage(ABC):
    """What both kinds of store do. The plain verbs block (worker threads); the `_async` ones are the API's.

    Raises NotFound for an object that is not there, StorageUnavailable for a store that fails, refuses us or hangs.
    """

    def __init__(self, store: BucketStore | LocalStore) -> None:
        self._store = store

    @abstractmethod
    def put(self, key: str, body: bytes, content_type: str) -> None:
        """Store an object whole or not at all, and look that it is there with its full size."""

    async def put_async(self, key: str, body: bytes, content_type: str) -> None:
        await to_thread(self.put, key, body, content_type)

    @abstractmethod
    def sign(self, key: str, expires_seconds: int) -> str:
        """A URL that lets anyone who holds it GET this one object, until it expires."""

    def get(self, key: str) -> bytes:
        with _store_errors(_missing(key)):
            return bytes(self._store.get(_known(key)).bytes())

    async def get_async(self, key: str) -> bytes:
        with _store_errors(_missing(key)):
            return bytes(await (await self._store.get_async(_known(key))).bytes_async())

    def head(self, key: str) -> StoredObject:
        with _store_errors(_missing(key)):
            return _stored(self._store.head(_known(key)))

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is what was wanted."""
        with _store_errors(_missing(key)):
            try:
                self._store.delete(_known(key))
            except FileNotFoundError:  # raised by the disk, Google and Azure, not by S3
                return

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Every object whose key begins with the whole path segments of `prefix`, in no promised order."""
        with _store_errors(_unavailable()):
            for chunk in self._store.list(prefix or None):
                yield from map(_stored, chunk)

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object of a job, or of one attempt (`jobs/{job_id}` or `jobs/{job_id}/{attempt}`)."""
        known = _known_prefix(prefix)
        with _store_errors(_unavailable()):
            for chunk in self._store.list(known):
                self._store.delete([meta["path"] for meta in chunk])

    async def delete_prefix_async(self, prefix: str) -> None:
        known = _known_prefix(prefix)
        with _store_errors(_unavailable()):
            async for chunk in self._store.list(known):
                await self._store.delete_async([meta["path"] for meta in chunk])

    def ping(self) -> None:
        """Return if the store answers and accepts our credentials."""
        with _store_errors(_unavailable()):
            # Listing names a missing bucket, which HEAD does not; under this prefix there is never anything to send.
            self._store.list("ping").collect()

    async def ping_async(self) -> None:
        with _store_errors(_unavailable()):
            await self._store.list("ping").collect_async()


class BucketStorage(Storage):
    """A bucket of S3 or its kin. `public` is the same bucket under the name by which callers reach it."""

    def __init__(self, store: BucketStore, public: BucketStore) -> None:
        super().__init__(store)
        self._public = public
        self._etag_is_md5 = isinstance(store, S3Store)  # of the others none promises what its ETag is

    def put(self, key: str, body: bytes, content_type: str) -> None:
        with _store_errors(_unavailable()):  # S3 says 404 to a put into a bucket that does not exist
            attributes = {"Content-Type": content_type}
            put = self._store.put(_known(key), body, attributes=attributes, use_multipart=False)
            _check_size(key, self._store.head(key)["size"], len(body))
            if self._etag_is_md5 and (put["e_tag"] or "").strip('"') != _md5(body):
                # Where the store encrypts with a key of its own an ETag is something else: then what is stored decides,
                # this once.
                _check_bytes(key, bytes(self._store.get(key).bytes()), body)
                self._etag_is_md5 = False

    def sign(self, key: str, expires_seconds: int) -> str:
        """Sign with our own credentials, on this machine (short-lived ones are fetched anew once they have expired)."""
        with _store_errors(_unavailable()):
            return obstore.sign(self._public, "GET", _known(key), timedelta(seconds=expires_seconds))


class DiskStorage(Storage):
    """A folder. It keeps no content types (the extension tells) and signs nothing: our `/v1/files` route serves it."""

    def __init__(self, root: Path, public_url: str, secret: bytes, clock: Callable[[], float]) -> None:
        super().__init__(LocalStore(root, automatic_cleanup=True))
        assert secret, "anyone could sign with an empty secret"
        self._root = root
        self._public_url = public_url.rstrip("/")
        self._secret = secret
        self._clock = clock

    def path(self, key: str) -> Path:
        """The file that holds an object, for a route that sends it."""
        return self._root / _known(key)

    def put(self, key: str, body: bytes, content_type: str) -> None:
        with _store_errors(_unavailable()):
            self._store.put(_known(key), body, use_multipart=False)
            _check_size(key, self._store.head(key)["size"], len(body))
            # obstore writes aside and renames, but syncs nothing; a job said to have succeeded must keep its images
            # through a power cut, so the file is synced, and every folder that had to be made for it.
            path = self.path(key)
            for place in (path, *path.parents[: len(Path(key).parts)]):
                _fsync(place)

    def delete_prefix(self, prefix: str) -> None:
        """Delete the folder, along with what a killed writer left in it, which obstore would not list."""
        path = self._root / _known_prefix(prefix)
        with _store_errors(_unavailable()):
            for tries_left in (3, 2, 1, 0):
                if not path.exists():
                    return
                try:
                    shutil.rmtree(path)
                except OSError:  # somebody else deletes it as well, or writes into it
                    if not tries_left and path.exists():
                        raise

    async def delete_prefix_async(self, prefix: str) -> None:
        await to_thread(self.delete_prefix, prefix)

    def ping(self) -> None:
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise _unavailable()

    async def ping_async(self) -> None:
        self.ping()

    def sign(self, key: str, expires_seconds: int) -> str:
        token = self._serializer(key).dumps(int(self._clock()) + expires_seconds)
        return f"{self._public_url}/v1/files/{key}?token={token}"

    def verify(self, key: str, token: str) -> None:
        """Return if `token` was signed for `key` and has not expired. Raises Forbidden."""
        refused = Forbidden("This file URL is not valid or has expired; get the job again for a fresh one.")
        if not is_key(key):
            raise refused
        try:
            expires = self._serializer(key).loads(token)
        except BadSignature as error:
            raise refused from error
        if self._clock() >= expires:
            raise refused

    def _serializer(self, key: str) -> URLSafeSerializer:
        # The key is part of what is signed without being repeated in the URL: it is the salt.
        return URLSafeSerializer(
            self._secret,
            salt=f"safelight.files:{_known(key)}",
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )


def open_storage(url: str, *, public_url: str, secret: bytes, clock: Callable[[], float] = time.time) -> Storage:
    """The store that a URL, SAFELIGHT_STORAGE_URL, names.

    * `file:///path`: `public_url`, `secret` and `clock` (seconds since the epoch) serve its signed URLs.
    * `s3://bucket/prefix?endpoint=http://host:9000&region=us-east-1&public_endpoint=https://files.example.org`, all
      options optional. `public_endpoint` is where callers reach the same server. Credentials from the usual AWS_*
      variables.
    * `gs://bucket/prefix`, `az://container/prefix`: credentials from the usual GOOGLE_* and AZURE_* variables.

    Nothing is called yet. Raises ConfigError.
    """
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.fragment:
            raise _bad_url("holds credentials or a #", "put credentials into AWS_*, GOOGLE_* or AZURE_* variables")
        if parts.scheme != "file":
            return _open_bucket(parts)
    except _FAILURES as error:
        reason = str(error).partition("\n")[0]
        raise _bad_url(
            f"cannot be used ({reason})", "check the bucket and the variables with its credentials"
        ) from error
    if parts.netloc not in ("", "localhost") or parts.query or not parts.path.startswith("/"):
        raise _bad_url(f"is {url!r}", "write three slashes and an absolute path, as in file:///var/lib/safelight")
    return _open_disk(Path(unquote(parts.path)), public_url, secret, clock)


def _open_disk(root: Path, public_url: str, secret: bytes, clock: Callable[[], float]) -> DiskStorage:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return DiskStorage(root, public_url, secret, clock)
    except _FAILURES as error:
        raise _bad_url(f"names {root}, which cannot be made", "name a folder that the service may write to") from error


def _open_bucket(parts: SplitResult) -> BucketStorage:
    bucket, prefix, options = parts.netloc, parts.path.strip("/"), dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme not in ("s3", "gs", "az"):
        raise _bad_url(f"begins with {parts.scheme!r}", "use file:///path, s3://bucket, gs://bucket or az://container")
    if not _BUCKET.fullmatch(bucket):
        raise _bad_url(f"names the bucket {bucket!r}", "write the bucket right after the two slashes")
    if unknown := options.keys() - ({"endpoint", "region", "public_endpoint"} if parts.scheme == "s3" else set()):
        raise _bad_url(f"has the options {sorted(unknown)}", "s3:// takes endpoint, region and public_endpoint")
    if parts.scheme == "s3":
        store = _s3(bucket, prefix, options, "endpoint")
        public = _s3(bucket, prefix, options, "public_endpoint") if "public_endpoint" in options else store
        return BucketStorage(store, public)
    client: ClientConfig = {"timeout": _REQUEST_TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
    if parts.scheme == "gs":
        gcs = GCSStore(bucket, prefix=prefix or None, client_options=client, retry_config=_RETRY)
        return BucketStorage(gcs, gcs)
    azure = AzureStore(bucket, prefix=prefix or None, client_options=client, retry_config=_RETRY)
    return BucketStorage(azure, azure)


def _s3(bucket: str, prefix: str, options: dict[str, str], endpoint_option: str) -> S3Store:
    client: ClientConfig = {"timeout": _REQUEST_TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
    config: S3Config = {}
    if "region" in options:
        config["region"] = options["region"]
    if endpoint_option in options:
        endpoint = urlsplit(options[endpoint_option])
        if (
            endpoint.scheme not in ("http", "https")
            or not endpoint.hostname
            or endpoint.port == 0
            or endpoint.query
            or endpoint.username
        ):
            raise _bad_url(f"has a bad {endpoint_option}", "write it as http://host:port or https://host")
        # This key, since AWS_ENDPOINT_URL_S3 from the environment would win over plain `endpoint`.
        config["aws_endpoint_url_s3"] = endpoint.geturl().rstrip("/")
        config["virtual_hosted_style_request"] = False  # servers of one's own rarely have a name per bucket
        client["allow_http"] = endpoint.scheme == "http"
    return S3Store(bucket, prefix=prefix or None, config=config, client_options=client, retry_config=_RETRY)


def _bad_url(what: str, remedy: str) -> ConfigError:
    return ConfigError(f"SAFELIGHT_STORAGE_URL {what}; {remedy}.")


def _missing(key: str) -> NotFound:
    return NotFound(f"There is no object {key}; it has expired, or its job was deleted.")


def _unavailable() -> StorageUnavailable:
    return StorageUnavailable("The object store does not answer; try again later.")


@contextmanager
def _store_errors(if_missing: SafelightError) -> Iterator[None]:
    """Turn what obstore and the disk raise into our own errors, without their texts, which hold paths and hosts."""
    try:
        yield
    except FileNotFoundError as error:
        raise if_missing from error
    except (PermissionError, PermissionDeniedError, UnauthenticatedError) as error:
        raise StorageUnavailable(
            "The object store refuses this service; its operator must check the rights."
        ) from error
    except _FAILURES as error:
        raise _unavailable() from error


def _known(key: str) -> str:
    if not is_key(key):
        raise _missing(key)
    return key


def _known_prefix(prefix: str) -> str:
    # Not an assert: what this lets through is deleted whole.
    if not _PREFIX.fullmatch(prefix.rstrip("/")):
        raise ValueError(f"{prefix!r} is neither a job's prefix nor an attempt's")
    return prefix.rstrip("/")


def _check_size(key: str, stored: int, sent: int) -> None:
    if stored != sent:
        raise StorageUnavailable(f"The object store kept {stored} of the {sent} bytes of {key}; try again later.")


def _check_bytes(key: str, stored: bytes, sent: bytes) -> None:
    if stored != sent:
        raise StorageUnavailable(f"The object store kept other bytes than those of {key}; try again later.")


def _md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def _stored(meta: "ObjectMeta") -> StoredObject:
    return StoredObject(meta["path"], meta["size"], meta["last_modified"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
