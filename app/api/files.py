"""Objects of the disk store, by signed URL. An S3-like store has signed URLs of its own."""

import stat
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query
from fastapi.responses import FileResponse

from app.api.deps import URL_SECONDS, Deps
from app.api.problems import responses
from app.core.errors import NotFound
from app.core.storage import DiskStorage, content_type_of

router = APIRouter(tags=["files"])

_BYTES: Final[dict[str, dict[str, str]]] = {"image/png": {}, "image/jpeg": {}, "image/webp": {}}


@router.get(
    "/v1/files/{key:path}",
    response_class=FileResponse,
    responses={200: {"description": "The object.", "content": _BYTES}, **responses(403, 404)},
)
async def get_file(
    key: Annotated[str, Path(examples=["jobs/job_00000000000000000000000000/1/0.png"])],
    deps: Deps,
    token: Annotated[str, Query(description="The signature, which expires.")] = "",
) -> FileResponse:
    """An object's bytes, for whoever holds a URL that a job gave; no key needed."""
    assert isinstance(deps.storage, DiskStorage)
    deps.storage.verify(key, token)
    path = deps.storage.path(key)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if not found or not stat.S_ISREG(found.st_mode):
        raise NotFound("this object was deleted")
    # Inline, so that a browser shows it: the type is fixed by us, never guessed, and nothing in it may run.
    headers = {
        "Cache-Control": f"private, max-age={URL_SECONDS}, immutable",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    _, owner, *_, name = key.split("/")
    return FileResponse(
        path,
        stat_result=found,
        headers=headers,
        media_type=content_type_of(key),
        filename=f"{owner}-{name}",
        content_disposition_type="inline",
    )
