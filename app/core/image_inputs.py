"""ImageInputs: the pictures that a request names, in whatever way, become uploads of its tenant."""

import asyncio
import base64
import re
from collections.abc import Mapping
from typing import Final

import httpx2

from app.core.addresses import AddressGuard, guarded_client, read_limited
from app.core.catalog import Catalog
from app.core.errors import ImageRefused, InvalidParams, NotFound, Overloaded, TooLarge
from app.core.image_process import ImageProcesses
from app.core.images import MAX_BYTES
from app.core.job import Output
from app.core.params import GenerationParams, GenerationRequest, complete, settled
from app.core.queue import JobQueue
from app.core.storage import Storage
from app.core.tasks import Size, check_masks
from app.core.uploads import UPLOAD_ID, Upload, Uploads

FETCHES: Final = 8  # at a time: each may hold MAX_BYTES
FETCH_SECONDS: Final = 20.0  # for the whole of a picture
_OUTPUT: Final = re.compile(r"(job_[0-9a-hjkmnp-tv-z]{26})(?:/([0-9]{1,4}))?", re.ASCII)
_DATA: Final = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.ASCII | re.IGNORECASE)


class ImageInputs:
    """Takes pictures in: found, fetched or decoded, cleaned in a child process, kept as an upload."""

    def __init__(
        self, queue: JobQueue, storage: Storage, uploads: Uploads, processes: ImageProcesses, guard: AddressGuard
    ) -> None:
        self._queue = queue
        self._storage = storage
        self._uploads = uploads
        self._processes = processes
        self._guard = guard
        self._fetches = asyncio.Semaphore(FETCHES)

    async def complete(self, tenant: str, request: GenerationRequest, catalog: Catalog) -> GenerationParams:
        """The request's complete params, its pictures taken in.

        What can be refused without looking at a picture is refused before one is fetched. Raises ModelNotFound,
        InvalidParams, ImageRefused, AddressRefused, and what the stores raise.
        """
        settled(request, catalog)
        found = await self._find_all(tenant, request)
        sizes = {upload.id: Size(upload.width, upload.height) for upload in found.values()}
        if request.image is not None and request.mask is not None:
            check_masks(sizes[found[request.image].id], sizes[found[request.mask].id])
        return complete(_named(request, found), catalog, sizes)

    async def keep(self, tenant: str, body: bytes) -> Upload:
        """A stranger's bytes, decoded and written anew, as an upload. Raises ImageRefused, Overloaded."""
        return await self._uploads.put(tenant, await self._processes.clean(body))

    async def find(self, tenant: str, name: str) -> Upload:
        """The upload that a picture's name stands for, made where there is none.

        `name` is an upload's id, `job_.../N`, a data URL or an http(s) URL.
        """
        if UPLOAD_ID.fullmatch(name):
            return await self._uploads.get(tenant, name)
        if output := _OUTPUT.fullmatch(name):
            return await self.keep(tenant, await self._output(tenant, output[1], int(output[2] or 0)))
        if name[:5].lower() == "data:":
            return await self.keep(tenant, decode_data_url(name))
        if name[:8].lower().startswith(("https://", "http://")):
            if self._fetches.locked():
                raise Overloaded("too many pictures are being fetched; try again", retry_after=2)
            async with self._fetches:
                return await self.keep(tenant, await self._fetch(name))
        raise InvalidParams("write an upload's id, job_.../N, a data URL with base64, or an https URL")

    async def _find_all(self, tenant: str, request: GenerationRequest) -> dict[str, Upload]:
        found: dict[str, Upload] = {}
        named = [("image", request.image), ("mask", request.mask)]
        named += [(f"controls.{i}.image", control.image) for i, control in enumerate(request.controls or ())]
        for field, name in named:
            if name is None or name in found:
                continue
            try:
                found[name] = await self.find(tenant, name)
            except (InvalidParams, NotFound) as error:
                raise InvalidParams(f"{field}: {error.message}") from error
            except ImageRefused as error:
                raise ImageRefused(f"{field}: {error.message}") from error
        return found

    async def _output(self, tenant: str, job_id: str, index: int) -> bytes:
        job = await self._queue.get(tenant, job_id)
        pictures: list[Output] = [output for output in job.outputs if output.type == "image"]
        if index >= len(pictures):
            raise NotFound(f"{job_id} has {len(pictures)} pictures, so there is none of number {index}")
        return await self._storage.get_async(pictures[index].key)

    async def _fetch(self, url: str) -> bytes:
        self._guard.check_url(url)
        async with guarded_client(self._guard, total_seconds=FETCH_SECONDS) as client:
            try:
                async with client.stream("GET", url, headers={"Accept": "image/png, image/jpeg, image/webp"}) as reply:
                    if reply.status_code != 200:
                        raise ImageRefused(
                            f"the URL answered {reply.status_code}; redirects are not followed, and no key is sent"
                        )
                    return await read_limited(reply, MAX_BYTES)
            except TooLarge as error:
                raise ImageRefused(f"the picture at the URL is larger than {MAX_BYTES} bytes") from error
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                raise ImageRefused(f"the URL could not be read within {FETCH_SECONDS:g} seconds") from error


def decode_data_url(text: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises InvalidParams."""
    head = _DATA.match(text)
    if head is None:
        raise InvalidParams("a data URL begins with data:image/png;base64, (or jpeg, or webp)")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except ValueError as error:  # damaged, or not even ASCII
        raise InvalidParams("the data URL's base64 is damaged") from error


def _named(request: GenerationRequest, found: Mapping[str, Upload]) -> GenerationRequest:
    """The request with uploads' ids for its pictures."""
    change: dict[str, object] = {
        field: found[name].id for field in ("image", "mask") if (name := getattr(request, field)) is not None
    }
    if request.controls:
        change["controls"] = [c.model_copy(update={"image": found[c.image].id}) for c in request.controls]
    return request.model_copy(update=change)
