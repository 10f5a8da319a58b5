"""Redis goes away and comes back; the server is told to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from app.core.connections import connect
from app.core.errors import ConfigError, QueueUnavailable
from app.core.settings import Settings
from app.main import create_app, serve
from tests.conftest import PretendWorker
from tests.integration.test_api_events import stream
from tests.integration.test_api_jobs import submit
from tests.servers import free_port
from tests.servers import redis_server as start_redis


@pytest.fixture
def mortal_redis(tmp_path):
    """A Redis that may be killed."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with start_redis(folder) as server:
        yield server


def test_without_redis_every_route_that_needs_it_says_503_and_recovers(start_api, mortal_redis):
    with start_api(redis_url=mortal_redis.url).client() as client:
        job_id = submit(client)["id"]
        mortal_redis.kill()
        calls = [
            ("POST", "/v1/jobs", {"prompt": "x"}),
            ("GET", "/v1/jobs", None),
            ("GET", f"/v1/jobs/{job_id}", None),
            ("DELETE", f"/v1/jobs/{job_id}", None),
            ("POST", f"/v1/jobs/{job_id}/cancel", None),
            ("GET", f"/v1/jobs/{job_id}/events", None),
            ("GET", "/v1/models", None),
            ("GET", "/v1/workers", None),
            ("GET", "/metrics/targets", None),
            ("GET", "/readyz", None),
        ]
        for method, path, body in calls:
            reply = client.request(method, path, json=body)
            assert (reply.status_code, reply.json()["code"]) == (503, "queue_unavailable"), path
            assert reply.headers["retry-after"] == "2"
        assert client.get("/livez").status_code == 200
        mortal_redis.start()
        assert client.get(f"/v1/jobs/{job_id}").json()["id"] == job_id
        assert submit(client)["status"] == "queued"


def test_no_request_fails_for_a_connection_that_was_open_before_redis_restarted(start_api, mortal_redis):
    api = start_api(redis_url=mortal_redis.url)

    def look(_):
        with api.client() as client:
            return client.get("/v1/jobs").status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(look, range(64))) == {200}
        mortal_redis.kill()
        mortal_redis.start()
        time.sleep(0.1)
        assert set(pool.map(look, range(64))) == {200}


def test_the_bootstrap_key_reads_the_apis_own_metrics_without_redis(start_api, mortal_redis):
    api = start_api(redis_url=mortal_redis.url, api_key="bootstrap-key-of-the-tests")
    with api.client(headers={"Authorization": "Bearer bootstrap-key-of-the-tests"}) as client:
        assert "safelight_queue_depth{" in client.get("/metrics").text
        mortal_redis.kill()
        found = client.get("/metrics").text
    assert "safelight_http_request_seconds_count" in found
    assert "safelight_queue_depth{" not in found


def test_the_api_starts_without_redis_and_works_once_it_is_there(start_api, mortal_redis):
    mortal_redis.kill()
    with start_api(redis_url=mortal_redis.url).client() as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        mortal_redis.start()
        assert submit(client)["status"] == "queued"


def test_a_waiting_caller_hears_the_end_though_redis_was_away_meanwhile(start_api, mortal_redis, redis, tmp_path):
    from app.core.connections import connect

    api = start_api(redis_url=mortal_redis.url)
    with api.client() as client:
        job_id = submit(client)["id"]
        heard = []
        listener = threading.Thread(target=lambda: heard.extend(kind for _, kind, _ in stream(client, job_id)))
        listener.start()
        time.sleep(0.3)
        mortal_redis.kill()
        time.sleep(1.2)  # longer than one attempt to connect again
        mortal_redis.start()
        time.sleep(1.0)
        own = connect(mortal_redis.url)
        worker = PretendWorker(own, api.settings.data)
        worker.succeed(worker.claim())
        own.close()
        listener.join(3)
        assert not listener.is_alive()
        assert heard == ["status", "status", "succeeded"]


