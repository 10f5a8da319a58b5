"""RqInfo: runs `rq info` again and again, and compares its counts with ours."""

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from redis.exceptions import RedisError

from app.core.redis_keys import ALONE, JOB, LEASES, QUEUE_PREFIX, RQ, WAITING

SECONDS = 3.0  # between two runs
SAMPLE_SECONDS = 0.02

# What each lane should have in RQ's list by our own indexes, what is in it, and what should execute and does, at one
# moment. An id may stay in the list after its job was cancelled, or twice after it was put back: until it is popped.
COUNTS = f"""
local found, alone = {{}}, {{}}
for _, list in ipairs(redis.call('SMEMBERS', '{RQ}queues')) do
  local lane, stale, seen = string.sub(list, {len(RQ) + 7}), 0, {{}}
  local ids = redis.call('LRANGE', list, 0, -1)
  for _, id in ipairs(ids) do
    if seen[id] or redis.call('HGET', '{JOB}' .. id, 'status') ~= 'queued' then stale = stale + 1 end
    seen[id] = true
  end
  local waiting = redis.call('ZCARD', '{WAITING}' .. lane)
  found[lane] = {{waiting + stale, #ids, 0, redis.call('ZCARD', '{RQ}wip:' .. lane)}}
  local queue = string.match(lane, '^{QUEUE_PREFIX}[^:@]+')
  if queue and not alone[queue] then alone[queue] = redis.call('LRANGE', '{ALONE}' .. queue, 0, -1) end
end
for _, ids in pairs(alone) do
  for _, id in ipairs(ids) do
    local job = redis.call('HMGET', '{JOB}' .. id, 'queue', 'status')
    if job[2] == 'queued' then found[job[1]][1] = found[job[1]][1] - 1 end
  end
end
for _, id in ipairs(redis.call('ZRANGE', '{LEASES}', 0, -1)) do
  local lane = redis.call('HGET', '{JOB}' .. id, 'queue')
  if lane then found[lane][3] = found[lane][3] + 1 end
end
return cjson.encode(found)
"""


class RqInfo:
    """`broken` says where the counts did not agree; `runs` and `compared` how often they were looked at."""

    def __init__(self, redis, url: str) -> None:
        self.broken: list[str] = []
        self.runs = self.compared = self.samples = 0
        self._redis = redis
        self._command = [str(Path(sys.executable).with_name("rq")), "info", "--raw", "-Q", "-u", url]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run_forever(self) -> None:
        while not self._closed.wait(SECONDS):
            self.look()

    def look(self) -> None:
        """Run it once: every count of it must be one that we had meanwhile."""
        process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        samples: list[dict] = []
        while process.poll() is None:
            with suppress(RedisError, OSError):
                samples.append(self._sample())
            time.sleep(SAMPLE_SECONDS)
        with suppress(RedisError, OSError):
            samples.append(self._sample())
        told = _parsed(process.stdout.read())
        process.stdout.close()
        if process.returncode:  # Redis was away
            return
        self.runs += 1
        for lane, counts in told.items():
            self._compare(lane, counts[:2], [sample[lane] for sample in samples if lane in sample])

    def _sample(self) -> dict:
        sample = json.loads(self._redis.eval(COUNTS, 0))
        self.samples += 1
        for lane, (queued, listed, running, wip) in sample.items():
            if (queued, running) != (listed, wip):
                self.broken.append(f"{lane}: {queued} wait and {listed} are listed, {running} run and {wip} are in wip")
        return sample

    def _compare(self, lane: str, told: list[int], samples: list[list[int]]) -> None:
        for name, count, place in (("queued", told[0], 0), ("executing", told[1], 2)):
            ours = [sample[place] for sample in samples]
            if not ours:
                continue
            self.compared += 1
            jump = max([1, *(abs(a - b) for a, b in pairwise(ours))])
            if not min(ours) - jump <= count <= max(ours) + jump:
                self.broken.append(f"{lane}: {count} {name}, ours {min(ours)} to {max(ours)}")

    def look_at_the_end(self) -> None:
        """When nothing moves any more the counts are equal, to the last one."""
        sample = self._sample()
        command = subprocess.run(self._command, capture_output=True, text=True, check=True)
        told = _parsed(command.stdout)
        finals = {"succeeded": 0, "failed": 0}
        for job in self._redis.scan_iter(f"{JOB}*", count=1000):
            status = self._redis.hget(job, "status")
            finals[status] = finals.get(status, 0) + 1
        for lane, (queued, running, _, _) in told.items():
            if (queued, running) != (sample[lane][0], sample[lane][2]):
                self.broken.append(f"{lane}: {queued} queued, {running} executing at the end, ours {sample[lane]}")
        ended = (sum(counts[2] for counts in told.values()), sum(counts[3] for counts in told.values()))
        if ended != (finals["succeeded"], finals["failed"]):
            self.broken.append(f"{ended} finished and failed at the end, ours {finals}")


def _parsed(text: str) -> dict[str, list[int]]:
    """By lane: queued, executing, finished, failed."""
    found = {}
    for line in text.splitlines():
        if line.startswith("queue "):
            name, counts = line.removeprefix("queue ").split(" ", 1)
            found[name] = [int(part.split()[0]) for part in counts.split(", ")]
    return found
