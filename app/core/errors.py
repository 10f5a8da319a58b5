"""The errors of Safelight; each class is something a caller can act on, and carries its HTTP status and stable code.

* SafelightError
  x InvalidRequest                 422  invalid_request
    + InvalidParams                422  invalid_params
    + IdempotencyMismatch          422  idempotency_mismatch
    + AddressRefused               422  address_refused
    + ImageRefused                 422  image_refused
  x Unauthorized                   401  unauthorized
  x Forbidden                      403  forbidden
  x NotFound                       404  not_found
    + ModelNotFound                404  model_not_found
  x Conflict                       409  conflict
  x TooLarge                       413  too_large
  x LimitReached                   429  limit_reached
  x Overloaded                     503  overloaded
  x Unavailable                    503  unavailable
    + QueueUnavailable             503  queue_unavailable
    + StorageUnavailable           503  storage_unavailable
  x ConfigError                         (stops the process at start)
    + ModelRefused                      (files of a model that could run code, or are not what was pinned)
  x JobError                            (ends a job; never an HTTP status)
    + GenerationFailed                  generation_failed
    + InvalidOutput                     invalid_output
    + OutOfMemory                       out_of_memory
    + PromptTooLong                     prompt_too_long
    + ContentRefused                    content_refused
    + ModelUnavailable                  model_unavailable
"""

from http import HTTPStatus


class SafelightError(Exception):
    """Base of all errors; `message` names the value and the remedy and is safe to show to a caller."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after  # seconds
        self.headers: dict[str, str] = {}  # of the reply, besides those that every error has


class InvalidRequest(SafelightError):  # noqa: N818  # the tree reads as nouns, not as ...Error
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_request"


class InvalidParams(InvalidRequest):
    code = "invalid_params"


class IdempotencyMismatch(InvalidRequest):
    code = "idempotency_mismatch"


class AddressRefused(InvalidRequest):
    code = "address_refused"


class ImageRefused(InvalidRequest):
    code = "image_refused"


class Unauthorized(SafelightError):  # noqa: N818
    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class Forbidden(SafelightError):  # noqa: N818
    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class NotFound(SafelightError):  # noqa: N818
    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(SafelightError):  # noqa: N818
    status = HTTPStatus.CONFLICT
    code = "conflict"


class TooLarge(SafelightError):  # noqa: N818
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class LimitReached(SafelightError):  # noqa: N818
    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "limit_reached"


class Overloaded(SafelightError):  # noqa: N818
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "overloaded"


class Unavailable(SafelightError):  # noqa: N818
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"


class QueueUnavailable(Unavailable):
    code = "queue_unavailable"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


class ConfigError(SafelightError):
    """A setting or a file of the operator is wrong; the process stops and says which."""

    code = "config_error"


class ModelRefused(ConfigError):  # noqa: N818
    """Files of a model could run code, lead elsewhere, or are not what was pinned; nothing of them was read in."""


class JobError(SafelightError):
    """Ends a job as failed; `code` and `message` become the job's error."""

    code = "job_error"


class GenerationFailed(JobError):  # noqa: N818
    code = "generation_failed"


class InvalidOutput(JobError):  # noqa: N818
    code = "invalid_output"


class OutOfMemory(JobError):  # noqa: N818
    code = "out_of_memory"


class PromptTooLong(JobError):  # noqa: N818
    code = "prompt_too_long"


class ContentRefused(JobError):  # noqa: N818
    code = "content_refused"


class ModelUnavailable(JobError):  # noqa: N818
    code = "model_unavailable"
