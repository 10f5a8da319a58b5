"""Multipart bodies of the dialect: fields as the JSON ones, and pictures, which become uploads of the tenant."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from app.api.auth import Identity
from app.api.compat.openai.errors import Refused, invalid
from app.api.compat.openai.schemas import Asked
from app.api.deps import Services
from app.core.errors import ImageRefused

MAX_FIELDS: Final = 40
MAX_FILES: Final = 17  # OpenAI's sixteen images and a mask: more than one image is refused by name

T = TypeVar("T", bound=Asked)


def described(kind: type[Asked], files: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI of a multipart body: the fields of `kind`, and `files`."""
    schema = kind.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = list(required)
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def read(
    request: Request, caller: Identity, deps: Services, kind: type[T], files: Sequence[str]
) -> tuple[T, Mapping[str, str]]:
    """The fields, and the upload's id of each file that came. Raises Refused, and what the stores raise.

    Read only here, after the caller is known.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused("send multipart/form-data", code="unsupported_content_type")
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            pictures = _pictures(form, files)
            asked = _fields(form, kind)
            return asked, {name: await _kept(name, file, caller, deps) for name, file in pictures.items()}
    except (MultiPartException, UnicodeError) as error:
        why = error.message if isinstance(error, MultiPartException) else "its charset is not one"
        raise Refused(f"the body is no multipart/form-data: {why}", code="invalid_body") from error


def _pictures(form: FormData, files: Sequence[str]) -> dict[str, UploadFile]:
    """One file for each name; lists of files come as `image[]`."""
    found: dict[str, UploadFile] = {}
    for key, file in form.multi_items():
        if not isinstance(file, UploadFile):
            continue
        name = key.removesuffix("[]")
        if name not in files:
            raise invalid({"type": "extra_forbidden", "loc": (key,)})
        if name in found:
            raise Refused(f"only one {name} is taken", param=name)
        found[name] = file
    if "image" not in found:
        raise invalid({"type": "missing", "loc": ("image",)})
    return found


def _fields(form: FormData, kind: type[T]) -> T:
    given: dict[str, str] = {}
    for key, text in form.multi_items():
        if key in given:
            raise Refused(f"{key} is given twice", param=key)
        if isinstance(text, str):
            given[key] = text
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error


async def _kept(name: str, file: UploadFile, caller: Identity, deps: Services) -> str:
    try:
        return (await deps.inputs.keep(caller.tenant, await file.read())).id
    except ImageRefused as error:
        raise Refused(f"{name}: {error.message}", param=name, code="invalid_image_file") from error