def serve_as_a_process(settings, folder):
    """`serve` in a process of its own: the process and the URL it says it listens on."""
    program = "from app.core import logs; from app.core.settings import load_settings; from app.main import serve\n"
    program += "logs.configure('json', 'api'); serve(load_settings())"
    environment = os.environ | {f"SAFELIGHT_{name.upper()}": str(value) for name, value in settings.items()}
    log = folder / "api.log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=file)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"api.listening"' in line:
                return process, json.loads(line)["url"]
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_soon_and_well_though_a_stream_is_open(redis_url, catalog_file, tmp_path, number):
    settings = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path, "port": 0}
    process, url = serve_as_a_process(settings, tmp_path)
    try:
        with httpx2.Client(base_url=url, trust_env=False, transport=httpx2.HTTPTransport(retries=20)) as client:
            job_id = submit(client)["id"]
            with client.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
                lines = reply.iter_lines()
                assert next(lines) == "event: status"
                started = time.perf_counter()
                process.send_signal(number)
                list(lines)
                assert process.wait(5) == 0
        assert time.perf_counter() - started < 3
        assert url in (tmp_path / "api.log").read_text()
    finally:
        process.kill()
        process.wait()


def test_the_process_starts_without_redis_where_that_exposes_nothing(mortal_redis, catalog_file, tmp_path):
    mortal_redis.kill()
    settings = {"redis_url": mortal_redis.url, "models": catalog_file, "data": tmp_path, "port": 0}
    with pytest.raises(QueueUnavailable):
        serve(Settings(**settings, host="0.0.0.0"))
    process, url = serve_as_a_process(settings, tmp_path)
    try:
        with httpx2.Client(base_url=url, trust_env=False, transport=httpx2.HTTPTransport(retries=20)) as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 503
            assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 503
            mortal_redis.start()
            assert submit(client)["status"] == "queued"
        assert '"redis.away"' in (tmp_path / "api.log").read_text()
    finally:
        process.kill()
        process.wait()


def test_while_redis_may_throw_jobs_away_none_are_taken(start_api, mortal_redis, monkeypatch):
    monkeypatch.setattr("app.core.queue.MEMORY_SECONDS", 0.1)
    with start_api(redis_url=mortal_redis.url).client() as client, connect(mortal_redis.url) as redis:
        submit(client)
        redis.config_set("maxmemory-policy", "allkeys-lru")
        time.sleep(0.2)
        for _ in range(2):
            refused = client.post("/v1/jobs", json={"prompt": "x"})
            assert (refused.status_code, "noeviction" in refused.json()["detail"]) == (503, True)
        redis.config_set("maxmemory-policy", "noeviction")
        time.sleep(0.2)
        submit(client)


def test_serving_stops_before_it_starts_where_it_would_be_exposed(redis_url, catalog_file, tmp_path):
    with pytest.raises(ConfigError, match="no API key"):
        serve(Settings(redis_url=redis_url, models=catalog_file, data=tmp_path, host="0.0.0.0", port=free_port()))


def test_an_api_on_all_addresses_without_a_public_url_says_what_its_links_begin_with(redis_url, catalog_file, tmp_path):
    settings = {"redis_url": redis_url, "models": catalog_file, "data": tmp_path, "port": 0, "host": "0.0.0.0"}
    process, url = serve_as_a_process(settings | {"api_key": "k" * 16}, tmp_path)
    try:
        with httpx2.Client(base_url=url, trust_env=False, transport=httpx2.HTTPTransport(retries=20)) as client:
            assert client.get("/livez").status_code == 200
        [said] = [json.loads(line) for line in (tmp_path / "api.log").read_text().splitlines() if "public_url" in line]
        assert (said["event"], said["links_begin_with"]) == ("public_url.missing", url)
        assert "SAFELIGHT_PUBLIC_URL" in said["remedy"]
    finally:
        process.kill()
        process.wait()


def test_a_taken_port_is_named(redis_url, catalog_file, tmp_path, api):
    with pytest.raises(ConfigError, match=str(api.settings.port)):
        serve(Settings(redis_url=redis_url, models=catalog_file, data=tmp_path, port=api.settings.port))


def test_building_the_app_calls_nobody(catalog_file, tmp_path):
    app = create_app(Settings(redis_url="redis://127.0.0.1:9", models=catalog_file, data=tmp_path))
    assert "/v1/jobs" in app.openapi()["paths"]
