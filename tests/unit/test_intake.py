"""The intake's turns: a worker whose places are few serves all its models."""

import threading
from collections import Counter
from types import SimpleNamespace

from worker.intake import Intake, Room
from worker.leases import Claim


def test_models_take_turns_though_places_come_free_one_by_one():
    room = Room(1)
    job = SimpleNamespace(params=SimpleNamespace(num_images=1), tenant="")
    claims = SimpleNamespace(claim=lambda queue, **_: Claim(queue, 1, is_alone=False, job=job))
    turns = SimpleNamespace(next=lambda: ["a", "b", "c"])
    intake = Intake(claims, None, turns, room, queues="abc", bell=threading.Event())
    seen = Counter()
    for _ in range(30):
        intake._claim_some()
        claim = intake.claims.get_nowait()
        seen[claim.id] += 1
        room.leave(1, claim.tenant)
    assert seen == {"a": 10, "b": 10, "c": 10}
