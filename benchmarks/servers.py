"""Servers: the service as it is shipped, and the others, each on a free loopback port."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from benchmarks.drive import Make, from_rival, from_safelight
from tests.chaos.stub_worker import ROW_VARIABLE, STEP_VARIABLE
from tests.servers import free_port, redis_server

ROOT = Path(__file__).resolve().parents[1]
SAFELIGHT = str(Path(sys.executable).with_name("safelight"))
STUB = """
[models.stub]
title = "Stub"
source = "none"
default = true
schedulers = ["ddim"]
tasks = ["text_to_image"]
[models.stub.defaults]
width = 64
height = 64
num_inference_steps = 4
guidance_scale = 1.0
scheduler = "ddim"
"""
STARTING_SECONDS, STOPPING_SECONDS = 120.0, 60.0


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    make: Make

    def metrics(self) -> dict[str, float]:
        """The sums of the metrics of all Safelight workers, by name and labels."""
        found: dict[str, float] = {}
        for group in httpx2.get(f"{self.url}/metrics/targets", trust_env=False).json():
            for target in group["targets"]:
                for line in httpx2.get(f"http://{target}/metrics", trust_env=False).text.splitlines():
                    if match := re.fullmatch(r"(safelight_\w+(?:\{.*\})?) (\S+)", line):
                        found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended as Ctrl-C would; what it leaves behind ends with it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SAFELIGHT_")}
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=inherited | dict(environment or {}),
            start_new_session=True,
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # LitServe's workers outlive it


@contextmanager
def safelight(folder: Path, **settings: str) -> Iterator[Server]:
    """`safelight up`, with its defaults but for the port and the folder; `settings` are SAFELIGHT_..."""
    port = free_port()
    base = {"PORT": str(port), "DATA": str(folder / "data"), "METRICS_PORT": "0"} | settings
    environment = {f"SAFELIGHT_{name}": value for name, value in base.items()}
    server = Server("Safelight", f"http://127.0.0.1:{port}", from_safelight)
    log = folder / "safelight.log"
    with process([SAFELIGHT, "up"], log, environment) as started:
        _await(f"{server.url}/readyz", log, started)
        yield server


@contextmanager
def stub(folder: Path, step: float, row: float) -> Iterator[Server]:
    """Safelight around a denoiser that sleeps max(step, row * B) seconds for B rows; all else as it is."""
    port, models = free_port(), folder / "models.toml"
    models.write_text(STUB)
    with redis_server(folder) as redis, ExitStack() as stack:
        settings = {
            "SAFELIGHT_REDIS_URL": redis.url,
            "SAFELIGHT_DATA": str(folder / "data"),
            "SAFELIGHT_PORT": str(port),
            "SAFELIGHT_MODELS": str(models),
            STEP_VARIABLE: str(step),
            ROW_VARIABLE: str(row),
        }
        worker = [sys.executable, "-c", "from tests.chaos.stub_worker import run; run()"]
        stack.enter_context(process(worker, folder / "worker.log", settings))
        api = stack.enter_context(process([SAFELIGHT, "api"], folder / "api.log", settings))
        url = f"http://127.0.0.1:{port}"
        _await(f"{url}/readyz", folder / "api.log", api)
        yield Server("Safelight", url, from_safelight)


@contextmanager
def plain_fastapi(folder: Path, threads: int) -> Iterator[Server]:
    with _rival("plain FastAPI", "plain_fastapi", folder, threads) as server:
        yield server


@contextmanager
def litserve(folder: Path, threads: int, max_batch_size: int) -> Iterator[Server]:
    name = f"LitServe, batches of {max_batch_size}"
    with _rival(name, "with_litserve", folder, threads, str(max_batch_size)) as server:
        yield server


@contextmanager
def _rival(name: str, module: str, folder: Path, threads: int, *arguments: str) -> Iterator[Server]:
    port, log = free_port(), folder / f"{module}.log"
    command = [sys.executable, "-m", f"benchmarks.rivals.{module}", str(port), *arguments]
    limits = {"SAFELIGHT_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with process(command, log, limits) as started:
        _await(f"http://127.0.0.1:{port}/openapi.json", log, started)
        yield Server(name, f"http://127.0.0.1:{port}", from_rival)


def _await(url: str, log: Path, started: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        if time.monotonic() > deadline or started.poll() is not None:
            raise TimeoutError(f"{url} did not answer within {STARTING_SECONDS} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)
