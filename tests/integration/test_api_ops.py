"""Models, workers, files, health and metrics."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest

from app.core import processes
from app.core.storage import open_storage
from tests.conftest import PNG
from tests.integration.test_api_jobs import submit


def test_models_have_what_openais_client_reads_and_what_a_form_needs(client, worker):
    worker.live()
    reply = client.get("/v1/models").json()
    assert (reply["object"], [model["id"] for model in reply["data"]]) == ("list", ["tiny", "other"])
    tiny, other = reply["data"]
    assert (tiny["object"], tiny["created"], tiny["owned_by"]) == ("model", 1700000000, "safelight")
    assert (tiny["default"], other["default"]) == (True, False)
    assert (tiny["served"], other["served"]) == (True, False)
    assert tiny["limits"]["max_side"] == 128
    assert tiny["defaults"]["num_inference_steps"] == 20
    assert (tiny["schedulers"], tiny["loras"], tiny["examples"]) == (["ddim", "euler"], [], ["a red heart"])


def test_workers_are_listed_while_they_live(client, worker, redis):
    worker.live(device="cpu", runs=3, max_runs=64)
    worker.live(name="s1", kind="sender", models=())
    (shown,) = client.get("/v1/workers").json()["data"]
    assert (shown["id"], shown["models"], shown["device"], shown["runs"]) == ("w1", ["tiny"], "cpu", 3)
    processes.leave(redis, "w1")
    assert client.get("/v1/workers").json()["data"] == []


# Health


def test_alive_says_nothing_of_readiness(client):
    assert (client.get("/livez").status_code, client.get("/readyz").status_code) == (200, 503)


def test_ready_needs_a_worker(client, worker):
    worker.live(name="s1", kind="sender", models=())
    assert "no worker" in client.get("/readyz").json()["detail"]
    worker.live()
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ready"})


def test_a_draining_api_is_not_ready(start_api, redis, worker):
    worker.live()
    api = start_api()
    with api.client() as client:
        assert client.get("/readyz").status_code == 200
        api.app.state.services.is_draining = True
        reply = client.get("/readyz")
        assert (reply.status_code, reply.json()["detail"]) == (503, "not ready: the API is stopping")
        assert client.get("/livez").status_code == 200


# Metrics


def metrics_of(client):
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = (line.rpartition(" ") for line in reply.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def test_queues_are_counted_when_asked(client, worker):
    submit(client)
    submit(client)
    submit(client, model="other")
    worker.claim()
    found = metrics_of(client)
    assert found['safelight_queue_depth{queue="safelight.tiny"}'] == 1
    assert found['safelight_queue_depth{queue="safelight.other"}'] == 1
    assert 0 < found['safelight_queue_oldest_job_age_seconds{queue="safelight.tiny"}'] < 10
    worker.claim()
    assert metrics_of(client)['safelight_queue_oldest_job_age_seconds{queue="safelight.tiny"}'] == 0


def test_cancelled_jobs_are_counted_once(start_api):
    with start_api().client() as client:
        job_id = submit(client)["id"]
        for _ in range(3):
            client.post(f"/v1/jobs/{job_id}/cancel")
        client.delete(f"/v1/jobs/{submit(client)['id']}")
        assert metrics_of(client)['safelight_jobs_total{model="tiny",status="canceled"}'] == 2


def test_requests_are_measured_by_template_never_by_path(start_api):
    with start_api().client() as client:
        job_id = submit(client)["id"]
        client.get(f"/v1/jobs/{job_id}")
        client.get("/secret-path")
        client.request("BREW", "/v1/jobs")
        names = set(metrics_of(client))
    seen = {name for name in names if name.startswith("safelight_http_request_seconds_count")}
    labels = {tuple(re.findall(r'"([^"]*)"', name)) for name in seen}
    assert labels >= {
        ("POST", "/v1/jobs", "202"),
        ("GET", "/v1/jobs/{job_id}", "200"),
        ("GET", "unmatched", "404"),
        ("other", "/v1/jobs", "405"),
    }
    assert not any(job_id in name or "secret" in name for name in names)


def test_targets_are_what_prometheus_reads(client, worker):
    worker.live()
    worker.live(name="w2", metrics="10.0.0.2:9100")
    worker.live(name="s1", kind="sender", metrics="10.0.0.3:9200", models=())
    reply = client.get("/metrics/targets")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == [
        {"targets": ["10.0.0.3:9200"], "labels": {"process": "sender"}},
        {"targets": ["10.0.0.2:9100", "127.0.0.1:9100"], "labels": {"process": "worker"}},
    ]


# Files


@pytest.fixture
def url(client, worker):
    job_id = submit(client)["id"]
    worker.succeed(worker.claim())
    return client.get(f"/v1/jobs/{job_id}").json()["outputs"][0]["url"]


def test_a_signed_url_gives_the_bytes_with_a_fixed_type(client, url):
    reply = client.get(url)
    assert reply.content == PNG
    assert reply.headers["content-type"] == "image/png"
    assert re.fullmatch(r'inline; filename="job_\w+-0\.png"', reply.headers["content-disposition"])
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in reply.headers["content-security-policy"]


def test_a_part_of_a_file_can_be_asked_for(client, url):
    reply = client.get(url, headers={"Range": "bytes=1-3"})
    assert (reply.status_code, reply.content) == (206, b"PNG")


CHANGES = [
    ("?token=", "?other="),
    ("?token=", "?token=x"),
    ("/0.png", "/1.png"),
    ("/1/0.png", "/../../webhook_secret"),
    ("/1/0.png", "/1/0.png%00"),
    ("/1/0.png", "/%2e%2e/%2e%2e/%2e%2e/webhook_secret"),
    ("/files/jobs/", "/files//etc/passwd/"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_changed_url_opens_nothing(client, url, old, new):
    assert old in url
    reply = client.get(url.replace(old, new))
    assert reply.status_code in {403, 404}
    assert reply.headers["content-type"] == "application/problem+json"


def test_an_expired_url_opens_nothing(client, api, url):
    from app.core.settings import url_secret

    key = urlsplit(url).path.removeprefix("/v1/files/")
    storage = open_storage(api.settings.storage, public_url=api.url, secret=url_secret(api.settings).encode())
    assert parse_qs(urlsplit(storage.sign(key, 60)).query)["token"]
    assert client.get(storage.sign(key, 60)).status_code == 200
    reply = client.get(storage.sign(key, -1))
    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")


def test_the_webhook_secret_which_tenants_see_signs_no_urls(client, api, url):
    key = urlsplit(url).path.removeprefix("/v1/files/")
    seen = client.get("/v1/webhook-secret").json()["secret"]
    storage = open_storage(api.settings.storage, public_url=api.url, secret=seen.encode())
    assert client.get(url).status_code == 200
    assert client.get(storage.sign(key, 60)).status_code == 403


def test_with_a_bucket_there_is_no_files_route(start_api, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    api = start_api(storage_url="s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=us-east-1")
    with api.client() as client:
        assert client.get("/v1/files/jobs/x/1/0.png").json()["detail"] == "there is nothing at this address"
        assert "/v1/files/{key}" not in client.get("/openapi.json").json()["paths"]
