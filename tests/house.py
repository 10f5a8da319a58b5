"""A whole Safelight of real processes for end-to-end tests, on a Redis and a store of one's own."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from tests.servers import free_port

COMMAND = str(Path(sys.executable).with_name("safelight"))
STARTING = 90  # seconds a process may take to be there on a busy machine


class House:
    """`start` its parts; `submit`, `wait` and `picture` ask it as any caller would."""

    def __init__(self, folder, redis_url, **environment):
        self.folder = folder
        self.processes = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        ours = {
            "SAFELIGHT_REDIS_URL": redis_url,
            "SAFELIGHT_DATA": str(folder / "data"),
            "SAFELIGHT_PORT": str(self.port),
            "SAFELIGHT_WEBHOOK_ALLOW": "127.0.0.0/8",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SAFELIGHT_")}
        self.environment = inherited | ours | environment
        self.client = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def start(self, part, **environment):
        log = (self.folder / f"{part}-{len(self.processes)}.log").open("wb")
        command = [COMMAND, part]
        process = subprocess.Popen(command, env=self.environment | environment, stdout=log, stderr=log)
        log.close()
        self.processes.append(process)
        return process

    def start_all(self):
        for part in ("api", "worker", "sender"):
            self.start(part)
        self.wait_until(self.is_ready, STARTING)

    def is_ready(self):
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self):
        self.client.close()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def submit(self, **request):
        reply = self.client.post("/v1/jobs", json={"prompt": "a lamp"} | request)
        assert reply.status_code == 202, reply.text
        return reply.json()

    def job(self, job_id):
        return self.client.get(f"/v1/jobs/{job_id}").json()

    def wait(self, job_id, seconds=60, status="succeeded"):
        """The job once it has ended, which must be as `status`."""
        self.wait_until(lambda: self.job(job_id)["completed_at"], seconds)
        job = self.job(job_id)
        assert job["status"] == status, job
        return job

    def picture(self, job, index=0):
        """A picture of a finished job as an array, by its URL as anyone could."""
        reply = httpx2.get(job["outputs"][index]["url"], trust_env=False)
        assert reply.status_code == 200, reply.text
        return np.asarray(Image.open(io.BytesIO(reply.content)))

    def worker_metrics(self):
        """The sum of each metric over the live workers' own ports."""
        found = {}
        for group in self.client.get("/metrics/targets").json():
            for target in group["targets"]:
                for line in httpx2.get(f"http://{target}/metrics", trust_env=False).text.splitlines():
                    if match := re.fullmatch(r"(safelight_\w+)(?:\{.*\})? (\S+)", line):
                        found[match[1]] = found.get(match[1], 0) + float(match[2])
        return found

    @staticmethod
    def wait_until(is_true, seconds):
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f"not so within {seconds} s"
            time.sleep(0.02)


@contextmanager
def house(folder, redis_url, **environment):
    built = House(folder, redis_url, **environment)
    try:
        yield built
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-3000:]}")
        raise
    finally:
        built.stop()
