"""`safelight up` as a process of its own, with a real embedded Redis; API, worker and sender are small stand-ins."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from app import supervisor
from app.core.connections import connect
from app.embedded_redis import EmbeddedRedis, find
from app.supervisor import Part

# Each stand-in writes what happens to it into DATA/trace; the API answers /readyz.
STUB = """
import http.server, os, pathlib, signal, sys, threading, time
from redis import Redis
name, slow = sys.argv[1], float(sys.argv[2])
trace = pathlib.Path(os.environ["SAFELIGHT_DATA"]) / "trace"
def write(text):
    with trace.open("a") as file:
        file.write(f"{name} {text}\\n")
def end(*_):
    time.sleep(slow)
    Redis.from_url(os.environ["SAFELIGHT_REDIS_URL"]).ping()  # Redis is there to the last
    write("ended")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, lambda *_: write("interrupted"))
write(f"pid {os.getpid()}")
if name == "api":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begun = trace.read_text().count(" pid ") >= int(os.environ.get("STUBS", "3"))
            self.send_response(200 if self.path == "/readyz" and begun else 503)
            self.end_headers()
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", int(os.environ["SAFELIGHT_PORT"])), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    signal.pause()
"""
UP = """
import json, os, sys
from app.core.errors import ConfigError
from app.core.settings import load_settings
from app.supervisor import Supervisor
try:
    commands, margin = json.loads(os.environ["COMMANDS"]), float(os.environ.get("MARGIN", "10"))
    sys.exit(Supervisor(load_settings(), commands, margin_seconds=margin).run())
except ConfigError as error:
    print(error.message, file=sys.stderr)
    sys.exit(2)
