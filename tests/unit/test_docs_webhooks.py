"""The verifiers in docs/webhooks.md, run on what the sender would send."""

import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from app.core import webhooks

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(32)).decode()
BODY = '{"type":"job.succeeded","data":{"prompt":"é"}}'.encode()
PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"


def code(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


def cases():
    """Headers, body, and whether they are to be believed."""
    now = int(time.time())
    good = dict(webhooks.sign([SECRET], "msg_1", now, BODY))
    yield good, BODY, True
    yield dict(webhooks.sign([OTHER, SECRET], "msg_1", now, BODY)), BODY, True
    yield dict(webhooks.sign([OTHER], "msg_1", now, BODY)), BODY, False
    yield dict(webhooks.sign([SECRET], "msg_1", now - 400, BODY)), BODY, False
    yield good | {"webhook-id": "msg_2"}, BODY, False
    yield good | {"webhook-signature": "v1,"}, BODY, False
    yield good, BODY + b" ", False


def test_the_python_verifier_believes_what_is_ours_and_nothing_else():
    names = {}
    exec(code("python"), names)
    for headers, body, is_good in cases():
        assert names["verify"](SECRET, headers, body) is is_good, headers


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_the_javascript_verifier_believes_what_is_ours_and_nothing_else(tmp_path):
    given = [[headers, base64.b64encode(body).decode()] for headers, body, _ in cases()]
    script = tmp_path / "verify.mjs"
    script.write_text(
        code("javascript")
        + f"const given = {json.dumps(given)};\n"
        + f"const secret = {json.dumps(SECRET)};\n"
        + "console.log(JSON.stringify(given.map(([h, b]) => verify(secret, h, Buffer.from(b, 'base64')))));\n"
    )
    ended = subprocess.run(["node", str(script)], capture_output=True, check=True, text=True)
    assert json.loads(ended.stdout) == [is_good for _, _, is_good in cases()]
