"""Uploads: hand a picture in, look at it, list them, delete one."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from app.api.auth import Caller, needs
from app.api.deps import URL_SECONDS, Deps, Services
from app.api.problems import responses
from app.api.schemas import ListResponse, UploadFilter, UploadView
from app.core.api_keys import Scope
from app.core.errors import InvalidRequest
from app.core.uploads import Upload

router = APIRouter(tags=["uploads"])

UploadId = Annotated[str, Path(examples=["upload_" + "0" * 26])]
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A PNG, JPEG or WebP of one frame; at most 20 MiB and 16 million pixels.",
                        }
                    },
                }
            }
        },
    }
}


@router.post("/v1/uploads", status_code=201, responses=responses(408, 413, 422), openapi_extra=_BODY)
@needs(Scope.SUBMIT)
async def create_upload(request: Request, caller: Caller, deps: Deps) -> UploadView:
    """Keep a picture for `image` or `mask`: decoded here and written anew. The same picture has the same id."""
    return _view(await deps.inputs.keep(caller.tenant, await read_file(request, "file")), deps)


@router.get("/v1/uploads", responses=responses(422))
@needs(Scope.READ)
async def list_uploads(caller: Caller, deps: Deps, which: Annotated[UploadFilter, Query()]) -> ListResponse[UploadView]:
    """Your uploads, newest first."""
    page = await deps.uploads.list(caller.tenant, limit=which.limit, cursor=which.cursor)
    return ListResponse(data=[_view(upload, deps) for upload in page.uploads], next_cursor=page.next_cursor)


@router.get("/v1/uploads/{upload_id}", responses=responses(404))
@needs(Scope.READ)
async def get_upload(upload_id: UploadId, caller: Caller, deps: Deps) -> UploadView:
    """An upload; its URL is signed anew each time."""
    return _view(await deps.uploads.get(caller.tenant, upload_id), deps)


@router.delete("/v1/uploads/{upload_id}", status_code=204, responses=responses(404, 409))
@needs(Scope.SUBMIT)
async def delete_upload(upload_id: UploadId, caller: Caller, deps: Deps) -> None:
    """Forget an upload, unless a job that has not ended uses it."""
    await deps.uploads.delete(caller.tenant, upload_id)


async def read_file(request: Request, name: str) -> bytes:
    """The one file of a multipart body. Read only here, after the caller is known. Raises InvalidRequest."""
    wrong = InvalidRequest(f"send multipart/form-data with one file, called {name}")
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise wrong
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get(name)
            if not isinstance(file, UploadFile) or len(form) != 1:
                raise wrong
            return await file.read()
    except (MultiPartException, UnicodeError) as error:  # of a charset that is none
        raise wrong from error


def _view(upload: Upload, deps: Services) -> UploadView:
    return UploadView(
        id=upload.id,
        url=deps.storage.sign(upload.key, URL_SECONDS),
        width=upload.width,
        height=upload.height,
        bytes=upload.bytes,
        sha256=upload.sha256,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
    )
