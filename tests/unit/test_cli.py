"""The commands as their users type them."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from app.core import api_keys
from app.embedded_redis import EmbeddedRedis


def safelight(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_knows_its_version():
    assert safelight("--version").stdout == f"safelight {version('safelight')}\n"


@pytest.mark.parametrize("command", ["up", "worker"])
def test_a_wrong_setting_is_named_with_exit_code_2(command):
    ended = safelight(command, SAFELIGHT_LEASE_SECONDS="soon")
    assert ended.returncode == 2
    assert "SAFELIGHT_LEASE_SECONDS" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["api", "sender"])
def test_a_process_of_its_own_needs_a_redis(command, tmp_path):
    ended = safelight(command, SAFELIGHT_DATA=str(tmp_path))
    assert ended.returncode == 2
    assert "SAFELIGHT_REDIS_URL" in ended.stderr


def test_a_key_is_made_listed_and_revoked(redis, redis_url):
    made = safelight("keys", "create", "--name", "camera", SAFELIGHT_REDIS_URL=redis_url)
    secret = made.stdout.strip()
    [key] = api_keys.list_keys(redis)
    assert key.opens(secret)
    assert secret not in made.stderr

    listed = safelight("keys", "list", SAFELIGHT_REDIS_URL=redis_url).stdout
    assert key.id in listed
    assert "camera" in listed
    assert secret not in listed

    assert safelight("keys", "revoke", key.id, SAFELIGHT_REDIS_URL=redis_url).returncode == 0
    assert not api_keys.list_keys(redis)[0].opens(secret)
    assert "revoked" in safelight("keys", "list", SAFELIGHT_REDIS_URL=redis_url).stdout


def test_revoking_a_key_that_is_not_there_says_so(redis_url):
    ended = safelight("keys", "revoke", "nothing", SAFELIGHT_REDIS_URL=redis_url)
    assert ended.returncode == 1
    assert "there is no key 'nothing'" in ended.stderr


def test_keys_finds_the_embedded_redis_of_the_data_folder(tmp_path, wait_until):
    redis = EmbeddedRedis(tmp_path)
    redis.start(tmp_path / "redis.log")
    try:
        wait_until(redis.answers)
        assert safelight("keys", "create", "--name", "camera", SAFELIGHT_DATA=str(tmp_path)).returncode == 0
        assert "camera" in safelight("keys", "list", SAFELIGHT_DATA=str(tmp_path)).stdout
    finally:
        redis.send_signal(15)
        wait_until(lambda: redis.poll() is not None)


def test_keys_says_what_to_do_when_no_redis_runs(tmp_path):
    ended = safelight("keys", "list", SAFELIGHT_DATA=str(tmp_path))
    assert ended.returncode == 2
    assert "safelight up" in ended.stderr
    assert "SAFELIGHT_REDIS_URL" in ended.stderr


def test_keys_says_when_redis_does_not_answer():
    ended = safelight("keys", "list", SAFELIGHT_REDIS_URL="redis://127.0.0.1:1/0")
    assert ended.returncode == 1
    assert "does not answer" in ended.stderr
