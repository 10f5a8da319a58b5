"""Who may call: keys, the open service on loopback, and what each may see."""

import re
import time
from itertools import product

import pytest
from fastapi.routing import iter_route_contexts
from redis import Redis

from app.api.auth import check_exposure
from app.core import api_keys
from app.core.api_keys import TTL_SECONDS
from app.core.errors import ConfigError, NotFound
from app.core.settings import Settings

BOOTSTRAP = "bootstrap-key-of-the-tests"
OPEN = {"/livez", "/readyz", "/v1/files/{key:path}", "/docs", "/openapi.json"}


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def guarded(start_api):
    """An API with a bootstrap key."""
    with start_api(api_key=BOOTSTRAP).client() as client:
        yield client


def test_every_route_but_a_few_asks_who_calls(start_api):
    api = start_api(api_key=BOOTSTRAP)
    routes = [(r.path, method) for r in iter_route_contexts(api.app.routes) for method in r.methods or {"GET"}]
    assert len(routes) > 12
    with api.client() as client:
        for path, method in routes:
            sent = re.sub(r"{[^}]+}", "x", path)
            status = client.request(method, sent).status_code
            assert (status != 401) == (path in OPEN), (method, path, status)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {BOOTSTRAP}"},
        {"Authorization": BOOTSTRAP},
        bearer(BOOTSTRAP + "x"),
        bearer(BOOTSTRAP[:-1]),
        bearer("sl_aaaaaaaa_" + "b" * 32),
        bearer("sl_*_*"),
        {"Authorization": "Bearer é".encode()},
    ],
    ids=str,
)
def test_without_a_good_key_nothing_is_told(guarded, headers):
    reply = guarded.get("/v1/jobs", headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_a_key_in_the_query_is_no_key(guarded):
    assert guarded.get(f"/v1/models?api_key={BOOTSTRAP}").status_code == 401


def test_what_each_caller_may_see(guarded, redis):
    _, secret = api_keys.create(redis, "app")
    callers = {"admin": bearer(BOOTSTRAP), "key": bearer(secret), "nobody": {}}
    paths = ["/v1/jobs", "/v1/models", "/metrics", "/metrics/targets", "/v1/workers", "/livez"]
    seen = {(c, p): guarded.get(p, headers=callers[c]).status_code for c, p in product(callers, paths)}
    assert {p for (c, p), status in seen.items() if c == "admin" and status != 200} == set()
    assert {p: s for (c, p), s in seen.items() if c == "key" and s != 200} == {"/v1/workers": 403}
    assert {p for (c, p), status in seen.items() if c == "nobody" and status == 200} == {"/livez"}


def test_the_scheme_is_read_in_any_case(guarded):
    assert guarded.get("/v1/jobs", headers={"Authorization": f"bEaReR {BOOTSTRAP}"}).status_code == 200


def test_a_new_key_works_at_once_and_a_revoked_one_stops_within_a_second(guarded, redis):
    key, secret = api_keys.create(redis, "app")
    assert guarded.get("/v1/jobs", headers=bearer(secret)).status_code == 200
    api_keys.revoke(redis, key.id)
    time.sleep(TTL_SECONDS + 0.05)
    assert guarded.get("/v1/jobs", headers=bearer(secret)).status_code == 401


def test_the_secret_part_of_a_key_must_fit_its_public_part(guarded, redis):
    (first, one), (_, other) = api_keys.create(redis, "a"), api_keys.create(redis, "b")
    mixed = f"sl_{first.id}_{other.rpartition('_')[2]}"
    assert guarded.get("/v1/jobs", headers=bearer(one)).status_code == 200
    assert guarded.get("/v1/jobs", headers=bearer(mixed)).status_code == 401


# The open service


def test_without_any_key_the_service_is_open_on_loopback(client):
    assert client.get("/v1/workers").status_code == 200


def test_a_key_that_nobody_checks_does_no_harm(client):
    assert client.get("/v1/jobs", headers=bearer("whatever")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.nip.io", "", "[", "0.0.0.0"])
def test_the_open_service_answers_only_to_names_of_this_machine(client, host):
    reply = client.get("/v1/jobs", headers={"Host": host})
    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_the_open_service_answers_to_localhost(client, host):
    assert client.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost.evil.example", "null", "", "127.0.0.1"])
def test_the_open_service_takes_nothing_from_pages_of_other_sites(client, origin):
    refused = client.post("/v1/uploads", files={"file": b"x"}, headers={"Origin": origin})
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert client.get("/v1/jobs", headers={"Origin": origin}).status_code == 403


def test_the_open_service_takes_what_pages_of_this_machine_send_and_those_it_was_told_of(start_api):
    with start_api(cors_origins="https://app.example").client() as client:
        for origin in ("http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]", "https://app.example"):
            assert client.get("/v1/jobs", headers={"Origin": origin}).status_code == 200
        assert client.get("/v1/jobs", headers={"Origin": "http://app.example"}).status_code == 403


def test_with_keys_any_page_may_ask(guarded):
    headers = bearer(BOOTSTRAP) | {"Origin": "https://evil.example"}
    assert guarded.get("/v1/jobs", headers=headers).status_code == 200


def test_with_keys_any_name_will_do(guarded):
    reply = guarded.get("/v1/jobs", headers=bearer(BOOTSTRAP) | {"Host": "safelight.example"})
    assert reply.status_code == 200


def test_the_first_key_closes_the_service_and_revoking_it_does_not_open_it(start_api, redis):
    with start_api().client() as client:
        assert client.get("/v1/jobs").status_code == 200
        key, secret = api_keys.create(redis, "app")
        assert client.get("/v1/jobs").status_code == 401
        assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 200
        api_keys.revoke(redis, key.id)
        assert client.get("/v1/jobs").status_code == 401


# The store


def test_a_key_is_kept_as_a_hash_only(redis):
    key, secret = api_keys.create(redis, "app")
    kept = str(redis.hgetall("safelight:keys"))
    assert secret.startswith(f"sl_{key.id}_")
    assert secret.rpartition("_")[2] not in kept
    assert key.sha256 in kept


def test_keys_are_listed_oldest_first_and_stay_when_revoked(redis):
    first, second = api_keys.create(redis, "a")[0], api_keys.create(redis, "b")[0]
    gone = api_keys.revoke(redis, first.id)
    assert api_keys.revoke(redis, first.id) == gone
    assert api_keys.list_keys(redis) == [gone, second]
    with pytest.raises(NotFound):
        api_keys.revoke(redis, "nope")


def test_nothing_listens_elsewhere_without_a_key(redis: Redis):
    far = Settings(host="0.0.0.0")
    with pytest.raises(ConfigError, match="SAFELIGHT_HOST"):
        check_exposure(far, redis)
    check_exposure(Settings(), redis)
    check_exposure(Settings(host="0.0.0.0", api_key=BOOTSTRAP), redis)
    api_keys.create(redis, "app")
    check_exposure(far, redis)
