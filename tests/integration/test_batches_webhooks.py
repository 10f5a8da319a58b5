"""One webhook at a batch's end, and the delivery log page by page."""

import json

import pytest
from standardwebhooks import Webhook as Verifier

from app.core import redis_keys as keys
from tests.integration.test_batches import finish, small, wait_for
from tests.integration.test_batches import submit as submit_batch
from tests.integration.test_webhook_endpoints import guarded, hook, sender, shop, storage  # noqa: F401  # fixtures


def test_a_batch_ends_with_one_signed_webhook_whatever_became_of_its_jobs(shop, hook, sender, wait_until):  # noqa: F811
    secret = shop.client.get("/v1/webhook-secret").json()["secret"]
    batch = submit_batch(shop.client, requests=small(30), webhook={"url": hook.url()}, metadata={"order": 7})
    wait_for(shop.client, batch, "processing")
    finish(shop.worker, 2)
    shop.worker.fail(shop.worker.claim())
    assert hook.received == []
    shop.client.post(f"/v1/batches/{batch['id']}/cancel")
    ended = wait_for(shop.client, batch, "canceled")
    [request] = hook.wait_for(1)
    body = Verifier(secret).verify(request.body, request.headers)
    assert (body["type"], body["data"]["id"], body["data"]["metadata"]) == (
        "batch.completed",
        batch["id"],
        {"order": 7},
    )
    assert body["data"]["counts"] == ended["counts"]
    assert (ended["counts"]["succeeded"], ended["counts"]["failed"], ended["counts"]["canceled"]) == (2, 1, 27)
    wait_until(lambda: sender("delivered") == 1)
    [delivery] = shop.client.get("/v1/webhook-deliveries", params={"batch": batch["id"]}).json()["data"]
    assert (delivery["batch"], delivery["job"], delivery["status"]) == (batch["id"], None, "delivered")
    assert delivery["id"] == request.headers["webhook-id"] == f"msg_{batch['id'][6:]}_completed"

    assert shop.client.post(f"/v1/webhook-deliveries/{delivery['id']}/redeliver").status_code == 202
    first, second = hook.wait_for(2)
    assert json.loads(first.body)["data"]["counts"] == json.loads(second.body)["data"]["counts"]
    wait_until(lambda: sender("delivered") == 2)
    assert len(hook.received) == 2


def test_endpoints_hear_of_batches_if_they_want_to(shop, hook, sender):  # noqa: F811
    usual = shop.endpoint(hook.url("/usual"))
    assert "batch.completed" in usual["events"]
    shop.endpoint(hook.url("/batches"), events=["batch.completed"])
    shop.endpoint(hook.url("/jobs"), events=["job.succeeded"])
    batch = submit_batch(shop.client, requests=small(1))
    wait_for(shop.client, batch, "processing")
    finish(shop.worker, 1)
    got = sorted((r.path, json.loads(r.body)["type"]) for r in hook.wait_for(4))
    assert got == [
        ("/batches", "batch.completed"),
        ("/jobs", "job.succeeded"),
        ("/usual", "batch.completed"),
        ("/usual", "job.succeeded"),
    ]
    refused = shop.client.post(
        "/v1/jobs", json={"prompt": "x", "webhook": {"url": hook.url(), "events": ["batch.completed"]}}
    )
    assert refused.status_code == 422


def test_a_deleted_batch_tells_nobody(shop, hook, sender, redis, wait_until):  # noqa: F811
    batch = submit_batch(shop.client, requests=small(3), webhook={"url": hook.url()})
    wait_for(shop.client, batch, "processing")
    shop.client.delete(f"/v1/batches/{batch['id']}")
    wait_until(lambda: not redis.exists(keys.BATCH + batch["id"]))
    assert redis.zcard(keys.OUTBOX) == 0


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_the_delivery_log_is_read_page_by_page_each_once(shop, hook, redis, limit):  # noqa: F811
    for _ in range(20):
        shop.cancel(webhook={"url": hook.url()})
    names = redis.zrange(f"{keys.DELIVERIES}shop", 0, -1)
    for name in names[5:9]:  # four of one millisecond
        redis.zadd(f"{keys.DELIVERIES}shop", {name: redis.zscore(f"{keys.DELIVERIES}shop", names[5])})
    found, cursor = [], None
    while True:
        query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        page = shop.client.get("/v1/webhook-deliveries", params=query).json()
        found += [delivery["id"] for delivery in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(found) == sorted(names)
    ages = [redis.zscore(f"{keys.DELIVERIES}shop", name) for name in found]
    assert ages == sorted(ages, reverse=True)


@pytest.mark.parametrize("query", ["cursor=x", "cursor=1&job=job_1", "job=a&batch=b", "limit=0", "cursor="])
def test_a_page_that_cannot_be_is_refused(shop, query):  # noqa: F811
    assert shop.client.get(f"/v1/webhook-deliveries?{query}").status_code == 422
