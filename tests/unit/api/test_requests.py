"""What the API makes of a request before it asks anyone."""

import pytest
from pydantic import ValidationError

from app.api.auth import _is_loopback
from app.api.jobs import MAX_WAIT, _preferred_wait
from app.api.schemas import MAX_METADATA, JobRequest


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("wait=10", 10),
        ("respond-async, wait=10", 10),
        ("Wait = 7", 7),
        ('wait="5"', 5),
        ("wait=5; foo=bar", 5),
        ("wait=0", 0),
        ("wait=100000", MAX_WAIT),
        ("wait", None),
        ("wait=", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("wait=9999999999999999999", None),
        ("await=5", None),
        ("respond-async", None),
        ("", None),
        (None, None),
    ],
)
def test_a_preference_is_read_as_rfc_7240_has_it_and_capped(header, seconds):
    assert _preferred_wait(header) == seconds


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "LOCALHOST"]
)
def test_names_of_this_machine_are_loopback(host):
    assert _is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "[::2]", "@", "a b", "[", "0.0.0.0"],
)
def test_other_names_are_not_loopback(host):
    assert not _is_loopback(host)


def test_metadata_may_be_nested_sixteen_deep():
    assert JobRequest(prompt="x", metadata=nested(16)).metadata == nested(16)


@pytest.mark.parametrize("metadata", [nested(17), {"a": "x" * MAX_METADATA}, {"é" * 1400: 1}])
def test_metadata_that_is_too_deep_or_too_long_is_refused(metadata):
    with pytest.raises(ValidationError, match="metadata may"):
        JobRequest(prompt="x", metadata=metadata)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "\ud800"},
        {"prompt": "x", "metadata": {"a": ["\udfff"]}},
        {"prompt": "x", "metadata": {"\ud800": 1}},
        {"prompt": "x", "metadata": {"a": float("nan")}},
        {"prompt": "x", "guidance_scale": float("inf")},
    ],
)
def test_what_json_cannot_say_again_is_refused(body):
    with pytest.raises(ValidationError):
        JobRequest.model_validate(body)


@pytest.mark.parametrize(
    "change",
    [{"seed": "7"}, {"seed": 7.5}, {"seed": True}, {"width": "64"}, {"prompt": 3}, {"steps": 3}, {"num_images": 0}],
)
def test_nothing_is_coerced_and_nothing_unknown_is_ignored(change):
    with pytest.raises(ValidationError):
        JobRequest.model_validate({"prompt": "x"} | change)


def test_the_generation_part_leaves_out_what_paints_nothing():
    request = JobRequest(prompt="x", seed=1, metadata={"a": 1}, webhook={"url": "https://example.com"})
    assert request.generation().model_dump(exclude_none=True) == {"prompt": "x", "seed": 1}