"""


def stub(name, slow=0.0):
    return [sys.executable, "-c", STUB, name, str(slow)]


COMMANDS = {name: stub(name) for name in ("api", "worker", "sender")}


@dataclass
class Up:
    """A supervisor that runs."""

    process: subprocess.Popen
    data: Path

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert line.startswith("Safelight is ready: http://127.0.0.1:"), line
        return line

    def trace(self):
        file = self.data / "trace"
        return file.read_text().splitlines() if file.exists() else []

    def pids(self, name):
        return [int(line.split()[2]) for line in self.trace() if line.startswith(f"{name} pid ")]

    def redis(self):
        return connect((self.data / "redis" / "url").read_text().strip())

    def redis_pid(self):
        with self.redis() as redis:
            return redis.info("server")["process_id"]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def running(data, commands=COMMANDS, **environment):
    settings = {"SAFELIGHT_DATA": str(data), "SAFELIGHT_PORT": "0", "COMMANDS": json.dumps(commands), **environment}
    settings["STUBS"] = str(sum(STUB in command for command in commands.values()))
    process = subprocess.Popen(
        [sys.executable, "-c", UP],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    up = Up(process, data)
    try:
        yield up
    finally:
        process.kill()
        process.communicate()
        _end_redis(data)


def _end_redis(data):
    if url := find(data):
        with connect(url) as redis:
            redis.shutdown(nosave=True)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_it_says_one_line_when_all_is_ready_and_sigterm_drains_everything_redis_last(tmp_path):
    with running(tmp_path, {**COMMANDS, "worker": stub("worker", 0.5)}) as up:
        up.wait_ready()
        redis_pid = up.redis_pid()
        assert up.end() == 0
        assert up.process.stdout.read() == ""
        assert [line for line in up.trace() if "ended" in line] == ["api ended", "worker ended", "sender ended"]
        assert is_gone(redis_pid)
        assert find(tmp_path) is None


def test_ctrl_c_in_a_terminal_reaches_only_the_supervisor(tmp_path):
    with running(tmp_path) as up:
        up.wait_ready()
        os.killpg(up.process.pid, signal.SIGINT)
        assert up.process.wait(30) == 0
        assert not [line for line in up.trace() if "interrupted" in line]


def test_a_child_that_dies_is_started_again(tmp_path, wait_until):
    with running(tmp_path) as up:
        up.wait_ready()
        os.kill(up.pids("worker")[0], signal.SIGKILL)
        wait_until(lambda: len(up.pids("worker")) == 2)
        assert not is_gone(up.pids("worker")[1])
        assert up.end() == 0
        assert "the worker died (signal SIGKILL)" in up.process.stderr.read()


def test_redis_that_dies_comes_back_under_the_same_url_with_what_it_acknowledged(tmp_path, wait_until):
    with running(tmp_path) as up:
        up.wait_ready()
        first = up.redis_pid()
        with up.redis() as redis:
            redis.set("acknowledged", "yes")
        os.kill(first, signal.SIGKILL)
        started = time.monotonic()
        wait_until(lambda: _value(up) == "yes")
        assert time.monotonic() - started < 5
        assert up.redis_pid() != first
        assert up.end() == 0


def _value(up):
    try:
        with up.redis() as redis:
            return redis.get("acknowledged")
    except RedisError:
        return None


def test_kill_9_of_the_supervisor_ends_the_children_and_the_next_one_finds_the_redis(tmp_path, wait_until):
    with running(tmp_path) as up:
        up.wait_ready()
        redis_pid = up.redis_pid()
        children = [up.pids(name)[0] for name in COMMANDS]
        up.process.kill()
        up.process.wait()
        wait_until(lambda: all(is_gone(pid) for pid in children))
        assert not is_gone(redis_pid)
        with running(tmp_path) as again:
            again.wait_ready()
            assert again.redis_pid() == redis_pid
            assert again.end() == 0
            assert is_gone(redis_pid)


def test_a_redis_that_was_found_and_dies_is_replaced(tmp_path, wait_until):
    redis = EmbeddedRedis(tmp_path)
    redis.start(tmp_path / "redis.log")
    wait_until(redis.answers)
    with running(tmp_path) as up:
        up.wait_ready()
        found = up.redis_pid()
        assert redis.poll() is None
        redis.send_signal(signal.SIGKILL)
        wait_until(lambda: redis.poll() is not None)
        wait_until(lambda: _ping(up))
        assert up.redis_pid() != found
        assert up.end() == 0


def _ping(up):
    try:
        with up.redis() as redis:
            return redis.ping()
    except RedisError:
        return False


def test_the_embedded_redis_is_durable_and_asks_for_its_password(tmp_path):
    with running(tmp_path) as up:
        up.wait_ready()
        with up.redis() as redis:
            config = redis.config_get("*")
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
        assert (config["maxmemory-policy"], config["save"], config["bind"]) == ("noeviction", "", "127.0.0.1")
        assert config["requirepass"]
        assert (tmp_path / "redis" / "url").stat().st_mode & 0o077 == 0


def test_a_wrong_setting_of_a_part_stops_everything_and_is_shown(tmp_path):
    script = "import sys; print('SAFELIGHT_SERVE: no such model', file=sys.stderr); sys.exit(2)"
    with running(tmp_path, {**COMMANDS, "worker": [sys.executable, "-c", script]}) as up:
        assert up.process.wait(30) == 2
        assert up.process.stderr.read() == "SAFELIGHT_SERVE: no such model\n"
        assert all(is_gone(pid) for name in ("api", "sender") for pid in up.pids(name))
        assert find(tmp_path) is None


def test_a_second_signal_stops_at_once(tmp_path):
    with running(tmp_path, {**COMMANDS, "worker": stub("worker", 60)}) as up:
        up.wait_ready()
        up.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        started = time.monotonic()
        assert up.end(signal.SIGINT) == 1
        assert time.monotonic() - started < 2
        assert is_gone(up.pids("worker")[0])


def test_a_worker_that_does_not_end_is_killed_after_its_grace(tmp_path):
    commands = {**COMMANDS, "worker": stub("worker", 600)}
    with running(tmp_path, commands, SAFELIGHT_GRACE_SECONDS="0", MARGIN="1") as up:
        up.wait_ready()
        assert up.end() == 0
        assert is_gone(up.pids("worker")[0])
        assert "the worker did not end within 1 s" in up.process.stderr.read()


def test_a_port_in_use_is_named(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        running(tmp_path, SAFELIGHT_PORT=str(server.getsockname()[1])) as up,
    ):
        assert up.process.wait(10) == 2
        assert "PORT" in up.process.stderr.read()


def test_a_folder_in_use_is_named(tmp_path):
    with running(tmp_path) as up:
        up.wait_ready()
        second = subprocess.run(
            up.process.args,
            env={**os.environ, "SAFELIGHT_DATA": str(tmp_path), "SAFELIGHT_PORT": "0", "COMMANDS": "{}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2
        assert f"already runs on {tmp_path} (process {up.process.pid})" in second.stderr


def test_a_redis_of_ones_own_is_used_and_no_other_started(tmp_path, redis_url):
    with running(tmp_path, SAFELIGHT_REDIS_URL=redis_url) as up:
        up.wait_ready()
        assert not (tmp_path / "redis").exists()
        assert up.end() == 0


def test_the_parts_get_one_port_for_metrics_each(tmp_path):
    script = "import os, signal; print('METRICS', os.environ['SAFELIGHT_METRICS_PORT'], flush=True); signal.pause()"
    say = [sys.executable, "-c", script]
    with running(tmp_path, {**COMMANDS, "worker": say, "sender": say}, SAFELIGHT_METRICS_PORT="9400") as up:
        up.wait_ready()
        time.sleep(0.5)
        assert (tmp_path / "logs" / "worker.log").read_text() == "METRICS 9400\n"
        assert (tmp_path / "logs" / "sender.log").read_text() == "METRICS 9401\n"


class Dead:
    def start(self, log):
        log.touch()

    def poll(self):
        return 1


def test_restarts_wait_longer_each_time_up_to_ten_seconds(tmp_path):
    part = Part("worker", Dead(), tmp_path / "log", 1)
    delays = []
    for _ in range(7):
        part.start()
        delays.append(part.schedule_restart())
    assert delays == [0.5, 1, 2, 4, 8, 10, 10]


def test_after_a_long_life_a_restart_is_the_first_again(tmp_path):
    part = Part("worker", Dead(), tmp_path / "log", 1, failures=5)
    part.start()
    part.started_at -= supervisor.STABLE_SECONDS + 1
    assert part.schedule_restart() == 0.5


@pytest.mark.parametrize(("written", "shown"), [("{}\nplain\n{}\n", "plain"), ('{"event": "x"}\n', '{"event": "x"}')])
def test_the_last_words_of_a_part_are_its_plain_lines(tmp_path, written, shown):
    part = Part("worker", Dead(), tmp_path / "log", 1)
    part.log.write_text("from an earlier life\n")
    part.start()
    with part.log.open("a") as log:
        log.write(written)
    assert part.last_words() == shown


def test_a_long_log_is_put_aside_and_emptied(tmp_path):
    part = Part("worker", Dead(), tmp_path / "worker.log", 1)
    part.log.write_bytes(b"x" * (supervisor.LOG_BYTES + 1))
    part.start()
    assert part.log.stat().st_size == 0
    assert (tmp_path / "worker.log.1").stat().st_size > supervisor.LOG_BYTES


def test_a_long_log_that_cannot_be_put_aside_is_emptied_all_the_same(tmp_path):
    part = Part("worker", Dead(), tmp_path / "worker.log", 1)
    part.log.write_bytes(b"x" * (supervisor.LOG_BYTES + 1))
    (tmp_path / "worker.log.1").mkdir()
    part.start()
    assert part.log.stat().st_size == 0
